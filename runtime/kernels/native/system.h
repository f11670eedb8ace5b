/* What differs by operating system: exported names and memory. */

#ifndef EMBEDGE_SYSTEM_H
#define EMBEDGE_SYSTEM_H

#include <stddef.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum { LINE = 64 }; /* bytes of a cache line */

/* Memory at a line's address, or null. Only release() frees it: on Windows free() cannot. */
void *allocate(size_t bytes);
void release(void *memory);

/* Takes what was copied from a mapped file out of this process; the system's cache keeps it, and it can be read as
   before. Memory that is no file's keeps its contents. */
void drop_pages(const void *bytes, size_t size);

#endif
