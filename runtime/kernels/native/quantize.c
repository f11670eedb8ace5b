/* Rows of floats as unsigned 8-bit integers: functions of embedge's int8 graphs, each in one pass over memory
   instead of four to nine. Results equal those of the functions' own nodes to the bit. SiLU's do not: ONNX Runtime
   has another approximation of it.

   A row that holds a NaN gives a scale of NaN, which the matmuls carry on. */

#include <stdlib.h>

#include "kernels.h"

/* Elements of a task, and up to which a call is not worth a second thread. */
#define TASK_ELEMENTS (1 << 15)

typedef struct {
  const OrtApi *api;
  size_t outputs;
  int gated;
} Quantizer;

typedef struct {
  const float *x, *y, *rotation; /* y, rotation: of what is multiplied and rotated first */
  int block, gated;              /* of the rotation; whether x passes SiLU before */
  const uint8_t *zero_points;
  const float *floor;
  float step;
  int64_t rows, width, rows_per_task;
  uint8_t *values;
  float *scales, *product;
  int failed;
} Rows;

OrtStatus *create_quantizer(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  (void)info;
  Quantizer *kernel = malloc(sizeof *kernel);
  if (kernel == NULL) return api->CreateStatus(ORT_FAIL, "embedge: out of memory");
  kernel->api = api;
  kernel->outputs = operator_output_count(op);
  kernel->gated = ((const Operator *)op)->gated;
  *out = kernel;
  return NULL;
}

void destroy_quantizer(void *kernel) { free(kernel); }

/* round(x / scale) + zero_point, in 0 .. 255. */
static AVX512 inline void quantize(uint8_t *to, __mmask16 mask, __m512 x, __m512 scale, __m512i zero_point) {
  __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_div_ps(x, scale)), zero_point);
  q = _mm512_min_epi32(_mm512_max_epi32(q, _mm512_setzero_si512()), _mm512_set1_epi32(255));
  _mm512_mask_cvtepi32_storeu_epi8(to, mask, q);
}

static AVX512 void quantize_row(const float *x, int64_t width, float scale, uint8_t zero_point, uint8_t *values) {
  const __m512 scales = _mm512_set1_ps(scale);
  const __m512i zero = _mm512_set1_epi32(zero_point);
  for (int64_t i = 0; i < width; i += LANES) {
    const __mmask16 mask = lanes_left(width - i);
    quantize(values + i, mask, _mm512_maskz_loadu_ps(mask, x + i), scales, zero);
  }
}

/* The largest of x; NaN where one is. */
static AVX512 float top_of(const float *x, int64_t width) {
  __m512 largest = _mm512_set1_ps(-__builtin_inff());
  __mmask16 broken = 0;
  for (int64_t i = 0; i < width; i += LANES) {
    const __mmask16 mask = lanes_left(width - i);
    const __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
    broken |= _mm512_mask_cmp_ps_mask(mask, v, v, _CMP_UNORD_Q);
    largest = _mm512_mask_max_ps(largest, mask, largest, v);
  }
  return broken ? __builtin_nanf("") : _mm512_reduce_max_ps(largest);
}

/* x * y, or silu(x) * y. */
static AVX512 void multiply(const float *x, const float *y, int64_t width, int gated, float *product) {
  const __m512 one = _mm512_set1_ps(1), minus_log2_e = _mm512_set1_ps(-1.44269504088896341f);
  for (int64_t i = 0; i < width; i += LANES) {
    const __mmask16 mask = lanes_left(width - i);
    __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
    if (gated) v = _mm512_div_ps(v, _mm512_add_ps(one, power_of_2(_mm512_mul_ps(v, minus_log2_e))));
    _mm512_mask_storeu_ps(product + i, mask, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, y + i)));
  }
}

enum { AT_ONCE = 4 }; /* blocks that are rotated at once, so that no sum waits for the one before */

/* Each block of a row times the rotation [block, block], whose rows are summed in their order. */
static inline __attribute__((always_inline)) AVX512 void rotate_blocks(const float *x, int64_t blocks,
                                                                       const float *rotation, const int block,
                                                                       float *to) {
  const __mmask16 mask = lanes_left(block);
  for (int64_t b = 0; b < blocks; b += AT_ONCE) {
    const int count = blocks - b < AT_ONCE ? (int)(blocks - b) : AT_ONCE;
    __m512 sum[AT_ONCE];
#pragma GCC unroll 4
    for (int j = 0; j < AT_ONCE; j++) sum[j] = _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int k = 0; k < block; k++) {
      const __m512 row = _mm512_maskz_loadu_ps(mask, rotation + k * block);
#pragma GCC unroll 4
      for (int j = 0; j < AT_ONCE; j++) {
        const float value = x[(b + (j < count ? j : 0)) * block + k];
        sum[j] = _mm512_fmadd_ps(row, _mm512_set1_ps(value), sum[j]);
      }
    }
    for (int j = 0; j < count; j++) _mm512_mask_storeu_ps(to + (b + j) * block, mask, sum[j]);
  }
}

static AVX512 void rotate(const float *x, int64_t width, const float *rotation, int block, float *to) {
  if (block == LANES) rotate_blocks(x, width / LANES, rotation, LANES, to);
  else rotate_blocks(x, width / block, rotation, block, to);
}

static AVX512 void quantize_row_of(const Rows *r, int64_t row, const float *x) {
  float peak = r->floor == NULL ? peak_of(x, r->width) : top_of(x, r->width);
  if (r->floor != NULL && peak < *r->floor) peak = *r->floor; /* false for a NaN */
  const float scale = peak * r->step;
  r->scales[row] = scale;
  quantize_row(x, r->width, scale, r->zero_points[row], r->values + row * r->width);
}

static void rotated_task(void *data, size_t index) {
  Rows *r = data;
  const int64_t from = (int64_t)index * r->rows_per_task, to = from + r->rows_per_task;
  float *rotated = malloc((size_t)r->width * (r->product != NULL ? 1 : 2) * sizeof *rotated);
  if (rotated == NULL) {
    __atomic_store_n(&r->failed, 1, __ATOMIC_RELAXED);
    return;
  }
  for (int64_t row = from; row < to && row < r->rows; row++) {
    const int64_t at = row * r->width;
    float *product = r->product != NULL ? r->product + at : rotated + r->width;
    multiply(r->x + at, r->y + at, r->width, r->gated, product);
    rotate(product, r->width, r->rotation, r->block, rotated);
    quantize_row_of(r, row, rotated);
  }
  free(rotated);
}

static void rows_task(void *data, size_t index) {
  const Rows *r = data;
  const int64_t from = (int64_t)index * r->rows_per_task, to = from + r->rows_per_task;
  for (int64_t row = from; row < to && row < r->rows; row++) quantize_row_of(r, row, r->x + row * r->width);
}

static OrtStatus *run(const OrtApi *api, OrtKernelContext *context, Rows *r, void (*task)(void *, size_t)) {
  if (r->rows == 0) return NULL;
  const int64_t fit = TASK_ELEMENTS / r->width;
  r->rows_per_task = fit < 1 ? 1 : fit;
  const int64_t tasks = (r->rows + r->rows_per_task - 1) / r->rows_per_task;
  OrtStatus *status = run_tasks(api, context, task, (size_t)tasks, tasks == 1, r);
  if (status == NULL && r->failed) status = api->CreateStatus(ORT_FAIL, "embedge: out of memory for a row");
  return status;
}

static OrtStatus *quantize_rows(const OrtApi *api, OrtKernelContext *context, int above) {
  enum { VALUES, SCALE };
  Tensor x, floor = {0}, step, zero_points;
  OrtStatus *status = read_input(api, context, 0, &x);
  if (status == NULL && above) status = read_input(api, context, 1, &floor);
  if (status == NULL) status = read_input(api, context, 1 + (size_t)above, &step);
  if (status == NULL) status = read_input(api, context, 2 + (size_t)above, &zero_points);
  if (status != NULL) return status;
  if (x.rank < 1 || x.dims[x.rank - 1] < 1) return invalid(api, "embedge: expected rows of at least one value");
  Rows r = {.x = x.data, .width = x.dims[x.rank - 1], .zero_points = zero_points.data};
  r.rows = x.elements / r.width;
  if (step.elements != 1 || (above && floor.elements != 1) || zero_points.elements != r.rows)
    return invalid(api, "embedge: expected one step, and a zero point for each row");
  r.step = *(const float *)step.data;
  r.floor = floor.data;
  void *values = NULL, *scales = NULL;
  status = make_output(api, context, VALUES, x.dims, x.rank, &values);
  x.dims[x.rank - 1] = 1;
  if (status == NULL) status = make_output(api, context, SCALE, x.dims, x.rank, &scales);
  if (status != NULL) return status;
  r.values = values;
  r.scales = scales;
  return run(api, context, &r, rows_task);
}

/* QuantizeRows(x, step, zero_points) -> values, scale */
OrtStatus *compute_rows(void *kernel, OrtKernelContext *context) {
  return quantize_rows(((Quantizer *)kernel)->api, context, 0);
}

/* QuantizeRowsAbove(x, floor, step, zero_points) -> values, scale */
OrtStatus *compute_rows_above(void *kernel, OrtKernelContext *context) {
  return quantize_rows(((Quantizer *)kernel)->api, context, 1);
}

/* QuantizeRotated(x, y, rotation, blocks, step, zero_points) -> values, scale; ...AndProduct: and the product.
   `blocks` says again what the rotation's size does. */
OrtStatus *compute_rotated(void *kernel, OrtKernelContext *context) {
  enum { VALUES, SCALE, PRODUCT, OUTPUTS };
  const Quantizer *known = kernel;
  const OrtApi *api = known->api;
  Tensor x, y, rotation, step, zero_points;
  OrtStatus *status = read_input(api, context, 0, &x);
  if (status == NULL) status = read_input(api, context, 1, &y);
  if (status == NULL) status = read_input(api, context, 2, &rotation);
  if (status == NULL) status = read_input(api, context, 4, &step);
  if (status == NULL) status = read_input(api, context, 5, &zero_points);
  if (status != NULL) return status;
  const int64_t width = x.rank < 1 ? 0 : x.dims[x.rank - 1];
  if (width < 1 || y.elements != x.elements || y.rank != x.rank || y.dims[y.rank - 1] != width)
    return invalid(api, "embedge: expected two tensors of one shape, of rows of at least one value");
  if (rotation.rank != 2 || rotation.dims[0] != rotation.dims[1] || rotation.dims[0] < 1 || rotation.dims[0] > LANES ||
      width % rotation.dims[0] != 0)
    return invalid(api, "embedge: expected a square matrix of at most 16 rows, that rows are multiples of");
  Rows r = {.x = x.data,
            .y = y.data,
            .rotation = rotation.data,
            .block = (int)rotation.dims[0],
            .gated = known->gated,
            .zero_points = zero_points.data,
            .width = width,
            .rows = x.elements / width};
  if (step.elements != 1 || zero_points.elements != r.rows)
    return invalid(api, "embedge: expected one step, and a zero point for each row");
  r.step = *(const float *)step.data;
  void *out[OUTPUTS] = {NULL};
  const int64_t widths[OUTPUTS] = {width, 1, width};
  for (size_t i = 0; i < known->outputs && status == NULL; i++) {
    x.dims[x.rank - 1] = widths[i];
    status = make_output(api, context, i, x.dims, x.rank, &out[i]);
  }
  if (status != NULL) return status;
  r.values = out[VALUES];
  r.scales = out[SCALE];
  r.product = out[PRODUCT];
  return run(api, context, &r, rotated_task);
}
