/* 8-bit products of ONNX Runtime sessions on x86-64 processors with AVX512-VNNI.

   A custom-operator library with one kernel, which takes the place of ONNX Runtime's own for
   com.microsoft.MatMulIntegerToFloat in the sessions that it is registered in: the same operator, and
   the same result to the bit,

       y[m, n] = float(sum over k of (a[m, k] - a_zero_point) * b[k, n]) * b_scale[n] * a_scale[m].

   What differs is the order of the work:

   * Weights are read once, in the order they lie in memory. All rows of the left side pass over a slab of
     48 columns while the cache holds it, and each pass fetches a part of the next slab. ONNX Runtime's
     kernel waits for memory in its first pass of 6 rows and computes in the others.
   * 24 accumulators (8 rows x 48 columns) are fed by 11 loads.
   * The scales are applied as the accumulators are stored; ONNX Runtime takes a pass of its own for the
     rows' ones, with one thread.

   Weights lie in panels of 16 columns, int8 [columns / 16, depth / 4, 16, 4], whose lines of 64 bytes are
   what one vpdpbusd multiplies. Where the session option "embedge.weights" is "panels", weights above 4096
   bytes that fill their panels are stored like that already, under their shape [depth, columns]; else the
   kernel makes a copy when the session opens. */

#if !defined(__x86_64__) || !defined(__linux__)
#error "this kernel is written for Linux on x86-64; elsewhere ONNX Runtime's own is used"
#endif

#include <immintrin.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "onnxruntime_abi.h"

#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define EXPORT __attribute__((visibility("default")))

enum { ROWS = 8, PANELS = 3, LANES = 16, LINE = 64 }; /* of a tile, of a panel, bytes of a line */
enum { A, B, A_SCALE, B_SCALE, A_ZERO_POINT, INPUTS };

/* Weights up to it, in bytes, lie in the graph and are never stored in panels. */
#define SMALL_WEIGHT 4096
/* Products below it take less time than waking a second thread, in multiplications. */
#define SMALL_PRODUCT (1 << 20)
/* Tasks of a product: enough to balance threads, consecutive panels in each. */
#define TASKS 64
#define MIN_TASK_ROWS 64

typedef struct {
  const OrtApi *api;
  int64_t depth, columns; /* of the weight */
  int64_t lines;          /* of a panel: depth / 4, rounded up */
  const int8_t *panels;
  int8_t *owned;   /* the panels, where they are a copy */
  int32_t *sums;   /* of each column, [panels * 16] */
} Kernel;

typedef struct {
  const Kernel *kernel;
  const uint8_t *a;
  const float *a_scale, *b_scale;
  float *y;
  int64_t rows, a_scale_step, row_blocks, slabs, slabs_per_task;
  int32_t zero_point;
  int one_b_scale;
} Product;

/* ---- Tiles ---- */

typedef struct {
  const uint8_t *a; /* the first row, `depth` bytes apart */
  const int8_t *b;  /* the first panel, `lines` lines apart */
  const int8_t *next;
  int64_t next_step; /* bytes to fetch ahead a step: a line, or 0 */
  const int32_t *sums;
  const float *a_scale, *b_scale;
  float *y;
} Tile;

/* y[rows, columns] of a tile; `last` are the columns of the last panel that exist. */
static inline __attribute__((always_inline)) VNNI void run_tile(const Product *p, const Tile *t, const int rows,
                                                               const int panels, __mmask16 last) {
  const int64_t depth = p->kernel->depth, lines = p->kernel->lines, whole = depth / 4;
  const size_t tail = (size_t)(depth % 4);
  __m512i sum[ROWS][PANELS];
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 3
    for (int j = 0; j < panels; j++) sum[i][j] = _mm512_setzero_si512();

  const int8_t *next = t->next;
  for (int64_t k = 0; k < whole; k++) {
    __m512i b[PANELS];
    _mm_prefetch((const char *)next, _MM_HINT_T1);
    next += t->next_step;
#pragma GCC unroll 3
    for (int j = 0; j < panels; j++) b[j] = _mm512_loadu_si512(t->b + (j * lines + k) * LINE);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      int32_t four;
      memcpy(&four, t->a + i * depth + 4 * k, 4);
      const __m512i a = _mm512_set1_epi32(four);
#pragma GCC unroll 3
      for (int j = 0; j < panels; j++) sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], a, b[j]);
    }
  }
  if (tail != 0) {
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      int32_t four = 0;
      memcpy(&four, t->a + i * depth + 4 * whole, tail);
      const __m512i a = _mm512_set1_epi32(four);
#pragma GCC unroll 3
      for (int j = 0; j < panels; j++)
        sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], a, _mm512_loadu_si512(t->b + (j * lines + whole) * LINE));
    }
  }

  const __m512i zero_point = _mm512_set1_epi32(p->zero_point);
#pragma GCC unroll 3
  for (int j = 0; j < panels; j++) {
    const __mmask16 mask = j == panels - 1 ? last : (__mmask16)0xffff;
    const __m512i shift = _mm512_mullo_epi32(zero_point, _mm512_loadu_si512(t->sums + j * LANES));
    const __m512 scale = p->one_b_scale ? _mm512_set1_ps(*t->b_scale)
                                        : _mm512_maskz_loadu_ps(mask, t->b_scale + j * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum[i][j], shift)), scale);
      y = _mm512_mul_ps(y, _mm512_set1_ps(t->a_scale[i * p->a_scale_step]));
      _mm512_mask_storeu_ps(t->y + i * p->kernel->columns + j * LANES, mask, y);
    }
  }
}

typedef void (*RunTile)(const Product *, const Tile *, __mmask16);
#define TILE(rows, panels) \
  static VNNI void tile_##rows##_##panels(const Product *p, const Tile *t, __mmask16 last) { \
    run_tile(p, t, rows, panels, last); \
  }
#define TILES(rows) TILE(rows, 1) TILE(rows, 2) TILE(rows, 3)
TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6) TILES(7) TILES(8)
#define NAMES(rows) {tile_##rows##_1, tile_##rows##_2, tile_##rows##_3}
static const RunTile RUN_TILE[ROWS][PANELS] = {NAMES(1), NAMES(2), NAMES(3), NAMES(4),
                                               NAMES(5), NAMES(6), NAMES(7), NAMES(8)};

/* Some rows of a slab, in strips of equal height as far as possible. */
static void run_slab(const Product *p, int64_t slab, int64_t from, int64_t to) {
  const Kernel *kernel = p->kernel;
  const int64_t first = slab * PANELS * LANES, left = kernel->columns - first;
  const int64_t columns = left < PANELS * LANES ? left : PANELS * LANES;
  const int panels = (int)((columns + LANES - 1) / LANES);
  const __mmask16 last = (__mmask16)((1u << (columns - (panels - 1) * LANES)) - 1);
  const int8_t *b = kernel->panels + slab * PANELS * kernel->lines * LINE;
  const int64_t strips = (to - from + ROWS - 1) / ROWS;

  int64_t row = from;
  for (int64_t strip = 0; strip < strips; strip++) {
    const int64_t rows = (to - row + strips - strip - 1) / (strips - strip);
    const int fetch = from == 0 && strip < PANELS && slab + 1 < p->slabs;
    const Tile tile = {
        .a = p->a + row * kernel->depth,
        .b = b,
        .next = fetch ? b + (PANELS + strip) * kernel->lines * LINE : b,
        .next_step = fetch ? LINE : 0,
        .sums = kernel->sums + first,
        .a_scale = p->a_scale + row * p->a_scale_step,
        .b_scale = p->one_b_scale ? p->b_scale : p->b_scale + first,
        .y = p->y + row * kernel->columns + first,
    };
    RUN_TILE[rows - 1][panels - 1](p, &tile, last);
    row += rows;
  }
}

static void run_task(void *data, size_t index) {
  const Product *p = data;
  const int64_t block = (int64_t)index % p->row_blocks, group = (int64_t)index / p->row_blocks;
  const int64_t from = p->rows * block / p->row_blocks, to = p->rows * (block + 1) / p->row_blocks;
  const int64_t first = group * p->slabs_per_task, end = first + p->slabs_per_task;
  for (int64_t slab = first; slab < end && slab < p->slabs; slab++) run_slab(p, slab, from, to);
}

/* ---- Weights ---- */

/* Adds to sums[16] the four values of each column of a line. */
static VNNI void add_line(int32_t *sums, const int8_t *line) {
  const __m512i sum = _mm512_dpbusd_epi32(_mm512_loadu_si512(sums), _mm512_set1_epi8(1), _mm512_loadu_si512(line));
  _mm512_storeu_si512(sums, sum);
}

/* Four rows of 16 columns as a line. */
static void pack_line(int8_t *line, const int8_t *rows, int64_t row_step) {
  const __m128i r0 = _mm_loadu_si128((const __m128i *)rows);
  const __m128i r1 = _mm_loadu_si128((const __m128i *)(rows + row_step));
  const __m128i r2 = _mm_loadu_si128((const __m128i *)(rows + 2 * row_step));
  const __m128i r3 = _mm_loadu_si128((const __m128i *)(rows + 3 * row_step));
  const __m128i low01 = _mm_unpacklo_epi8(r0, r1), high01 = _mm_unpackhi_epi8(r0, r1);
  const __m128i low23 = _mm_unpacklo_epi8(r2, r3), high23 = _mm_unpackhi_epi8(r2, r3);
  __m128i *to = (__m128i *)line;
  _mm_storeu_si128(to, _mm_unpacklo_epi16(low01, low23));
  _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(low01, low23));
  _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(high01, high23));
  _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(high01, high23));
}

/* int8 [depth, columns] into panels, zeros where a panel or line is not full; and their sums. */
static void pack(Kernel *kernel, const int8_t *b) {
  const int64_t depth = kernel->depth, columns = kernel->columns;
  for (int64_t k = 0; k < kernel->lines; k++)
    for (int64_t first = 0; first < columns; first += LANES) {
      int8_t *line = kernel->owned + (first / LANES * kernel->lines + k) * LINE;
      const int8_t *rows = b + 4 * k * columns + first;
      if (4 * k + 4 <= depth && first + LANES <= columns) {
        pack_line(line, rows, columns);
      } else {
        memset(line, 0, LINE);
        for (int64_t r = 0; r < 4 && 4 * k + r < depth; r++)
          for (int64_t c = 0; c < LANES && first + c < columns; c++) line[4 * c + r] = rows[r * columns + c];
      }
      add_line(kernel->sums + first, line);
    }
}

static void add_panels(Kernel *kernel, int64_t panels) {
  for (int64_t panel = 0; panel < panels; panel++)
    for (int64_t k = 0; k < kernel->lines; k++)
      add_line(kernel->sums + panel * LANES, kernel->panels + (panel * kernel->lines + k) * LINE);
}

/* Lets go of pages of a mapped file that were copied; pages of other memory stay as they are. */
static void drop_pages(const int8_t *bytes, size_t size) {
#ifdef MADV_PAGEOUT
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  const uintptr_t from = ((uintptr_t)bytes + page - 1) / page * page, to = ((uintptr_t)bytes + size) / page * page;
  if (to > from) (void)madvise((void *)from, to - from, MADV_PAGEOUT);
#else
  (void)bytes, (void)size;
#endif
}

/* ---- The operator ---- */

static OrtStatus *shape_of(const OrtApi *api, const OrtValue *value, int64_t *dims, size_t most, size_t *count) {
  OrtTensorTypeAndShapeInfo *info = NULL;
  OrtStatus *status = api->GetTensorTypeAndShape(value, &info);
  if (status != NULL) return status;
  status = api->GetDimensionsCount(info, count);
  if (status == NULL && *count > most)
    status = api->CreateStatus(ORT_NOT_IMPLEMENTED, "embedge products: a tensor has more than 8 dimensions");
  if (status == NULL) status = api->GetDimensions(info, dims, *count);
  api->ReleaseTensorTypeAndShapeInfo(info);
  return status;
}

static void destroy(void *data) {
  Kernel *kernel = data;
  if (kernel == NULL) return;
  free(kernel->owned);
  free(kernel->sums);
  free(kernel);
}

static void *allocate(size_t bytes) { return aligned_alloc(LINE, (bytes + LINE - 1) / LINE * LINE); }

static OrtStatus *create(const OrtApi *api, const OrtKernelInfo *info, int in_panels, void **out) {
  const OrtValue *weight = NULL;
  int constant = 0;
  int64_t dims[8];
  size_t count = 0;
  void *bytes = NULL;
  OrtStatus *status = api->KernelInfoGetConstantInput_tensor(info, B, &constant, &weight);
  if (status != NULL) return status;
  if (!constant) return api->CreateStatus(ORT_NOT_IMPLEMENTED, "embedge products: the weight is not constant");
  if ((status = shape_of(api, weight, dims, 8, &count)) != NULL) return status;
  if (count != 2 || dims[0] < 1 || dims[1] < 1)
    return api->CreateStatus(ORT_NOT_IMPLEMENTED, "embedge products: the weight has not two dimensions");
  if ((status = api->GetTensorMutableData((OrtValue *)weight, &bytes)) != NULL) return status;

  Kernel *kernel = calloc(1, sizeof *kernel);
  if (kernel == NULL) return api->CreateStatus(ORT_FAIL, "embedge products: out of memory");
  kernel->api = api;
  kernel->depth = dims[0];
  kernel->columns = dims[1];
  kernel->lines = (dims[0] + 3) / 4;
  const int64_t panels = (dims[1] + LANES - 1) / LANES;
  const size_t size = (size_t)(panels * kernel->lines * LINE), sums = (size_t)(panels * LANES) * sizeof(int32_t);
  const int stored = in_panels && dims[0] * dims[1] > SMALL_WEIGHT && dims[0] % 4 == 0 && dims[1] % LANES == 0;
  kernel->sums = allocate(sums);
  if (!stored) kernel->owned = allocate(size);
  if (kernel->sums == NULL || (!stored && kernel->owned == NULL)) {
    destroy(kernel);
    return api->CreateStatus(ORT_FAIL, "embedge products: out of memory for a weight");
  }
  memset(kernel->sums, 0, sums);
  if (stored) {
    kernel->panels = bytes;
    add_panels(kernel, panels);
  } else {
    kernel->panels = kernel->owned;
    pack(kernel, bytes);
    drop_pages(bytes, (size_t)(dims[0] * dims[1]));
  }
  *out = kernel;
  return NULL;
}

static OrtStatus *compute(void *data, OrtKernelContext *context) {
  const Kernel *kernel = data;
  const OrtApi *api = kernel->api;
  const OrtValue *input[INPUTS] = {NULL};
  const void *bytes[INPUTS] = {NULL};
  int64_t dims[8], elements[INPUTS] = {0};
  size_t count = 0;
  OrtStatus *status;
  for (size_t i = INPUTS; i-- > 0;) { /* A comes last: its dimensions are the result's */
    if (i == B) continue;
    if ((status = api->KernelContext_GetInput(context, i, &input[i])) != NULL) return status;
    if (input[i] == NULL) continue;
    if ((status = shape_of(api, input[i], dims, 8, &count)) != NULL) return status;
    elements[i] = 1;
    for (size_t d = 0; d < count; d++) elements[i] *= dims[d];
    if ((status = api->GetTensorMutableData((OrtValue *)input[i], (void **)&bytes[i])) != NULL) return status;
  }
  if (count < 1 || dims[count - 1] != kernel->depth)
    return api->CreateStatus(ORT_INVALID_ARGUMENT, "embedge products: rows and weight differ in depth");
  const int64_t rows = elements[A] / kernel->depth;
  if (elements[A_SCALE] != 1 && elements[A_SCALE] != rows)
    return api->CreateStatus(ORT_INVALID_ARGUMENT, "embedge products: expected one scale, or one for each row");
  if (elements[B_SCALE] != 1 && elements[B_SCALE] != kernel->columns)
    return api->CreateStatus(ORT_INVALID_ARGUMENT, "embedge products: expected one scale, or one for each column");
  if (input[A_ZERO_POINT] != NULL && elements[A_ZERO_POINT] != 1)
    return api->CreateStatus(ORT_INVALID_ARGUMENT, "embedge products: expected one zero point");

  OrtValue *output = NULL;
  void *y = NULL;
  dims[count - 1] = kernel->columns;
  if ((status = api->KernelContext_GetOutput(context, 0, dims, count, &output)) != NULL) return status;
  if (rows == 0) return NULL;
  if ((status = api->GetTensorMutableData(output, &y)) != NULL) return status;

  const int64_t width = PANELS * LANES;
  Product product = {
      .kernel = kernel,
      .a = bytes[A],
      .a_scale = bytes[A_SCALE],
      .b_scale = bytes[B_SCALE],
      .y = y,
      .rows = rows,
      .a_scale_step = elements[A_SCALE] != 1,
      .slabs = (kernel->columns + width - 1) / width,
      .zero_point = bytes[A_ZERO_POINT] == NULL ? 0 : *(const uint8_t *)bytes[A_ZERO_POINT],
      .one_b_scale = elements[B_SCALE] == 1,
  };
  product.slabs_per_task = (product.slabs + TASKS - 1) / TASKS;
  const int64_t groups = (product.slabs + product.slabs_per_task - 1) / product.slabs_per_task;
  const int64_t wanted = (TASKS + groups - 1) / groups, most = (rows + MIN_TASK_ROWS - 1) / MIN_TASK_ROWS;
  product.row_blocks = wanted < most ? wanted : most;
  const int64_t tasks = groups * product.row_blocks;
  if (rows * kernel->depth * kernel->columns < SMALL_PRODUCT || tasks == 1) {
    for (int64_t task = 0; task < tasks; task++) run_task(&product, (size_t)task);
    return NULL;
  }
  return api->KernelContext_ParallelFor(context, run_task, (size_t)tasks, 0, &product);
}

static OrtStatus *create_from_rows(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  (void)op;
  return create(api, info, 0, out);
}

static OrtStatus *create_from_panels(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  (void)op;
  return create(api, info, 1, out);
}

static const char *name(const OrtCustomOp *op) { return (void)op, "MatMulIntegerToFloat"; }
static const char *provider(const OrtCustomOp *op) { return (void)op, "CPUExecutionProvider"; }
static size_t input_count(const OrtCustomOp *op) { return (void)op, INPUTS; }
static size_t output_count(const OrtCustomOp *op) { return (void)op, 1; }
static int output_type(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, ONNX_FLOAT; }
static int required(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, ORT_REQUIRED; }
static int memory(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, ORT_MEM_TYPE_DEFAULT; }
static int one(const OrtCustomOp *op) { return (void)op, 1; }
static int any_version(const OrtCustomOp *op) { return (void)op, 2147483647; }

static int input_type(const OrtCustomOp *op, size_t index) {
  (void)op;
  return index == B ? ONNX_INT8 : index == A || index == A_ZERO_POINT ? ONNX_UINT8 : ONNX_FLOAT;
}

static int input_characteristic(const OrtCustomOp *op, size_t index) {
  return (void)op, index == A_ZERO_POINT ? ORT_OPTIONAL : ORT_REQUIRED;
}

#define PRODUCTS(create_kernel) \
  { \
    .version = ORT_API_VERSION, .GetName = name, .GetExecutionProviderType = provider, .GetInputType = input_type, \
    .GetInputTypeCount = input_count, .GetOutputType = output_type, .GetOutputTypeCount = output_count, \
    .KernelDestroy = destroy, .GetInputCharacteristic = input_characteristic, .GetOutputCharacteristic = required, \
    .GetInputMemoryType = memory, .GetVariadicInputMinArity = one, .GetVariadicInputHomogeneity = one, \
    .GetVariadicOutputMinArity = one, .GetVariadicOutputHomogeneity = one, .CreateKernelV2 = create_kernel, \
    .KernelComputeV2 = compute, .GetStartVersion = one, .GetEndVersion = any_version, \
  }
/* A domain serves any number of sessions, and has to outlive them: made once, never released. */
static OrtStatus *domain_of(const OrtApi *api, OrtCustomOpDomain **kept, const OrtCustomOp *op) {
  OrtCustomOpDomain *made = NULL, *none = NULL;
  if (__atomic_load_n(kept, __ATOMIC_ACQUIRE) != NULL) return NULL;
  OrtStatus *status = api->CreateCustomOpDomain("com.microsoft", &made);
  if (status != NULL) return status;
  status = api->CustomOpDomain_Add(made, op);
  if (status != NULL || !__atomic_compare_exchange_n(kept, &none, made, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
    api->ReleaseCustomOpDomain(made); /* another thread was first */
  return status;
}

/* Whether the processor has the instructions; to be asked first, the kernel does not look. */
EXPORT int embedge_products_run_here(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

/* Called by SessionOptions.register_custom_ops_library. */
EXPORT OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  static const OrtCustomOp from_rows = PRODUCTS(create_from_rows), from_panels = PRODUCTS(create_from_panels);
  static OrtCustomOpDomain *rows_domain, *panels_domain;
  const OrtApi *api = base->GetApi(ORT_API_VERSION);
  if (api == NULL) return NULL; /* older than the interface: ONNX Runtime keeps its own kernel */
  char value[16] = "";
  size_t size = sizeof value;
  int given = 0;
  OrtStatus *status = api->HasSessionConfigEntry(options, "embedge.weights", &given);
  if (status == NULL && given) status = api->GetSessionConfigEntry(options, "embedge.weights", value, &size);
  if (status != NULL) return status;
  const int panels = strcmp(value, "panels") == 0;
  OrtCustomOpDomain **domain = panels ? &panels_domain : &rows_domain;
  status = domain_of(api, domain, panels ? &from_panels : &from_rows);
  return status != NULL ? status : api->AddCustomOpDomain(options, *domain);
}
