/* Attention of ONNX Runtime sessions on x86-64 processors, of embedge's graphs of integer matmuls,

       y[i] = sum over j of softmax over j of (scale * q[i] . k[j]) * v[j],

   for each head of each text; `heads / kv_heads` query heads read one head of keys and values. The tokens j are
   max(0, i - window + 1) .. i in the function CausalAttention, those before the text's padding in
   PaddedAttention, and all in FullAttention.

   Keys and values are read block by block with a running maximum and sum, so that no memory grows with the square
   of the tokens (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022,
   "FlashAttention"). Blocks are counted from the first token: a row's result depends on no token that it does
   not see, and on no other text. What is not finite in a value is the exception. It reaches rows that do not see
   it: those of the same tile, and the text whose odd length it follows. Rows are multiplied in tiles of 12 by 32
   keys or by 32 values of a head.

   Both matmuls take bfloat16 where the processor multiplies it (AVX512-BF16), else float32; maxima, sums and
   results are float32. An operand lies in units of 32 bits, one float32 or two bfloat16, so that all but
   attention_typed.h is the same for both. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"

typedef struct {
  const OrtApi *api;
  const Typed *typed;
  int64_t heads, kv_heads, window;
  float scale;
  int causal, padded;
} Kernel;

enum {
  PACKED_KEYS = 128, /* of a task */
  ENOUGH_HEADS = 8,  /* for a task each, of short texts */
  MANY_HEADS = 32,   /* for a task each, of any */
  SHORT_TEXT = 2 * BLOCK_ROWS,
  HEAD_BYTES = 256 << 10, /* of keys and values that stay in a core's cache */
  SMALL = 1 << 20,        /* multiplications that are not worth a second thread */
};

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static inline int64_t key_units(const Attention *a) { return a->padded * a->units; }
static inline int64_t value_units(const Attention *a) { return a->panels * LANES * (a->padded / a->typed->per_unit); }

/* ---- Rows ---- */

/* The tokens that a row sees. */
typedef struct {
  int64_t first, end;
} Seen;

static inline Seen seen_by(const Attention *a, int64_t text, int64_t row) {
  if (a->causal) return (Seen){a->window > 0 ? most(0, row - a->window + 1) : 0, row + 1};
  return (Seen){0, a->lengths == NULL ? a->tokens : most(0, least(a->lengths[text], a->tokens))};
}

/* What a task works in. */
typedef struct {
  Packed packed;     /* of its head */
  uint32_t *q;       /* [BLOCK_ROWS, units] */
  float *scores;     /* [TILE_ROWS, BLOCK_KEYS] */
  uint32_t *weights; /* the same as units */
  float *result;     /* [BLOCK_ROWS, panels * 16] */
  Running running[BLOCK_ROWS];
} Scratch;

/* Adds to what rows first .. first + rows of the block at row0 have taken what they take from a block of keys. */
static void run_tile(const Attention *a, Scratch *s, int64_t text, int64_t row0, int64_t first, int rows,
                     int64_t block) {
  const Typed *typed = a->typed;
  const int64_t per_unit = typed->per_unit, row = row0 + first;
  const int64_t lowest = seen_by(a, text, row).first, highest = seen_by(a, text, row + rows - 1).end;
  const int64_t begin = most(block, lowest) / KEY_STEP * KEY_STEP, end = least(block + BLOCK_KEYS, highest);
  if (begin >= end) return;
  const int64_t padded_rows = up_to(rows, 4), steps_end = up_to(end, per_unit);
  for (int64_t key = begin; key < end; key += KEY_STEP)
    typed->tile(s->q + first * a->units, a->units, s->packed.keys + key * a->units, a->units * LANES, a->units,
                s->scores + (key - block), BLOCK_KEYS, NULL, (int)padded_rows, TILE_PANELS);
  float keep[TILE_ROWS] = {0};
  const int starts = begin <= lowest; /* no key of these rows comes before */
  for (int i = 0; i < rows; i++) {
    const Seen seen = seen_by(a, text, row + i);
    const int64_t from = most(begin, seen.first), to = least(end, seen.end);
    keep[i] = typed->weigh(s->scores + i * BLOCK_KEYS, begin - block, from - block, to - block, steps_end - block,
                           &s->running[first + i], s->weights + i * (BLOCK_KEYS / per_unit));
  }
  const int64_t stored = a->padded / per_unit * LANES; /* units of a panel of values */
  for (int64_t panel = 0; panel < a->panels; panel += TILE_PANELS)
    typed->tile(s->weights + (begin - block) / per_unit, BLOCK_KEYS / per_unit,
                s->packed.values + panel * stored + begin / per_unit * LANES, stored, (steps_end - begin) / per_unit,
                s->result + first * a->panels * LANES + panel * LANES, a->panels * LANES, starts ? NULL : keep,
                (int)padded_rows, (int)least(TILE_PANELS, a->panels - panel));
}

/* Some rows of one head of one text. */
static void attend(const Attention *a, Scratch *s, int64_t text, int64_t head, int64_t block) {
  const int64_t row0 = block * BLOCK_ROWS, rows = least(BLOCK_ROWS, a->tokens - row0);
  const int64_t step = a->heads * a->size, width = a->panels * LANES;
  const int64_t at = (text * a->tokens + row0) * step + head * a->size;
  const int64_t lowest = seen_by(a, text, row0).first, highest = seen_by(a, text, row0 + rows - 1).end;
  for (int64_t i = 0; i < rows; i++) s->running[i] = (Running){-INFINITY, 0};
  a->typed->pack_rows(a, a->q + at, rows, s->q);
  if (lowest >= highest) memset(s->result, 0, (size_t)(rows * width) * sizeof *s->result);
  for (int64_t key = lowest / BLOCK_KEYS * BLOCK_KEYS; key < highest; key += BLOCK_KEYS)
    for (int64_t first = 0; first < rows; first += TILE_ROWS)
      run_tile(a, s, text, row0, first, (int)least(TILE_ROWS, rows - first), key);
  for (int64_t i = 0; i < rows; i++)
    a->typed->store_row(s->result + i * width, s->running[i].sum, a->size, a->y + at + i * step);
}

/* ---- Tasks ---- */

static Packed packed_in(uint32_t *units, const Attention *a, int64_t heads) {
  return (Packed){units, units + heads * key_units(a)};
}

/* With room for the keys and values of a head, or without. */
static Scratch *new_scratch(Attention *a, int64_t heads) {
  const int64_t q = up_to(BLOCK_ROWS * a->units, LANES), tile = TILE_ROWS * BLOCK_KEYS;
  const int64_t result = BLOCK_ROWS * a->panels * LANES, head = up_to(sizeof(Scratch), LINE);
  const int64_t units = q + 2 * tile + result + heads * (key_units(a) + value_units(a));
  Scratch *s = allocate((size_t)(head + 4 * units));
  if (s == NULL) {
    __atomic_store_n(&a->failed, 1, __ATOMIC_RELAXED);
    return NULL;
  }
  s->scores = (float *)((char *)s + head);
  s->weights = (uint32_t *)(s->scores + tile);
  s->result = (float *)(s->weights + tile);
  s->q = (uint32_t *)(s->result + result);
  s->packed = packed_in(s->q + q, a, 1);
  return s;
}

/* All that reads one head of keys and values, which no other task needs. */
static void head_task(void *data, size_t index) {
  Attention *a = data;
  const int64_t kv = (int64_t)index, text = kv / a->kv_heads, group = a->heads / a->kv_heads;
  Scratch *s = new_scratch(a, 1);
  if (s == NULL) return;
  a->typed->pack(a, kv, 0, a->padded, s->packed);
  for (int64_t head = kv % a->kv_heads * group, end = head + group; head < end; head++)
    for (int64_t block = 0; block < a->row_blocks; block++) attend(a, s, text, head, block);
  release(s);
}

static Packed packed_of(const Attention *a, int64_t kv) {
  return (Packed){a->packed.keys + kv * key_units(a), a->packed.values + kv * value_units(a)};
}

static void keys_task(void *data, size_t index) {
  const Attention *a = data;
  const int64_t kv = (int64_t)index / a->key_tasks, from = (int64_t)index % a->key_tasks * PACKED_KEYS;
  a->typed->pack(a, kv, from, least(from + PACKED_KEYS, a->padded), packed_of(a, kv));
}

/* Some rows of one head of one text. Those with the most keys come first. */
static void rows_task(void *data, size_t index) {
  Attention *a = data;
  const int64_t heads = a->texts * a->heads, block = a->row_blocks - 1 - (int64_t)index / heads;
  const int64_t text = (int64_t)index % heads / a->heads, head = (int64_t)index % a->heads;
  Scratch *s = new_scratch(a, 0);
  if (s == NULL) return;
  s->packed = packed_of(a, text * a->kv_heads + head / (a->heads / a->kv_heads));
  attend(a, s, text, head, block);
  release(s);
}

/* ---- The operator ---- */

void destroy_attention(void *kernel) { free(kernel); }

OrtStatus *create_attention(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  const Operator *known = (const Operator *)op;
  const int causal = known->inputs == 5, padded = known->inputs == 4;
  int64_t heads = 0, kv_heads = 0, window = 0;
  float scale = 0;
  OrtStatus *status = api->KernelInfoGetAttribute_int64(info, "num_heads", &heads);
  if (known->inputs == 3) kv_heads = heads;
  else if (status == NULL) status = api->KernelInfoGetAttribute_int64(info, "kv_num_heads", &kv_heads);
  if (status == NULL && causal) status = api->KernelInfoGetAttribute_int64(info, "local_window_size", &window);
  if (status == NULL) status = api->KernelInfoGetAttribute_float(info, "scale", &scale);
  if (status != NULL) return status;
  if (heads < 1 || kv_heads < 1 || heads % kv_heads != 0)
    return invalid(api, "embedge attention: the heads are no multiple of those of keys and values");
  Kernel *kernel = malloc(sizeof *kernel);
  if (kernel == NULL) return api->CreateStatus(ORT_FAIL, "embedge attention: out of memory");
  kernel->api = api;
  kernel->typed = isa_in_use()->attention(known->floats);
  kernel->heads = heads;
  kernel->kv_heads = kv_heads;
  kernel->window = window < 0 ? 0 : window;
  kernel->scale = scale;
  kernel->causal = causal;
  kernel->padded = padded;
  *out = kernel;
  return NULL;
}

static OrtStatus *run(const OrtApi *api, OrtKernelContext *context, Attention *a) {
  const int64_t kvs = a->texts * a->kv_heads;
  a->units = up_to(a->size, a->typed->per_unit) / a->typed->per_unit;
  a->panels = up_to(a->size, LANES) / LANES;
  a->padded = up_to(a->tokens, KEY_STEP);
  a->row_blocks = up_to(a->tokens, BLOCK_ROWS) / BLOCK_ROWS;
  a->key_tasks = up_to(a->padded, PACKED_KEYS) / PACKED_KEYS;
  const int64_t head = key_units(a) + value_units(a);
  const int small = a->texts * a->heads * a->padded * a->padded * a->size < SMALL;
  OrtStatus *status = NULL;
  const int64_t enough = a->tokens <= SHORT_TEXT ? ENOUGH_HEADS : MANY_HEADS;
  if (small || (kvs >= enough && 4 * head <= HEAD_BYTES)) {
    status = run_tasks(api, context, head_task, (size_t)kvs, small, a);
  } else {
    uint32_t *units = allocate((size_t)(kvs * head) * sizeof *units);
    if (units == NULL) return api->CreateStatus(ORT_FAIL, "embedge attention: out of memory");
    a->packed = packed_in(units, a, kvs);
    status = run_tasks(api, context, keys_task, (size_t)(kvs * a->key_tasks), 0, a);
    const int64_t tasks = a->texts * a->heads * a->row_blocks;
    if (status == NULL) status = run_tasks(api, context, rows_task, (size_t)tasks, 0, a);
    release(units);
  }
  if (status == NULL && a->failed) status = api->CreateStatus(ORT_FAIL, "embedge attention: out of memory");
  return status;
}

/* CausalAttention(q, k, v, lengths, total), PaddedAttention(q, k, v, lengths) and FullAttention(q, k, v) -> y. What
   the causal one's `lengths` and `total` say is that all texts are as long as q. */
OrtStatus *compute_attention(void *data, OrtKernelContext *context) {
  const Kernel *kernel = data;
  const OrtApi *api = kernel->api;
  Tensor q, k, v, lengths = {0};
  OrtStatus *status = read_input(api, context, 0, &q);
  if (status == NULL) status = read_input(api, context, 1, &k);
  if (status == NULL) status = read_input(api, context, 2, &v);
  if (status == NULL && kernel->padded) status = read_input(api, context, 3, &lengths);
  if (status != NULL) return status;
  if (q.rank != 3 || k.rank != 3 || v.rank != 3 || q.dims[2] % kernel->heads != 0)
    return invalid(api, "embedge attention: expected three dimensions, the last one of whole heads");
  const int64_t size = q.dims[2] / kernel->heads;
  for (int i = 0; i < 3; i++) {
    const int64_t expected = i == 2 ? size * kernel->kv_heads : q.dims[i];
    if (k.dims[i] != expected || v.dims[i] != expected)
      return invalid(api, "embedge attention: queries, keys and values differ in texts, tokens or the size of a head");
  }
  if (kernel->padded && lengths.elements != q.dims[0])
    return invalid(api, "embedge attention: expected a length for each text");
  void *y = NULL;
  if ((status = make_output(api, context, 0, q.dims, q.rank, &y)) != NULL) return status;
  if (q.elements == 0) return NULL;
  Attention attention = {.typed = kernel->typed,
                         .q = q.data,
                         .k = k.data,
                         .v = v.data,
                         .lengths = lengths.data,
                         .y = y,
                         .scale = kernel->scale,
                         .causal = kernel->causal,
                         .heads = kernel->heads,
                         .kv_heads = kernel->kv_heads,
                         .window = kernel->window,
                         .texts = q.dims[0],
                         .tokens = q.dims[1],
                         .size = size};
  return run(api, context, &attention);
}
