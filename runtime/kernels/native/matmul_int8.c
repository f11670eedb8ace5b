/* 8-bit matmuls of ONNX Runtime sessions on x86-64 processors with AVX512-VNNI.

   The kernel takes the place of ONNX Runtime's own for com.microsoft.MatMulIntegerToFloat in the sessions
   that it is registered in: the same operator, and the same result to the bit,

       y[m, n] = float(sum over k of (a[m, k] - a_zero_point) * b[k, n]) * b_scale[n] * a_scale[m],

   and it runs the functions MatMulIntegerToFloatAdd and ...Sub of embedge's graphs, which add or subtract a
   tensor of y's shape, or one value for each column.

   What differs from ONNX Runtime's kernel is the order of the work:

   * Weights are read once, in the order they lie in memory. All rows of the left side pass over a slab of
     48 columns while the cache holds it, and each pass fetches a part of the next slab. ONNX Runtime's
     kernel waits for memory in its first pass of 6 rows and computes in the others.
   * 24 accumulators (8 rows x 48 columns) are fed by 11 loads.
   * The scales are applied as the accumulators are stored; ONNX Runtime takes a pass of its own for the
     rows' ones, with one thread.

   Weights lie in panels of 16 columns, int8 [columns / 16, depth / 4, 16, 4]; one vpdpbusd multiplies a line of
   64 bytes. README.md has a drawing. The kernel makes this copy when the session opens. It need not where the
   session option "embedge.weights" is "panels": weights above 4096 bytes that fill their panels then lie like
   that already, under their shape [depth, columns]. */

#include <stdlib.h>
#include <string.h>

#include "kernels.h"

enum { ROWS = 8, PANELS = 3 }; /* of a tile */

enum { A, B, A_SCALE, B_SCALE }; /* inputs; then what is added, where it is, and the zero point */

typedef struct {
  const OrtApi *api;
  int with_added, subtracts;
  int64_t depth, columns; /* of the weight */
  int64_t lines;          /* of a panel: depth / 4, rounded up */
  const int8_t *panels;
  int8_t *owned; /* the panels, where they are a copy */
  int32_t *sums; /* of each column, [panels * 16] */
} Kernel;

typedef struct {
  const Kernel *kernel;
  const uint8_t *a;
  const float *a_scale, *b_scale, *added; /* added: null for none */
  float *y;
  int64_t a_scale_step, added_step;
  int32_t zero_point;
  int one_a_scale, one_b_scale; /* for all rows: multiplied with the columns' first, as ONNX Runtime does */
} MatMul;

/* ---- Tiles ---- */

typedef struct {
  const uint8_t *a; /* the first row, `depth` bytes apart */
  const int8_t *b;  /* the first panel, `lines` lines apart */
  const int8_t *next;
  int64_t next_step; /* bytes to fetch ahead a step: a line, or 0 */
  const int32_t *sums;
  const float *a_scale, *b_scale, *added;
  float *y;
} Tile;

/* y[rows, columns] of a tile; `last` are the columns of the last panel that exist. */
static inline __attribute__((always_inline)) AVX512 void run_tile(const MatMul *p, const Tile *t, const int rows,
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
    const __m512 scale =
        p->one_b_scale ? _mm512_set1_ps(*t->b_scale) : _mm512_maskz_loadu_ps(mask, t->b_scale + j * LANES);
    const __m512 scales = p->one_a_scale ? _mm512_mul_ps(_mm512_set1_ps(*p->a_scale), scale) : scale;
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum[i][j], shift)), scales);
      if (!p->one_a_scale) y = _mm512_mul_ps(y, _mm512_set1_ps(t->a_scale[i * p->a_scale_step]));
      if (t->added != NULL) {
        const __m512 added = _mm512_maskz_loadu_ps(mask, t->added + i * p->added_step + j * LANES);
        y = p->kernel->subtracts ? _mm512_sub_ps(y, added) : _mm512_add_ps(y, added);
      }
      _mm512_mask_storeu_ps(t->y + i * p->kernel->columns + j * LANES, mask, y);
    }
  }
}

typedef void (*RunTile)(const MatMul *, const Tile *, __mmask16);
#define TILE(rows, panels) \
  static AVX512 void tile_##rows##_##panels(const MatMul *p, const Tile *t, __mmask16 last) { \
    run_tile(p, t, rows, panels, last); \
  }
#define TILES(rows) TILE(rows, 1) TILE(rows, 2) TILE(rows, 3)
/* clang-format off */
TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6) TILES(7) TILES(8)
/* clang-format on */
#define NAMES(rows) {tile_##rows##_1, tile_##rows##_2, tile_##rows##_3}
    static const RunTile RUN_TILE[ROWS][PANELS] = {NAMES(1), NAMES(2), NAMES(3), NAMES(4),
                                                   NAMES(5), NAMES(6), NAMES(7), NAMES(8)};

static void run_strip(const void *matmul, const Strip *s) {
  const MatMul *p = matmul;
  const Kernel *kernel = p->kernel;
  const int64_t panel = kernel->lines * LINE;
  const int8_t *b = kernel->panels + s->column / LANES * panel;
  const Tile tile = {
      .a = p->a + s->row * kernel->depth,
      .b = b,
      .next = s->next < 0 ? b : kernel->panels + s->next * panel,
      .next_step = s->next < 0 ? 0 : LINE,
      .sums = kernel->sums + s->column,
      .a_scale = p->a_scale + s->row * p->a_scale_step,
      .b_scale = p->one_b_scale ? p->b_scale : p->b_scale + s->column,
      .added = p->added == NULL ? NULL : p->added + s->row * p->added_step + s->column,
      .y = p->y + s->row * kernel->columns + s->column,
  };
  RUN_TILE[s->rows - 1][s->panels - 1](p, &tile, s->last);
}

/* ---- Weights ---- */

/* Adds to sums[16] the four values of each column of a line. */
static AVX512 void add_line(int32_t *sums, const int8_t *line) {
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

/* ---- The operator ---- */

void destroy_matmul_int8(void *data) {
  Kernel *kernel = data;
  if (kernel == NULL) return;
  free(kernel->owned);
  free(kernel->sums);
  free(kernel);
}

OrtStatus *create_matmul_int8(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  const Operator *known = (const Operator *)op;
  Tensor b;
  OrtStatus *status = read_constant(api, info, B, &b);
  if (status != NULL) return status;
  if (b.data == NULL) return invalid(api, "embedge matmul: the weight is not constant");
  if (b.rank != 2 || b.elements < 1) return invalid(api, "embedge matmul: the weight has not two dimensions");

  Kernel *kernel = calloc(1, sizeof *kernel);
  if (kernel == NULL) return api->CreateStatus(ORT_FAIL, "embedge matmul: out of memory");
  kernel->api = api;
  kernel->with_added = known->inputs == 6;
  kernel->subtracts = known->subtracts;
  kernel->depth = b.dims[0];
  kernel->columns = b.dims[1];
  kernel->lines = (b.dims[0] + 3) / 4;
  const int64_t panels = (b.dims[1] + LANES - 1) / LANES;
  const size_t size = (size_t)(panels * kernel->lines * LINE), sums = (size_t)(panels * LANES) * sizeof(int32_t);
  const int stored = known->panels && b.elements > SMALL_WEIGHT && b.dims[0] % 4 == 0 && b.dims[1] % LANES == 0;
  kernel->sums = allocate(sums);
  if (!stored) kernel->owned = allocate(size);
  if (kernel->sums == NULL || (!stored && kernel->owned == NULL)) {
    destroy_matmul_int8(kernel);
    return api->CreateStatus(ORT_FAIL, "embedge matmul: out of memory for a weight");
  }
  memset(kernel->sums, 0, sums);
  if (stored) {
    kernel->panels = b.data;
    add_panels(kernel, panels);
  } else {
    kernel->panels = kernel->owned;
    pack(kernel, b.data);
    drop_pages(b.data, (size_t)b.elements);
  }
  *out = kernel;
  return NULL;
}

OrtStatus *compute_matmul_int8(void *data, OrtKernelContext *context) {
  const Kernel *kernel = data;
  const OrtApi *api = kernel->api;
  Tensor a, a_scale, b_scale, added = {0}, zero_point;
  OrtStatus *status = read_input(api, context, A, &a);
  if (status == NULL) status = read_input(api, context, A_SCALE, &a_scale);
  if (status == NULL) status = read_input(api, context, B_SCALE, &b_scale);
  if (status == NULL && kernel->with_added) status = read_input(api, context, B_SCALE + 1, &added);
  if (status == NULL) status = read_input(api, context, (size_t)(B_SCALE + 1 + kernel->with_added), &zero_point);
  if (status != NULL) return status;
  if (a.rank < 1 || a.dims[a.rank - 1] != kernel->depth)
    return invalid(api, "embedge matmul: rows and weight differ in depth");
  const int64_t rows = a.elements / kernel->depth, columns = kernel->columns;
  if (a_scale.elements != 1 && a_scale.elements != rows)
    return invalid(api, "embedge matmul: expected one scale, or one for each row");
  if (b_scale.elements != 1 && b_scale.elements != columns)
    return invalid(api, "embedge matmul: expected one scale, or one for each column");
  if (zero_point.data != NULL && zero_point.elements != 1)
    return invalid(api, "embedge matmul: expected one zero point");
  if (added.data != NULL && (added.rank < 1 || added.dims[added.rank - 1] != columns ||
                             (added.elements != columns && added.elements != rows * columns)))
    return invalid(api, "embedge matmul: expected a value to add for each column, or for each of the result");

  void *y = NULL;
  a.dims[a.rank - 1] = columns;
  if ((status = make_output(api, context, 0, a.dims, a.rank, &y)) != NULL) return status;
  if (rows == 0) return NULL;

  MatMul matmul = {
      .kernel = kernel,
      .a = a.data,
      .a_scale = a_scale.data,
      .b_scale = b_scale.data,
      .added = added.data,
      .y = y,
      .a_scale_step = a_scale.elements != 1,
      .added_step = added.elements == columns ? 0 : columns,
      .zero_point = zero_point.data == NULL ? 0 : *(const uint8_t *)zero_point.data,
      .one_a_scale = a_scale.elements == 1 && a_scale.rank < 2,
      .one_b_scale = b_scale.elements == 1,
  };
  Work work = {run_strip, &matmul, rows, kernel->depth, columns, PANELS, ROWS, 0, 0, 0};
  return run_work(api, context, &work);
}
