/* 8-bit matmuls of ONNX Runtime sessions on x86-64 processors.

   The kernel takes the place of ONNX Runtime's own for com.microsoft.MatMulIntegerToFloat in the sessions
   that it is registered in: the same operator, and the same result to the bit,

       y[m, n] = float(sum over k of (a[m, k] - a_zero_point) * b[k, n]) * b_scale[n] * a_scale[m],

   and it runs the functions MatMulIntegerToFloatAdd and ...Sub of embedge's graphs, which add or subtract a
   tensor of y's shape, or one value for each column. Those whose names have Branch in them then add another product, of
   low rank: branch.c.

   What differs from ONNX Runtime's kernel is the order of the work:

   * Weights are read once, in the order they lie in memory. All rows of the left side pass over a slab of
     columns while the cache holds it, and each pass fetches a part of the next slab. ONNX Runtime's
     kernel waits for memory in its first pass of 6 rows and computes in the others.
   * With AVX-512, 24 accumulators (8 rows x 48 columns) are fed by 11 loads; else 12 (6 rows x 16 columns) by 8.
   * The scales are applied as the accumulators are stored; ONNX Runtime takes a pass of its own for the
     rows' ones, with one thread.

   Weights lie in panels of 16 columns, int8 [columns / 16, depth / 4, 16, 4]; with AVX-512 one vpdpbusd multiplies
   a line of 64 bytes. README.md has a drawing. The kernel makes this copy when the session opens. It need not where the
   session option "embedge.weights" is "panels": weights above 4096 bytes that fill their panels then lie like
   that already, under their shape [depth, columns]. */

#include <stdlib.h>
#include <string.h>

#include "branch.h"

enum { A, B, A_SCALE, B_SCALE }; /* inputs; then what is added, where it is, the zero point, and a branch's */

typedef struct {
  const OrtApi *api;
  const Int8 *isa;
  int with_added, subtracts, with_branch;
  Int8Weight weight;
} Kernel;

typedef struct {
  const Int8 *isa;
  const uint8_t *rows;
  uint8_t *to;
  int64_t depth, step; /* bytes of a row, here and there */
} Arranging;

/* ---- Weights ---- */

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
static void pack(const Int8 *isa, Int8Weight *weight, const int8_t *b) {
  const int64_t depth = weight->depth, columns = weight->columns;
  for (int64_t k = 0; k < weight->lines; k++)
    for (int64_t first = 0; first < columns; first += LANES) {
      int8_t *line = weight->owned + (first / LANES * weight->lines + k) * LINE;
      const int8_t *rows = b + 4 * k * columns + first;
      if (4 * k + 4 <= depth && first + LANES <= columns) {
        pack_line(line, rows, columns);
      } else {
        memset(line, 0, LINE);
        for (int64_t r = 0; r < 4 && 4 * k + r < depth; r++)
          for (int64_t c = 0; c < LANES && first + c < columns; c++) line[4 * c + r] = rows[r * columns + c];
      }
      isa->add_sums(line, 1, weight->sums + first);
    }
}

static void add_panels(const Int8 *isa, Int8Weight *weight, int64_t panels) {
  for (int64_t panel = 0; panel < panels; panel++)
    isa->add_sums(weight->panels + panel * weight->lines * LINE, weight->lines, weight->sums + panel * LANES);
}

/* ---- The operator ---- */

void destroy_matmul_int8(void *data) {
  Kernel *kernel = data;
  if (kernel == NULL) return;
  release(kernel->weight.owned);
  release(kernel->weight.sums);
  release(kernel->weight.starts);
  release(kernel->weight.sources);
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
  kernel->with_added = known->inputs - known->branch * BRANCH_INPUTS == 6;
  kernel->subtracts = known->subtracts;
  kernel->with_branch = known->branch;
  kernel->isa = isa_in_use()->int8;
  Int8Weight *weight = &kernel->weight;
  weight->depth = b.dims[0];
  weight->columns = b.dims[1];
  weight->lines = (b.dims[0] + 3) / 4;
  const int64_t panels = (b.dims[1] + LANES - 1) / LANES;
  const size_t size = (size_t)(panels * weight->lines * LINE), sums = (size_t)(panels * LANES) * sizeof(int32_t);
  const int stored = known->panels && b.elements > SMALL_WEIGHT && b.dims[0] % 4 == 0 && b.dims[1] % LANES == 0;
  weight->sums = allocate(sums);
  if (!stored) weight->owned = allocate(size);
  if (weight->sums == NULL || (!stored && weight->owned == NULL)) {
    destroy_matmul_int8(kernel);
    return api->CreateStatus(ORT_FAIL, "embedge matmul: out of memory for a weight");
  }
  memset(weight->sums, 0, sums);
  if (stored) {
    weight->panels = b.data;
    add_panels(kernel->isa, weight, panels);
  } else {
    weight->panels = weight->owned;
    pack(kernel->isa, weight, b.data);
  }
  if (kernel->isa->arrange_weight != NULL && !kernel->isa->arrange_weight(weight)) {
    destroy_matmul_int8(kernel);
    return api->CreateStatus(ORT_FAIL, "embedge matmul: out of memory for a weight");
  }
  if (weight->panels != b.data) drop_pages(b.data, (size_t)b.elements);
  *out = kernel;
  return NULL;
}

static void arrange_task(void *data, size_t row) {
  const Arranging *a = data;
  a->isa->arrange_row(a->rows + (int64_t)row * a->depth, a->depth, a->to + (int64_t)row * a->step);
}

OrtStatus *arrange_rows(const OrtApi *api, const OrtKernelContext *context, const Int8 *isa, Int8Product *product,
                        int64_t rows, uint8_t **arranged) {
  const int64_t depth = product->weight->depth, step = product->weight->lines * isa->arranged;
  *arranged = allocate((size_t)(rows * step));
  if (*arranged == NULL) return api->CreateStatus(ORT_FAIL, "embedge matmul: out of memory for the rows");
  Arranging arranging = {isa, product->a, *arranged, depth, step};
  product->a = *arranged;
  product->a_step = step;
  return run_tasks(api, context, arrange_task, (size_t)rows, rows * depth < FEW_VALUES, &arranging);
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
  if (a.rank < 1 || a.dims[a.rank - 1] != kernel->weight.depth)
    return invalid(api, "embedge matmul: rows and weight differ in depth");
  const int64_t rows = a.elements / kernel->weight.depth, columns = kernel->weight.columns;
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

  Int8Product product = {
      .weight = &kernel->weight,
      .subtracts = kernel->subtracts,
      .a = a.data,
      .a_step = kernel->weight.depth,
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
  const Int8 *isa = kernel->isa;
  Work work = {isa->strip, &product, rows, kernel->weight.depth, columns, isa->panels, isa->rows, 0, 0, 0};
  BranchedProduct both = {.strip = isa->strip, .product = &product, .isa = isa};
  if (kernel->with_branch) {
    status = open_branch(api, context, (size_t)(B_SCALE + 2 + kernel->with_added), rows, columns, &both);
    work.strip = branched_strip;
    work.matmul = &both;
  }
  uint8_t *arranged = NULL;
  if (status == NULL && isa->arrange_row != NULL) status = arrange_rows(api, context, isa, &product, rows, &arranged);
  if (status == NULL) status = run_work(api, context, &work);
  release(arranged);
  close_branch(&both);
  return status;
}
