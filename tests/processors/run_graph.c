/* Runs a graph on Windows with the kernels' library, by ONNX Runtime's C interface: tests.processors.windows has no
   Python there.

   run_graph ONNXRUNTIME LIBRARY GRAPH ROWS COLUMNS OUTPUT INPUT=FILE ...

   Inputs are int64 [ROWS, COLUMNS], OUTPUT is float32; files and what is printed hold their bytes. LIBRARY "-": none.
   EMBEDGE_KERNELS names the kernels' instruction set; without it they are of the best.
   Positions are those of OrtApi in ONNX Runtime's onnxruntime_c_api.cc, which never change. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <fcntl.h>
#include <io.h>
#include <wchar.h>
#include <windows.h>

enum { MOST_INPUTS = 8, ONNX_INT64 = 7 };

static void **api;

static void fail(const char *what) {
  fprintf(stderr, "run_graph: %s\n", what);
  exit(1);
}

static void check(void *status) {
  const char *(*message)(const void *);
  *(void **)&message = api[2];
  if (status != NULL) fail(message(status));
}

/* The function at a position, called with arguments of their own types. */
#define CALL(position, types, ...) \
  do { \
    void *(*call)types; \
    *(void **)&call = api[position]; \
    check(call(__VA_ARGS__)); \
  } while (0)

#define GIVE_BACK(position, thing) \
  do { \
    void (*call)(void *); \
    *(void **)&call = api[position]; \
    call(thing); \
  } while (0)

static void choose(const char *library, const char *set) {
  const char *(*function)(const char *);
  *(void **)&function = (void *)(uintptr_t)GetProcAddress(LoadLibraryA(library), "embedge_kernels_choose");
  if (function == NULL || function(set) == NULL) fail("the kernels do not run with what EMBEDGE_KERNELS names");
}

static void *read_file(const char *path, size_t size) {
  FILE *file = fopen(path, "rb");
  char *bytes = malloc(size + 1);
  if (file == NULL || bytes == NULL || fread(bytes, 1, size + 1, file) != size) fail(path);
  fclose(file);
  return bytes;
}

int main(int count, char **arguments) {
  if (count < 8 || count > 7 + MOST_INPUTS)
    fail("expected ONNXRUNTIME LIBRARY GRAPH ROWS COLUMNS OUTPUT INPUT=FILE ...");
  const void *(*base)(void);
  HMODULE onnxruntime = LoadLibraryA(arguments[1]);
  if (onnxruntime == NULL) fail("ONNX Runtime does not load");
  *(void **)&base = (void *)(uintptr_t)GetProcAddress(onnxruntime, "OrtGetApiBase");
  void **(*get)(uint32_t);
  *(void **)&get = *(void *const *)base();
  api = get(17);

  void *env = NULL, *options = NULL, *session = NULL, *memory = NULL, *library = NULL, *output = NULL, *info = NULL;
  CALL(3, (int, const char *, void **), 3, "run_graph", &env);
  CALL(10, (void **), &options);
  CALL(24, (void *, int), options, 2);
  if (strcmp(arguments[2], "-") != 0) {
    if (getenv("EMBEDGE_KERNELS") != NULL) choose(arguments[2], getenv("EMBEDGE_KERNELS"));
    CALL(130, (void *, const char *, const char *), options, "embedge.weights", "rows");
    CALL(29, (void *, const char *, void **), options, arguments[2], &library);
  }
  wchar_t graph[4096];
  if (mbstowcs(graph, arguments[3], 4096) >= 4096) fail("the graph's path is too long");
  CALL(7, (const void *, const wchar_t *, const void *, void **), env, graph, options, &session);

  const int64_t shape[2] = {atoll(arguments[4]), atoll(arguments[5])};
  const size_t bytes = (size_t)(shape[0] * shape[1]) * sizeof(int64_t);
  const char *names[MOST_INPUTS];
  void *values[MOST_INPUTS] = {NULL};
  CALL(69, (int, int, void **), 1, 0, &memory);
  for (int i = 7; i < count; i++) {
    char *file = strchr(arguments[i], '=');
    if (file == NULL) fail(arguments[i]);
    *file++ = 0;
    names[i - 7] = arguments[i];
    CALL(49, (const void *, void *, size_t, const int64_t *, size_t, int, void **), memory, read_file(file, bytes),
         bytes, shape, 2, ONNX_INT64, &values[i - 7]);
  }
  CALL(9,
       (void *, const void *, const char *const *, const void *const *, size_t, const char *const *, size_t, void **),
       session, NULL, names, (const void *const *)values, (size_t)count - 7, (const char *const *)&arguments[6], 1,
       &output);

  float *data = NULL;
  size_t elements = 0;
  CALL(51, (void *, void **), output, (void **)&data);
  CALL(65, (const void *, void **), output, &info);
  CALL(64, (const void *, size_t *), info, &elements);
  (void)_setmode(_fileno(stdout), _O_BINARY);
  if (fwrite(data, sizeof *data, elements, stdout) != elements) fail("the output is not written");
  GIVE_BACK(96, output);
  GIVE_BACK(95, session); /* destroys the kernels */
  return 0;
}
