/* Checks runtime/kernels/native/system.c on the system it is compiled for: exits with 0, or says what is wrong.

   system_check FILE [emulated]: FILE holds a MiB or more. Emulators (Wine, qemu) leave pages where they are. */

#include "../../runtime/kernels/native/system.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef _WIN32
#define PSAPI_VERSION 2
#include <windows.h>
#include <psapi.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

enum { MIB = 1 << 20 };

static void expect(int holds, const char *what) {
  if (holds) return;
  fprintf(stderr, "system_check: not so: %s\n", what);
  exit(1);
}

static const unsigned char *map(const char *path) {
  const void *bytes = NULL;
#ifdef _WIN32
  HANDLE file = CreateFileA(path, GENERIC_READ, FILE_SHARE_READ, NULL, OPEN_EXISTING, 0, NULL);
  HANDLE mapping = CreateFileMappingA(file, NULL, PAGE_READONLY, 0, 0, NULL);
  if (mapping != NULL) bytes = MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, MIB);
#else
  const int file = open(path, O_RDONLY);
  bytes = mmap(NULL, MIB, PROT_READ, MAP_PRIVATE, file, 0);
  if (bytes == MAP_FAILED) bytes = NULL;
#endif
  expect(bytes != NULL, "the file is mapped");
  return bytes;
}

/* Bytes of mapped memory that the process holds; -1: the system does not say. */
static long held(const unsigned char *bytes) {
  long found = -1;
#ifdef _WIN32
  static PSAPI_WORKING_SET_EX_INFORMATION pages[MIB / 4096];
  for (int i = 0; i < MIB / 4096; i++) pages[i].VirtualAddress = (void *)(uintptr_t)(bytes + i * 4096);
  if (!QueryWorkingSetEx(GetCurrentProcess(), pages, sizeof pages)) return -1;
  found = 0;
  for (int i = 0; i < MIB / 4096; i++) found += pages[i].VirtualAttributes.Valid ? 4096 : 0;
#else
  char line[256];
  FILE *status = fopen("/proc/self/status", "r");
  (void)bytes;
  if (status == NULL) return -1;
  while (fgets(line, sizeof line, status) != NULL)
    if (sscanf(line, "RssFile: %ld", &found) == 1) found *= 1024;
  fclose(status);
#endif
  return found;
}

static long sum(const unsigned char *bytes) {
  long total = 0;
  for (int i = 0; i < MIB; i++) total += ((const volatile unsigned char *)bytes)[i];
  return total;
}

static void check_memory(void) {
  for (size_t size = 1; size <= MIB; size = size * 3 + 1) {
    unsigned char *memory = allocate(size);
    expect(memory != NULL && (uintptr_t)memory % LINE == 0, "memory lies at a line's address");
    memset(memory, 7, size);
    release(memory);
  }
  release(NULL);
}

static void check_private_pages(void) {
  unsigned char *memory = allocate(MIB);
  memset(memory, 3, MIB);
  drop_pages(memory, MIB);
  drop_pages(memory + 5, 1);
  expect(sum(memory) == 3L * MIB, "private memory keeps its contents");
  release(memory);
}

static void check_mapped_pages(const char *path, int emulated) {
  const unsigned char *bytes = map(path);
  const long before = sum(bytes), most = held(bytes);
  drop_pages(bytes + 5, 9);
  expect(held(bytes) > most - MIB / 2, "less than a page drops none");
  drop_pages(bytes, MIB);
  const long left = held(bytes);
  expect(emulated || most == -1 || most - left >= MIB / 2, "pages of a file are dropped");
  expect(sum(bytes) == before, "they are read again as they were");
  printf("held %ld bytes, %ld after dropping\n", most, left);
}

int main(int count, char **arguments) {
  expect(count == 2 || count == 3, "it gets a file of a MiB or more");
  check_memory();
  check_private_pages();
  check_mapped_pages(arguments[1], count == 3);
  return 0;
}
