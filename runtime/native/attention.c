/* Causal attention of ONNX Runtime sessions on x86-64 processors with AVX512: the function CausalAttention of
   embedge's graphs of integer products,

       y[i] = sum over j of softmax over j of (scale * q[i] . k[j]) * v[j],  max(0, i - window + 1) <= j <= i,

   for each head of each text; `heads / kv_heads` query heads read one head of keys and values.

   Keys and values are read block by block with a running maximum and sum (Milakov and Gimelshein 2018,
   "Online normalizer calculation for softmax"; Dao et al. 2022, "FlashAttention"), so that no memory grows
   with the square of the tokens. Blocks are counted from the first token: a row's result depends on no
   later token, and on no other text. Rows are multiplied in tiles of 12 by 32 keys or by 32 values of a head.

   Both products take bfloat16 where the processor multiplies it (AVX512-BF16) and the session option
   "embedge.attention" is not "float32", else float32; maxima, sums and results are float32. An operand lies in units of 32 bits, one float32 or two bfloat16, so that all
   but attention_typed.h is the same for both. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

enum {
  TILE_ROWS = 12,
  TILE_PANELS = 2,
  BLOCK_ROWS = 96,  /* queries of a task */
  BLOCK_KEYS = 256, /* that pass over those rows while the cache holds them */
  KEY_STEP = TILE_PANELS * LANES,
};

typedef struct Attention Attention;

typedef struct {
  void (*pack)(const Attention *attention, int64_t head, int64_t from, int64_t to); /* keys and values */
  void (*pack_rows)(const Attention *attention, const float *q, int64_t rows, uint32_t *to);
  void (*pack_weights)(const float *weights, int64_t from, int64_t to, uint32_t *units);
  void (*tile)(const uint32_t *a, int64_t a_step, const uint32_t *b, int64_t b_panel, int64_t steps, float *c,
               int64_t c_step, const float *keep, int rows, int panels);
  int per_unit; /* values of a unit */
} Typed;

typedef struct {
  const OrtApi *api;
  const Typed *typed;
  int64_t heads, kv_heads, window; /* window: 0 for none */
  float scale;
} Kernel;

struct Attention {
  const Kernel *kernel;
  const float *q, *k, *v;
  float *y;
  int64_t texts, tokens, size; /* size: of a head */
  int64_t padded;              /* tokens, up to whole tiles */
  int64_t units, panels;       /* of a row of queries or keys; of a row of values */
  int64_t row_blocks, key_tasks;
  uint32_t *keys, *values;     /* [texts * kv_heads] of [padded / 16, units, 16] and [panels, padded / per_unit, 16] */
  int failed;
};

enum { PACKED_KEYS = 128 }; /* of a task */

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t up_to(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

static inline int64_t key_units(const Attention *a) { return a->padded * a->units; }
static inline int64_t value_units(const Attention *a) {
  return a->panels * LANES * (a->padded / a->kernel->typed->per_unit);
}

#define TYPED(name) name##_float32
#define TARGET AVX512
#define PER_UNIT 1
#include "attention_typed.h"
#undef TYPED
#undef TARGET
#undef PER_UNIT

#define TYPED(name) name##_bfloat16
#define TARGET AVX512_BF16
#define PER_UNIT 2
#include "attention_typed.h"

/* ---- Softmax ---- */

typedef struct {
  float top, sum; /* of the keys so far: the largest score, and the sum of 2^(score - top) */
} Running;

/* Scores from .. to of a row become weights, those of [begin, end) beside them zeros; what the row's result so
   far is to be multiplied by. */
static AVX512 float weigh(float *scores, int64_t begin, int64_t from, int64_t to, int64_t end, Running *running) {
  if (from >= to) {
    memset(scores + begin, 0, (size_t)(end - begin) * sizeof *scores);
    return 1;
  }
  memset(scores + begin, 0, (size_t)(from - begin) * sizeof *scores);
  memset(scores + to, 0, (size_t)(end - to) * sizeof *scores);
  __m512 largest = _mm512_set1_ps(running->top);
  for (int64_t j = from; j < to; j += LANES) {
    const __mmask16 mask = lanes_left(to - j);
    largest = _mm512_mask_max_ps(largest, mask, largest, _mm512_maskz_loadu_ps(mask, scores + j));
  }
  const float top = _mm512_reduce_max_ps(largest);
  const __m512 tops = _mm512_set1_ps(top);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = from; j < to; j += LANES) {
    const __mmask16 mask = lanes_left(to - j);
    const __m512 weight = power_of_2(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, scores + j), tops));
    sum = _mm512_mask_add_ps(sum, mask, sum, weight);
    _mm512_mask_storeu_ps(scores + j, mask, weight);
  }
  const float keep = running->top == -INFINITY ? 0 : _mm512_cvtss_f32(power_of_2(_mm512_set1_ps(running->top - top)));
  running->sum = running->sum * keep + _mm512_reduce_add_ps(sum);
  running->top = top;
  return keep;
}

/* ---- Rows ---- */

/* What a task works in. */
typedef struct {
  uint32_t *q;      /* [BLOCK_ROWS, units] */
  float *scores;    /* [TILE_ROWS, BLOCK_KEYS] */
  uint32_t *weights; /* the same as units */
  float *result;    /* [BLOCK_ROWS, panels * 16] */
  Running running[BLOCK_ROWS];
} Scratch;

/* Adds what rows first .. first + rows take from a block of keys. `started`: the result holds what came before. */
static void run_tile(const Attention *a, const Scratch *s, Running *running, int64_t kv, int64_t first, int rows,
                     int64_t row0, int64_t block, int64_t block_end) {
  const Kernel *kernel = a->kernel;
  const Typed *typed = kernel->typed;
  const int64_t per_unit = typed->per_unit, window = kernel->window;
  const int64_t row = row0 + first;
  const int64_t lowest = window > 0 ? most(0, row - window + 1) : 0, highest = least(row + rows, a->tokens);
  const int64_t begin = most(block, lowest) / KEY_STEP * KEY_STEP, end = least(block_end, highest);
  if (begin >= end) return;
  const int64_t padded_rows = up_to(rows, 4), steps_end = up_to(end, per_unit);
  const uint32_t *keys = a->keys + kv * key_units(a), *values = a->values + kv * value_units(a);
  for (int64_t key = begin; key < end; key += KEY_STEP)
    typed->tile(s->q + first * a->units, a->units, keys + key * a->units, a->units * LANES, a->units,
                s->scores + (key - block), BLOCK_KEYS, NULL, (int)padded_rows, TILE_PANELS);
  float keep[TILE_ROWS] = {0};
  const int starts = begin <= lowest; /* no key of these rows comes before */
  for (int i = 0; i < rows; i++) {
    float *scores = s->scores + i * BLOCK_KEYS;
    const int64_t from = most(begin, window > 0 ? row + i - window + 1 : 0), to = least(end, row + i + 1);
    keep[i] = weigh(scores, begin - block, from - block, to - block, steps_end - block, &running[first + i]);
    typed->pack_weights(scores, begin - block, steps_end - block, s->weights + i * (BLOCK_KEYS / per_unit));
  }
  const int64_t stored = a->padded / per_unit * LANES; /* units of a panel of values */
  for (int64_t panel = 0; panel < a->panels; panel += TILE_PANELS)
    typed->tile(s->weights + (begin - block) / per_unit, BLOCK_KEYS / per_unit,
                values + panel * stored + begin / per_unit * LANES, stored, (steps_end - begin) / per_unit,
                s->result + first * a->panels * LANES + panel * LANES, a->panels * LANES, starts ? NULL : keep,
                (int)padded_rows, (int)least(TILE_PANELS, a->panels - panel));
}

static AVX512 void store_row(const float *result, float sum, int64_t size, float *y) {
  const __m512 sums = _mm512_set1_ps(sum);
  for (int64_t d = 0; d < size; d += LANES) {
    const __mmask16 mask = lanes_left(size - d);
    _mm512_mask_storeu_ps(y + d, mask, _mm512_div_ps(_mm512_loadu_ps(result + d), sums));
  }
}

static Scratch *new_scratch(const Attention *a) {
  const size_t q = BLOCK_ROWS * (size_t)a->units, tile = TILE_ROWS * BLOCK_KEYS;
  const size_t result = BLOCK_ROWS * (size_t)a->panels * LANES, head = (sizeof(Scratch) + LINE - 1) / LINE * LINE;
  Scratch *s = allocate(head + 4 * (up_to((int64_t)q, LANES) + 2 * tile + result));
  if (s == NULL) return NULL;
  s->scores = (float *)((char *)s + head);
  s->weights = (uint32_t *)(s->scores + tile);
  s->result = (float *)(s->weights + tile);
  s->q = (uint32_t *)(s->result + result);
  return s;
}

/* Rows of one head of one text. Those with the most keys come first. */
static void rows_task(void *data, size_t index) {
  Attention *a = data;
  const Kernel *kernel = a->kernel;
  const int64_t group = kernel->heads / kernel->kv_heads, heads = a->texts * kernel->heads;
  const int64_t block = a->row_blocks - 1 - (int64_t)index / heads, of_text = (int64_t)index % heads;
  const int64_t text = of_text / kernel->heads, head = of_text % kernel->heads;
  const int64_t row0 = block * BLOCK_ROWS, rows = least(BLOCK_ROWS, a->tokens - row0);
  Scratch *s = new_scratch(a);
  if (s == NULL) {
    __atomic_store_n(&a->failed, 1, __ATOMIC_RELAXED);
    return;
  }
  for (int64_t i = 0; i < rows; i++) s->running[i] = (Running){-INFINITY, 0};
  const int64_t at = ((text * a->tokens + row0) * kernel->heads + head) * a->size;
  kernel->typed->pack_rows(a, a->q + at, rows, s->q);
  const int64_t kv = text * kernel->kv_heads + head / group;
  const int64_t lowest = kernel->window > 0 ? most(0, row0 - kernel->window + 1) : 0;
  for (int64_t key = lowest / BLOCK_KEYS * BLOCK_KEYS; key < row0 + rows; key += BLOCK_KEYS)
    for (int64_t first = 0; first < rows; first += TILE_ROWS)
      run_tile(a, s, s->running, kv, first, (int)least(TILE_ROWS, rows - first), row0, key, key + BLOCK_KEYS);
  for (int64_t i = 0; i < rows; i++)
    store_row(s->result + i * a->panels * LANES, s->running[i].sum, a->size, a->y + at + i * kernel->heads * a->size);
  free(s);
}

static void keys_task(void *data, size_t index) {
  const Attention *a = data;
  const int64_t kv = (int64_t)index / a->key_tasks, from = (int64_t)index % a->key_tasks * PACKED_KEYS;
  a->kernel->typed->pack(a, kv, from, least(from + PACKED_KEYS, a->padded));
}

/* ---- The operator ---- */

void destroy_attention(void *kernel) { free(kernel); }

OrtStatus *create_attention(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  int64_t heads = 0, kv_heads = 0, window = 0;
  float scale = 0;
  OrtStatus *status = api->KernelInfoGetAttribute_int64(info, "num_heads", &heads);
  if (status == NULL) status = api->KernelInfoGetAttribute_int64(info, "kv_num_heads", &kv_heads);
  if (status == NULL) status = api->KernelInfoGetAttribute_int64(info, "local_window_size", &window);
  if (status == NULL) status = api->KernelInfoGetAttribute_float(info, "scale", &scale);
  if (status != NULL) return status;
  if (heads < 1 || kv_heads < 1 || heads % kv_heads != 0)
    return invalid(api, "embedge attention: the heads are no multiple of those of keys and values");
  Kernel *kernel = malloc(sizeof *kernel);
  if (kernel == NULL) return api->CreateStatus(ORT_FAIL, "embedge attention: out of memory");
  __builtin_cpu_init();
  kernel->api = api;
  kernel->typed = __builtin_cpu_supports("avx512bf16") && !((const Operator *)op)->floats ? &typed_bfloat16 : &typed_float32;
  kernel->heads = heads;
  kernel->kv_heads = kv_heads;
  kernel->window = window < 0 ? 0 : window;
  kernel->scale = scale;
  *out = kernel;
  return NULL;
}

static OrtStatus *run(const OrtApi *api, OrtKernelContext *context, Attention *a) {
  const Kernel *kernel = a->kernel;
  const int64_t kvs = a->texts * kernel->kv_heads;
  a->units = up_to(a->size, kernel->typed->per_unit) / kernel->typed->per_unit;
  a->panels = up_to(a->size, LANES) / LANES;
  a->padded = up_to(a->tokens, KEY_STEP);
  a->row_blocks = up_to(a->tokens, BLOCK_ROWS) / BLOCK_ROWS;
  a->key_tasks = up_to(a->padded, PACKED_KEYS) / PACKED_KEYS;
  a->keys = allocate((size_t)(kvs * key_units(a)) * sizeof *a->keys);
  a->values = allocate((size_t)(kvs * value_units(a)) * sizeof *a->values);
  OrtStatus *status = NULL;
  if (a->keys == NULL || a->values == NULL) {
    a->failed = 1;
  } else {
    const int small = a->texts * kernel->heads * a->padded * a->padded * a->size < 1 << 20;
    status = run_tasks(api, context, keys_task, (size_t)(kvs * a->key_tasks), small, a);
    const int64_t tasks = a->texts * kernel->heads * a->row_blocks;
    if (status == NULL) status = run_tasks(api, context, rows_task, (size_t)tasks, small, a);
  }
  free(a->keys);
  free(a->values);
  if (status == NULL && a->failed) status = api->CreateStatus(ORT_FAIL, "embedge attention: out of memory");
  return status;
}

/* CausalAttention(q, k, v, lengths, total) -> y; all texts are as long as q, what `lengths` and `total` say. */
OrtStatus *compute_attention(void *data, OrtKernelContext *context) {
  const Kernel *kernel = data;
  const OrtApi *api = kernel->api;
  Tensor q, k, v;
  OrtStatus *status = read_input(api, context, 0, &q);
  if (status == NULL) status = read_input(api, context, 1, &k);
  if (status == NULL) status = read_input(api, context, 2, &v);
  if (status != NULL) return status;
  if (q.rank != 3 || k.rank != 3 || v.rank != 3 || q.dims[2] % kernel->heads != 0)
    return invalid(api, "embedge attention: expected three dimensions, the last one of whole heads");
  const int64_t size = q.dims[2] / kernel->heads;
  for (int i = 0; i < 3; i++) {
    const int64_t expected = i == 2 ? size * kernel->kv_heads : q.dims[i];
    if (k.dims[i] != expected || v.dims[i] != expected)
      return invalid(api, "embedge attention: queries, keys and values differ in texts, tokens or the size of a head");
  }
  void *y = NULL;
  if ((status = make_output(api, context, 0, q.dims, q.rank, &y)) != NULL) return status;
  if (q.elements == 0) return NULL;
  Attention attention = {.kernel = kernel,
                         .q = q.data,
                         .k = k.data,
                         .v = v.data,
                         .y = y,
                         .texts = q.dims[0],
                         .tokens = q.dims[1],
                         .size = size};
  return run(api, context, &attention);
}
