/* Rows of floats as unsigned 8-bit integers: the functions that embedge's int8 graphs define for it, each in
   one pass over memory instead of four to nine. Results equal those of the functions' own nodes to the bit.

   A row that holds a NaN gives a scale of NaN, which the products carry on. */

#include <stdlib.h>

#include "kernels.h"

/* Elements of a task, and up to which a call is not worth a second thread. */
#define TASK_ELEMENTS (1 << 15)

typedef struct {
  const OrtApi *api;
  size_t outputs;
} Quantizer;

typedef struct {
  const float *x, *y; /* of halves: x * y */
  const uint8_t *zero_points;
  const float *floor;
  float step;
  int64_t rows, width, rows_per_task; /* width: of a part */
  uint8_t *values[2];
  float *scales[2], *low, *product;
  int failed;
} Rows;

OrtStatus *create_quantizer(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  (void)info;
  Quantizer *kernel = malloc(sizeof *kernel);
  if (kernel == NULL) return api->CreateStatus(ORT_FAIL, "embedge: out of memory");
  kernel->api = api;
  kernel->outputs = operator_output_count(op);
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

/* Smallest and largest of x * y, or of x where y is null; both NaN where one is. The products are kept. */
static AVX512 void bounds_of(const float *x, const float *y, int64_t width, float *kept, float *low, float *high) {
  const __m512 most = _mm512_set1_ps(__builtin_inff());
  __m512 least = most, largest = _mm512_sub_ps(_mm512_setzero_ps(), most);
  __mmask16 broken = 0;
  for (int64_t i = 0; i < width; i += LANES) {
    const __mmask16 mask = lanes_left(width - i);
    __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
    if (y != NULL) {
      v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, y + i));
      _mm512_mask_storeu_ps(kept + i, mask, v);
    }
    broken |= _mm512_mask_cmp_ps_mask(mask, v, v, _CMP_UNORD_Q);
    least = _mm512_mask_min_ps(least, mask, least, v);
    largest = _mm512_mask_max_ps(largest, mask, largest, v);
  }
  *low = broken ? __builtin_nanf("") : _mm512_reduce_min_ps(least);
  *high = broken ? __builtin_nanf("") : _mm512_reduce_max_ps(largest);
}

/* The largest of x; NaN where one is. */
static AVX512 float top_of(const float *x, int64_t width) {
  float low, high;
  bounds_of(x, NULL, width, NULL, &low, &high);
  return high;
}

static AVX512 void halves_row(const Rows *r, int64_t row, float *kept) {
  for (int half = 0; half < 2; half++) {
    const int64_t at = (2 * row + half) * r->width;
    float *product = r->product != NULL ? r->product + at : kept;
    float low, high;
    bounds_of(r->x + at, r->y + at, r->width, product, &low, &high);
    const float scale = (high - low) * r->step;
    const __m512 lows = _mm512_set1_ps(low), scales = _mm512_set1_ps(scale);
    uint8_t *values = r->values[half] + row * r->width;
    for (int64_t i = 0; i < r->width; i += LANES) {
      const __mmask16 mask = lanes_left(r->width - i);
      const __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, product + i), lows);
      quantize(values + i, mask, x, scales, _mm512_setzero_si512());
    }
    r->low[2 * row + half] = low;
    r->scales[half][row] = scale;
  }
}

static void halves_task(void *data, size_t index) {
  Rows *r = data;
  const int64_t from = (int64_t)index * r->rows_per_task, to = from + r->rows_per_task;
  float *kept = r->product != NULL ? NULL : malloc((size_t)r->width * sizeof *kept);
  if (r->product == NULL && kept == NULL) {
    __atomic_store_n(&r->failed, 1, __ATOMIC_RELAXED);
    return;
  }
  for (int64_t row = from; row < to && row < r->rows; row++) halves_row(r, row, kept);
  free(kept);
}

static void rows_task(void *data, size_t index) {
  const Rows *r = data;
  const int64_t from = (int64_t)index * r->rows_per_task, to = from + r->rows_per_task;
  for (int64_t row = from; row < to && row < r->rows; row++) {
    const float *x = r->x + row * r->width;
    float peak = r->floor == NULL ? peak_of(x, r->width) : top_of(x, r->width);
    if (r->floor != NULL && peak < *r->floor) peak = *r->floor; /* false for a NaN */
    const float scale = peak * r->step;
    r->scales[0][row] = scale;
    quantize_row(x, r->width, scale, r->zero_points[row], r->values[0] + row * r->width);
  }
}

static OrtStatus *run(const OrtApi *api, OrtKernelContext *context, Rows *r, void (*task)(void *, size_t), int parts) {
  if (r->rows == 0) return NULL;
  const int64_t row = parts * r->width, fit = TASK_ELEMENTS / row;
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
  r.values[0] = values;
  r.scales[0] = scales;
  return run(api, context, &r, rows_task, 1);
}

/* QuantizeRows(x, step, zero_points) -> values, scale */
OrtStatus *compute_rows(void *kernel, OrtKernelContext *context) {
  return quantize_rows(((Quantizer *)kernel)->api, context, 0);
}

/* QuantizeRowsAbove(x, floor, step, zero_points) -> values, scale */
OrtStatus *compute_rows_above(void *kernel, OrtKernelContext *context) {
  return quantize_rows(((Quantizer *)kernel)->api, context, 1);
}

/* QuantizeHalves(x, y, step) -> values of each half, scale of each, low; ...AndProduct: and x * y */
OrtStatus *compute_halves(void *kernel, OrtKernelContext *context) {
  enum { FIRST, SECOND, FIRST_SCALE, SECOND_SCALE, LOW, PRODUCT, OUTPUTS };
  const Quantizer *known = kernel;
  const OrtApi *api = known->api;
  Tensor x, y, step;
  OrtStatus *status = read_input(api, context, 0, &x);
  if (status == NULL) status = read_input(api, context, 1, &y);
  if (status == NULL) status = read_input(api, context, 2, &step);
  if (status != NULL) return status;
  const int64_t both = x.rank < 1 ? 0 : x.dims[x.rank - 1];
  if (both < 2 || both % 2 != 0) return invalid(api, "embedge: expected rows of an even number of values");
  if (y.elements != x.elements || y.rank != x.rank || y.dims[y.rank - 1] != both || step.elements != 1)
    return invalid(api, "embedge: expected two tensors of one shape, and one step");
  Rows r = {.x = x.data, .y = y.data, .width = both / 2, .rows = x.elements / both, .step = *(const float *)step.data};
  void *out[OUTPUTS] = {NULL};
  const int64_t width[OUTPUTS] = {r.width, r.width, 1, 1, 2, both};
  for (size_t i = 0; i < known->outputs && status == NULL; i++) {
    x.dims[x.rank - 1] = width[i];
    status = make_output(api, context, i, x.dims, x.rank, &out[i]);
  }
  if (status != NULL) return status;
  for (int half = 0; half < 2; half++) {
    r.values[half] = out[FIRST + half];
    r.scales[half] = out[FIRST_SCALE + half];
  }
  r.low = out[LOW];
  r.product = out[PRODUCT];
  return run(api, context, &r, halves_task, 2);
}
