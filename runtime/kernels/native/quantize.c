/* Rows of floats as unsigned 8-bit integers: functions of embedge's int8 graphs, each in one pass over memory
   instead of four to nine. Results equal those of the functions' own nodes to the bit. SiLU's do not: ONNX Runtime
   has another approximation of it.

   A row that holds a NaN gives a scale of NaN, which the matmuls carry on. */

#include <stdlib.h>

#include "isa.h"

/* Elements of a task, and up to which a call is not worth a second thread. */
#define TASK_ELEMENTS (1 << 15)

typedef struct {
  const OrtApi *api;
  const RowFunctions *isa;
  size_t outputs;
  int gated;
} Quantizer;

OrtStatus *create_quantizer(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  (void)info;
  Quantizer *kernel = malloc(sizeof *kernel);
  if (kernel == NULL) return api->CreateStatus(ORT_FAIL, "embedge: out of memory");
  kernel->api = api;
  kernel->isa = isa_in_use()->rows;
  kernel->outputs = operator_output_count(op);
  kernel->gated = ((const Operator *)op)->gated;
  *out = kernel;
  return NULL;
}

void destroy_quantizer(void *kernel) { free(kernel); }

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
    r->isa->multiply(r->x + at, r->y + at, r->width, r->gated, product);
    r->isa->rotate(product, r->width, r->rotation, r->block, rotated);
    r->isa->quantize(r, row, rotated);
  }
  free(rotated);
}

static void rows_task(void *data, size_t index) {
  const Rows *r = data;
  const int64_t from = (int64_t)index * r->rows_per_task, to = from + r->rows_per_task;
  for (int64_t row = from; row < to && row < r->rows; row++) r->isa->quantize(r, row, r->x + row * r->width);
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

OrtStatus *quantize_all(const OrtApi *api, OrtKernelContext *context, Rows *rows) {
  return run(api, context, rows, rows_task);
}

static OrtStatus *quantize_rows(const Quantizer *kernel, OrtKernelContext *context, int above) {
  enum { VALUES, SCALE };
  const OrtApi *api = kernel->api;
  Tensor x, floor = {0}, step, zero_points;
  OrtStatus *status = read_input(api, context, 0, &x);
  if (status == NULL && above) status = read_input(api, context, 1, &floor);
  if (status == NULL) status = read_input(api, context, 1 + (size_t)above, &step);
  if (status == NULL) status = read_input(api, context, 2 + (size_t)above, &zero_points);
  if (status != NULL) return status;
  if (x.rank < 1 || x.dims[x.rank - 1] < 1) return invalid(api, "embedge: expected rows of at least one value");
  Rows r = {.isa = kernel->isa, .x = x.data, .width = x.dims[x.rank - 1], .zero_points = zero_points.data};
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
  return quantize_all(api, context, &r);
}

/* QuantizeRows(x, step, zero_points) -> values, scale */
OrtStatus *compute_rows(void *kernel, OrtKernelContext *context) { return quantize_rows(kernel, context, 0); }

/* QuantizeRowsAbove(x, floor, step, zero_points) -> values, scale */
OrtStatus *compute_rows_above(void *kernel, OrtKernelContext *context) { return quantize_rows(kernel, context, 1); }

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
  Rows r = {.isa = known->isa,
            .x = x.data,
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
