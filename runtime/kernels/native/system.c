/* What differs by operating system: memory. */

#include "system.h"

#include <stdint.h>
#include <stdlib.h>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <malloc.h>
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

/* The pages that lie in some memory whole; 0 bytes: none does. */
typedef struct {
  void *from;
  size_t size;
} Pages;

static Pages whole_pages(const void *bytes, size_t size, uintptr_t page) {
  const uintptr_t from = ((uintptr_t)bytes + page - 1) / page * page, to = ((uintptr_t)bytes + size) / page * page;
  return (Pages){(void *)from, to > from ? (size_t)(to - from) : 0};
}

#ifdef _WIN32 /* ---- Windows ---- */

/* Setuptools lists it among the library's exports, as of any extension; nothing imports it. */
EXPORT void *PyInit__native(void) { return NULL; }

void *allocate(size_t bytes) { return _aligned_malloc(bytes, LINE); }

void release(void *memory) { _aligned_free(memory); }

/* Pages that were not locked leave the working set as they are "unlocked" (VirtualUnlock's documentation). */
void drop_pages(const void *bytes, size_t size) {
  SYSTEM_INFO system;
  GetSystemInfo(&system);
  const Pages pages = whole_pages(bytes, size, system.dwPageSize);
  MEMORY_BASIC_INFORMATION memory;
  if (pages.size == 0 || VirtualQuery(pages.from, &memory, sizeof memory) == 0) return;
  if (memory.Type == MEM_MAPPED) (void)VirtualUnlock(pages.from, pages.size);
}

#else /* ---- Linux and macOS ---- */

void *allocate(size_t bytes) { return aligned_alloc(LINE, (bytes + LINE - 1) / LINE * LINE); }

void release(void *memory) { free(memory); }

#ifdef __linux__

#ifndef MADV_WIPEONFORK /* younger than the headers that wheels are built with */
#define MADV_WIPEONFORK 18
#define MADV_KEEPONFORK 19
#endif

/* Whether a page is private memory of this process: of such alone Linux takes this advice (madvise(2)). */
static int is_private(void *page, size_t size) {
  if (madvise(page, size, MADV_WIPEONFORK) != 0) return 0;
  (void)madvise(page, size, MADV_KEEPONFORK);
  return 1;
}

/* Linux loses what private memory holds, so it stays as it is, and so does all where Linux is too old to tell. */
static int may_drop(void *memory, size_t page) {
  void *own = aligned_alloc(page, page);
  const int tells = own != NULL && is_private(own, page);
  free(own);
  return tells && !is_private(memory, page);
}

#else

/* macOS keeps the contents of any memory that is not needed: MADV_FREE alone loses them (madvise(2)). */
static int may_drop(void *memory, size_t page) { return (void)memory, (void)page, 1; }

#endif

void drop_pages(const void *bytes, size_t size) {
  const size_t page = (size_t)sysconf(_SC_PAGESIZE);
  const Pages pages = whole_pages(bytes, size, page);
  if (pages.size != 0 && may_drop(pages.from, page)) (void)madvise(pages.from, pages.size, MADV_DONTNEED);
}

#endif
