/* Matmuls of floats and 4-bit weights: com.microsoft.MatMulNBits at accuracy level 4, for processors with
   AVX512-VNNI.

   A row of the left side is quantized to int8 block by block, as ONNX Runtime does at this level, and

       y[m, n] = sum over blocks of (sum over k of a[m, k] * (b[n, k] - zero[n, block]))
                                    * a_scale[m, block] * scale[n, block]

   with the inner sum in integers. ONNX Runtime adds the blocks in another order, so the last bits of a float
   differ. Here a row's result does not depend on the rows beside it.

   A line of weights is unpacked once for all rows of a strip, and multiplied at once: what is read from memory are
   4 bits. Weights lie in panels of 16 columns, [columns / 16, depth / 8, 16, 4] bytes. Of 8 values along the depth
   the first four are the low halves of 4 bytes, the others the high ones. README.md has a drawing. */

#include <stdlib.h>
#include <string.h>

#include "kernels.h"

enum { ROWS = 8, PANELS = 2, GROUP = 8 }; /* of a tile; GROUP: values of a column in a line */
enum { A, B, SCALES, ZERO_POINTS, GROUPS, BIAS };

#define NO_ZERO_POINT 8 /* what is subtracted where there are none */

typedef struct {
  const OrtApi *api;
  int64_t depth, columns, block, blocks; /* blocks of a column */
  int64_t lines;                         /* of a block in a panel */
  const uint8_t *panels;
  uint8_t *owned;
  float *scales;  /* [panels, blocks, 16] */
  uint8_t *zeros; /* likewise */
  int with_zeros; /* whether the operator has constant zero points */
} Kernel;

typedef struct {
  const Kernel *kernel;
  const float *a, *bias; /* bias: null for none; ONNX Runtime puts the one that is added behind into the operator */
  float *y;
  int8_t *values;  /* [rows, blocks * block] */
  float *a_scales; /* [rows, blocks, 2]: scale, and scale times the sum of the values */
} MatMul;

typedef struct {
  const int8_t *a;
  const float *a_scales;
  const uint8_t *b, *next;
  int64_t next_step;
  const float *scales, *bias;
  const uint8_t *zeros;
  float *y;
} Tile;

static inline __attribute__((always_inline)) AVX512 void run_tile(const MatMul *p, const Tile *t, const int rows,
                                                                  const int panels, __mmask16 last) {
  const Kernel *kernel = p->kernel;
  const int64_t width = kernel->blocks * kernel->block, panel = kernel->blocks * kernel->lines * LINE;
  const __m512i low = _mm512_set1_epi8(15);
  __m512 total[ROWS][PANELS];
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
    for (int j = 0; j < panels; j++) total[i][j] = _mm512_setzero_ps();

  const uint8_t *line = t->b, *next = t->next;
  const int8_t *a = t->a;
  for (int64_t block = 0; block < kernel->blocks; block++) {
    __m512i sum[ROWS][PANELS];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
      for (int j = 0; j < panels; j++) sum[i][j] = _mm512_setzero_si512();
    for (int64_t k = 0; k < kernel->lines; k++) {
      __m512i first[PANELS], second[PANELS];
      _mm_prefetch((const char *)next, _MM_HINT_T1);
      next += t->next_step;
#pragma GCC unroll 2
      for (int j = 0; j < panels; j++) {
        const __m512i both = _mm512_loadu_si512(line + j * panel);
        first[j] = _mm512_and_si512(both, low);
        second[j] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
      }
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++) {
        int32_t four[2];
        memcpy(four, a + i * width, sizeof four);
        const __m512i a0 = _mm512_set1_epi32(four[0]), a1 = _mm512_set1_epi32(four[1]);
#pragma GCC unroll 2
        for (int j = 0; j < panels; j++) {
          sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], first[j], a0);
          sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], second[j], a1);
        }
      }
      line += LINE;
      a += GROUP;
    }
#pragma GCC unroll 2
    for (int j = 0; j < panels; j++) {
      const int64_t at = (j * kernel->blocks + block) * LANES;
      const __m512 scale = _mm512_loadu_ps(t->scales + at);
      const __m128i zeros = _mm_loadu_si128((const __m128i *)(t->zeros + at));
      const __m512 zero = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(zeros)));
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++) {
        const float *of_row = t->a_scales + (i * kernel->blocks + block) * 2;
        const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[i][j]), _mm512_set1_ps(of_row[0]));
        total[i][j] = _mm512_fmadd_ps(scaled, scale, total[i][j]);
        total[i][j] = _mm512_fnmadd_ps(_mm512_set1_ps(of_row[1]), zero, total[i][j]);
      }
    }
  }
#pragma GCC unroll 2
  for (int j = 0; j < panels; j++) {
    const __mmask16 mask = j == panels - 1 ? last : (__mmask16)0xffff;
    const __m512 bias = t->bias == NULL ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, t->bias + j * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
      _mm512_mask_storeu_ps(t->y + i * kernel->columns + j * LANES, mask, _mm512_add_ps(total[i][j], bias));
  }
}

typedef void (*RunTile)(const MatMul *, const Tile *, __mmask16);
#define TILE(rows, panels) \
  static AVX512 void tile_##rows##_##panels(const MatMul *p, const Tile *t, __mmask16 last) { \
    run_tile(p, t, rows, panels, last); \
  }
#define TILES(rows) TILE(rows, 1) TILE(rows, 2)
/* clang-format off */
TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6) TILES(7) TILES(8)
/* clang-format on */
#define NAMES(rows) {tile_##rows##_1, tile_##rows##_2}
    static const RunTile RUN_TILE[ROWS][PANELS] = {NAMES(1), NAMES(2), NAMES(3), NAMES(4),
                                                   NAMES(5), NAMES(6), NAMES(7), NAMES(8)};

static void run_strip(const void *matmul, const Strip *s) {
  const MatMul *p = matmul;
  const Kernel *kernel = p->kernel;
  const int64_t width = kernel->blocks * kernel->block, panel = kernel->blocks * kernel->lines * LINE;
  const uint8_t *b = kernel->panels + s->column / LANES * panel;
  const Tile tile = {
      .a = p->values + s->row * width,
      .a_scales = p->a_scales + s->row * kernel->blocks * 2,
      .b = b,
      .next = s->next < 0 ? b : kernel->panels + s->next * panel,
      .next_step = s->next < 0 ? 0 : LINE,
      .scales = kernel->scales + s->column * kernel->blocks,
      .bias = p->bias == NULL ? NULL : p->bias + s->column,
      .zeros = kernel->zeros + s->column * kernel->blocks,
      .y = p->y + s->row * kernel->columns + s->column,
  };
  RUN_TILE[s->rows - 1][s->panels - 1](p, &tile, s->last);
}

/* A block of a row to int8: round(a / scale), scale = max |a| / 127. */
static AVX512 void quantize_block(const float *a, int64_t count, int64_t block, int8_t *values, float *scales) {
  const float peak = peak_of(a, count), scale = peak / 127.0f;
  const __m512 inverse = _mm512_set1_ps(peak != 0 ? 127.0f / peak : 0.0f);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < block; i += LANES) {
    const __m512 x = _mm512_maskz_loadu_ps(lanes_left(count - i), a + i);
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
    sum = _mm512_add_epi32(sum, q);
    _mm_storeu_si128((__m128i *)(values + i), _mm512_cvtsepi32_epi8(q));
  }
  scales[0] = scale;
  scales[1] = scale * (float)_mm512_reduce_add_epi32(sum);
}

static void quantize_task(void *data, size_t row) {
  const MatMul *p = data;
  const Kernel *kernel = p->kernel;
  for (int64_t block = 0; block < kernel->blocks; block++) {
    const int64_t from = block * kernel->block, left = kernel->depth - from;
    quantize_block(p->a + (int64_t)row * kernel->depth + from, left < kernel->block ? left : kernel->block,
                   kernel->block, p->values + ((int64_t)row * kernel->blocks + block) * kernel->block,
                   p->a_scales + ((int64_t)row * kernel->blocks + block) * 2);
  }
}

/* ---- Weights ---- */

/* ONNX Runtime's [columns, blocks, block / 2], two neighbours along the depth in a byte, into panels. */
static void pack(Kernel *kernel, const uint8_t *b) {
  const int64_t bytes = kernel->blocks * kernel->block / 2, lines = kernel->blocks * kernel->lines;
  for (int64_t column = 0; column < kernel->columns; column++) {
    const uint8_t *from = b + column * bytes;
    uint8_t *to = kernel->owned + column / LANES * lines * LINE + column % LANES * 4;
    for (int64_t line = 0; line < lines; line++, from += 4, to += LINE) {
      to[0] = (uint8_t)((from[0] & 15) | (from[2] & 15) << 4);
      to[1] = (uint8_t)(from[0] >> 4 | (from[2] & 0xf0));
      to[2] = (uint8_t)((from[1] & 15) | (from[3] & 15) << 4);
      to[3] = (uint8_t)(from[1] >> 4 | (from[3] & 0xf0));
    }
  }
}

static void pack_scales(Kernel *kernel, const float *scales, const uint8_t *zero_points) {
  const int64_t blocks = kernel->blocks, bytes = (blocks + 1) / 2;
  for (int64_t column = 0; column < kernel->columns; column++)
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t at = (column / LANES * blocks + block) * LANES + column % LANES;
      kernel->scales[at] = scales[column * blocks + block];
      const uint8_t *pair = zero_points == NULL ? NULL : zero_points + column * bytes + block / 2;
      kernel->zeros[at] = pair == NULL ? NO_ZERO_POINT : block % 2 == 0 ? *pair & 15 : *pair >> 4;
    }
}

/* ---- The operator ---- */

void destroy_matmul_int4(void *data) {
  Kernel *kernel = data;
  if (kernel == NULL) return;
  free(kernel->owned);
  free(kernel->scales);
  free(kernel->zeros);
  free(kernel);
}

OrtStatus *create_matmul_int4(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  int64_t depth = 0, columns = 0, bits = 0, block = 0, level = 0;
  OrtStatus *status = api->KernelInfoGetAttribute_int64(info, "K", &depth);
  if (status == NULL) status = api->KernelInfoGetAttribute_int64(info, "N", &columns);
  if (status == NULL) status = api->KernelInfoGetAttribute_int64(info, "bits", &bits);
  if (status == NULL) status = api->KernelInfoGetAttribute_int64(info, "block_size", &block);
  if (status == NULL) status = api->KernelInfoGetAttribute_int64(info, "accuracy_level", &level);
  if (status != NULL) return status;
  if (bits != 4 || level != 4 || block < LANES || block % LANES != 0 || block > INT32_MAX || depth < 1 ||
      depth > INT32_MAX || columns < 1 || columns > INT32_MAX)
    return invalid(api, "embedge matmul: expected 4 bits, accuracy level 4 and blocks of 16 or more");
  const int64_t blocks = (depth + block - 1) / block, panels = (columns + LANES - 1) / LANES;
  Tensor b, scales, zero_points;
  if ((status = read_constant(api, info, B, &b)) != NULL) return status;
  if ((status = read_constant(api, info, SCALES, &scales)) != NULL) return status;
  if ((status = read_constant(api, info, ZERO_POINTS, &zero_points)) != NULL) return status;
  if (b.elements != columns * blocks * block / 2 || scales.elements != columns * blocks)
    return invalid(api, "embedge matmul: 4-bit weights and scales have to be constants of their sizes");
  if (zero_points.data != NULL && zero_points.elements != columns * ((blocks + 1) / 2))
    return invalid(api, "embedge matmul: zero points of another size than 4-bit weights have");

  Kernel *kernel = calloc(1, sizeof *kernel);
  if (kernel == NULL) return api->CreateStatus(ORT_FAIL, "embedge matmul: out of memory");
  kernel->api = api;
  kernel->depth = depth;
  kernel->columns = columns;
  kernel->block = block;
  kernel->blocks = blocks;
  kernel->lines = block / GROUP;
  kernel->with_zeros = zero_points.data != NULL;
  const int stored = ((const Operator *)op)->panels && b.elements > SMALL_WEIGHT && columns % LANES == 0;
  const size_t lanes = (size_t)(panels * blocks * LANES), size = (size_t)(panels * blocks * kernel->lines * LINE);
  kernel->scales = allocate(lanes * sizeof(float));
  kernel->zeros = allocate(lanes);
  if (!stored) kernel->owned = allocate(size);
  if (kernel->scales == NULL || kernel->zeros == NULL || (!stored && kernel->owned == NULL)) {
    destroy_matmul_int4(kernel);
    return api->CreateStatus(ORT_FAIL, "embedge matmul: out of memory for a weight");
  }
  memset(kernel->scales, 0, lanes * sizeof(float)); /* columns that fill up the last panel */
  memset(kernel->zeros, 0, lanes);
  pack_scales(kernel, scales.data, zero_points.data);
  drop_pages(scales.data, (size_t)scales.elements * sizeof(float));
  if (zero_points.data != NULL) drop_pages(zero_points.data, (size_t)zero_points.elements);
  kernel->panels = stored ? b.data : kernel->owned;
  if (!stored) {
    memset(kernel->owned, 0, size);
    pack(kernel, b.data);
    drop_pages(b.data, (size_t)b.elements);
  }
  *out = kernel;
  return NULL;
}

OrtStatus *compute_matmul_int4(void *data, OrtKernelContext *context) {
  const Kernel *kernel = data;
  const OrtApi *api = kernel->api;
  Tensor a, zero_points, groups, bias;
  OrtStatus *status = read_input(api, context, A, &a);
  if (status == NULL) status = read_input(api, context, ZERO_POINTS, &zero_points);
  if (status == NULL) status = read_input(api, context, GROUPS, &groups);
  if (status == NULL) status = read_input(api, context, BIAS, &bias);
  if (status != NULL) return status;
  if (zero_points.data != NULL && !kernel->with_zeros)
    return invalid(api, "embedge matmul: zero points have to be constant");
  if (groups.data != NULL)
    return api->CreateStatus(ORT_NOT_IMPLEMENTED, "embedge matmul: g_idx, the order of columns, is not implemented");
  if (bias.data != NULL && bias.elements != kernel->columns)
    return invalid(api, "embedge matmul: expected a bias for each column");
  if (a.rank < 1 || a.dims[a.rank - 1] != kernel->depth)
    return invalid(api, "embedge matmul: rows and weight differ in depth");
  const int64_t rows = a.elements / kernel->depth, columns = kernel->columns;
  void *y = NULL;
  a.dims[a.rank - 1] = columns;
  if ((status = make_output(api, context, 0, a.dims, a.rank, &y)) != NULL) return status;
  if (rows == 0) return NULL;

  MatMul matmul = {.kernel = kernel, .a = a.data, .bias = bias.data, .y = y};
  matmul.values = allocate((size_t)(rows * kernel->blocks * kernel->block));
  matmul.a_scales = allocate((size_t)(rows * kernel->blocks * 2) * sizeof(float));
  if (matmul.values == NULL || matmul.a_scales == NULL) {
    status = api->CreateStatus(ORT_FAIL, "embedge matmul: out of memory for the rows");
  } else {
    Work work = {run_strip, &matmul, rows, kernel->depth, columns, PANELS, ROWS, 0, 0, 0};
    status = run_tasks(api, context, quantize_task, (size_t)rows, is_small(&work) || rows < 4, &matmul);
    if (status == NULL) status = run_work(api, context, &work);
  }
  free(matmul.values);
  free(matmul.a_scales);
  return status;
}
