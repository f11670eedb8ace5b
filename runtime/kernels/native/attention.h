/* What attention.c and the instruction sets share. */

#ifndef EMBEDGE_ATTENTION_H
#define EMBEDGE_ATTENTION_H

#include <math.h>

#include "isa.h"

enum {
  TILE_ROWS = 12,
  TILE_PANELS = 2,
  BLOCK_ROWS = 96,  /* queries of a task */
  BLOCK_KEYS = 256, /* that pass over those rows while the cache holds them */
  KEY_STEP = TILE_PANELS * LANES,
};

typedef struct Attention Attention;

/* Keys and values of a head: units [padded / 16, units, 16] and [panels, padded / per_unit, 16]. */
typedef struct {
  uint32_t *keys, *values;
} Packed;

typedef struct {
  float top, sum; /* of the keys so far: the largest score, and the sum of 2^(score - top) */
} Running;

/* What an instruction set does of it, in float32 or in bfloat16: attention_typed.h. */
typedef struct Typed {
  void (*pack)(const Attention *attention, int64_t head, int64_t from, int64_t to, Packed packed);
  void (*pack_rows)(const Attention *attention, const float *q, int64_t rows, uint32_t *to);
  float (*weigh)(const float *scores, int64_t begin, int64_t from, int64_t to, int64_t end, Running *running,
                 uint32_t *weights);
  void (*tile)(const uint32_t *a, int64_t a_step, const uint32_t *b, int64_t b_panel, int64_t steps, float *c,
               int64_t c_step, const float *keep, int rows, int panels);
  void (*store_row)(const float *result, float sum, int64_t size, float *y);
  int per_unit; /* values of a unit */
} Typed;

struct Attention {
  const Typed *typed;
  const float *q, *k, *v;
  const int64_t *lengths; /* of the texts, or null: as many as there are tokens */
  float *y;
  float scale;
  int causal;
  int64_t heads, kv_heads, window; /* window: 0 for none */
  int64_t texts, tokens, size;     /* size: of a head */
  int64_t padded;                  /* tokens, up to whole tiles */
  int64_t units, panels;           /* of a row of queries or keys; of a row of values */
  int64_t row_blocks, key_tasks;
  Packed packed; /* of all heads, where they are packed before */
  int failed;
};

static inline int64_t up_to(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

#endif
