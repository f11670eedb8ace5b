/* Branches: beside a Linear's product x * W, a product of low rank, (x * D) * U, of bytes as well.

   What differs from a matmul of constants is that D and U may be inputs of the graph, of one task or another. So they
   lie in panels, int8 [columns / 16, depth / 4, 16, 4], and are read where they are. Sums of their columns are taken in
   each run, of D's `depth * rank` and U's `rank * columns` bytes.

   embedge.BranchRows gives the rows of x * D quantized. The functions MatMulIntegerToFloatBranch, ...BranchAdd,
   ...BranchSub and MatMulNBitsBranch add the product of these rows and U to their own. Before each of their strips that of
   an 8-bit matmul gives the branch's result for the same rows and columns. It stays in the first cache until it is added,
   as the strip's is stored. Results equal those of the functions' own nodes to the bit, as far as the matmul's own do.

   A branch's values are 63 at most in size, and sums of two products fit into 16 bits. Of others AVX2's lines are
   arranged in each run, as isa_avx2.c says: exact too, but slow. */

#include "branch.h"

#include <stdlib.h>
#include <string.h>

/* Panels that are looked through in less time than waking a second thread takes. */
enum { FEW_BYTES = 1 << 18 };

enum { MOST_ROWS = 8, MOST_PANELS = 3 }; /* of a tile, of all instruction sets */

typedef struct {
  const Int8 *isa;
  const Int8Weight *weight;
  int inexact; /* whether lines have to be arranged */
} Look;

/* Sums a panel's columns. */
static void look_task(void *data, size_t panel) {
  Look *look = data;
  const Int8Weight *weight = look->weight;
  const int8_t *lines = weight->panels + (int64_t)panel * weight->lines * LINE;
  look->isa->add_sums(lines, weight->lines, weight->sums + panel * LANES);
  if (look->isa->exact != NULL && !look->isa->exact(lines, weight->lines))
    __atomic_store_n(&look->inexact, 1, __ATOMIC_RELAXED);
}

/* Where the lines' values lie among a row's, if neither is arranged. */
static uint32_t *plain_sources(int64_t lines) {
  uint32_t *sources = allocate((size_t)lines * sizeof *sources);
  for (int64_t k = 0; k < lines && sources != NULL; k++) sources[k] = (uint32_t)(4 * k);
  return sources;
}

/* What the strips of an instruction set read beside the panels. */
static OrtStatus *prepare(const OrtApi *api, const OrtKernelContext *context, const Int8 *isa, PanelProduct *p) {
  Int8Weight *weight = &p->weight;
  const int64_t panels = weight->columns / LANES;
  weight->sums = allocate((size_t)weight->columns * sizeof *weight->sums);
  if (weight->sums == NULL) return api->CreateStatus(ORT_FAIL, "embedge branch: out of memory for sums");
  memset(weight->sums, 0, (size_t)weight->columns * sizeof *weight->sums);
  Look look = {isa, weight, 0};
  const int few = panels * weight->lines * LINE < FEW_BYTES;
  OrtStatus *status = run_tasks(api, context, look_task, (size_t)panels, few, &look);
  if (status != NULL || isa->exact == NULL) return status;
  if (look.inexact) {
    if (!isa->arrange_weight(weight)) return api->CreateStatus(ORT_FAIL, "embedge branch: out of memory for panels");
    return arrange_rows(api, context, isa, &p->product, p->rows, &p->arranged);
  }
  weight->sources = plain_sources(weight->lines);
  return weight->sources != NULL ? NULL : api->CreateStatus(ORT_FAIL, "embedge branch: out of memory for lines");
}

static void close_product(PanelProduct *p) {
  release(p->weight.owned);
  release(p->weight.sums);
  release(p->weight.starts);
  release(p->weight.sources);
  release(p->arranged);
}

/* Reads the inputs of a product, from `first` on; then, whatever came of it, close_product. */
static OrtStatus *read_product(const OrtApi *api, const OrtKernelContext *context, size_t first, PanelProduct *p) {
  enum { VALUES, SCALE, ZERO_POINT, PANELS, PANELS_SCALE };
  Tensor in[BRANCH_INPUTS];
  OrtStatus *status = NULL;
  memset(p, 0, sizeof *p);
  for (size_t i = 0; i < BRANCH_INPUTS && status == NULL; i++) status = read_input(api, context, first + i, &in[i]);
  if (status != NULL) return status;
  const Tensor *values = &in[VALUES], *scale = &in[SCALE], *panels = &in[PANELS];
  if (panels->rank != 4 || panels->elements < 1 || panels->dims[2] != LANES || panels->dims[3] != 4)
    return invalid(api, "embedge branch: expected panels of the shape [columns / 16, depth / 4, 16, 4]");
  const int64_t depth = 4 * panels->dims[1];
  p->values = *values;
  p->columns = LANES * panels->dims[0];
  if (values->rank < 1 || values->dims[values->rank - 1] != depth)
    return invalid(api, "embedge branch: rows and panels differ in depth");
  p->rows = values->elements / depth;
  if (scale->elements != p->rows) return invalid(api, "embedge branch: expected a scale for each row");
  if (in[PANELS_SCALE].elements != p->columns)
    return invalid(api, "embedge branch: expected a scale for each column of the panels");
  if (in[ZERO_POINT].elements != 1) return invalid(api, "embedge branch: expected one zero point");
  p->weight = (Int8Weight){.depth = depth, .columns = p->columns, .lines = depth / 4, .panels = panels->data};
  p->product = (Int8Product){
      .a = values->data,
      .a_step = depth,
      .a_scale = scale->data,
      .b_scale = in[PANELS_SCALE].data,
      .a_scale_step = 1,
      .zero_point = *(const uint8_t *)in[ZERO_POINT].data,
      .one_a_scale = scale->elements == 1 && scale->rank < 2,
  };
  return NULL;
}

/* ---- A branch's product, added to a matmul's ---- */

OrtStatus *open_branch(const OrtApi *api, const OrtKernelContext *context, size_t first, int64_t rows, int64_t columns,
                       BranchedProduct *both) {
  PanelProduct *p = &both->branch;
  OrtStatus *status = read_product(api, context, first, p);
  if (status != NULL) return status;
  if (p->rows != rows) return invalid(api, "embedge branch: expected as many rows as the matmul has");
  if (p->columns != columns)
    return invalid(api, "embedge branch: expected panels of as many columns as the matmul has");
  if (p->weight.depth % LANES != 0) return invalid(api, "embedge branch: expected a rank that is a multiple of 16");
  p->product.weight = &p->weight;
  return rows == 0 ? NULL : prepare(api, context, both->isa, p);
}

void close_branch(BranchedProduct *both) { close_product(&both->branch); }

void branched_strip(const void *data, Strip *strip) {
  const BranchedProduct *both = data;
  const int64_t next = strip->next;
  float branch[MOST_ROWS * MOST_PANELS * LANES] __attribute__((aligned(LINE)));
  strip->next = -1;
  strip->into = branch;
  both->isa->strip(&both->branch.product, strip);
  strip->next = next;
  strip->into = NULL;
  strip->branch = branch;
  both->strip(both->product, strip);
  strip->branch = NULL;
}

/* ---- Rows of a branch ---- */

typedef struct {
  const OrtApi *api;
  const Int8 *isa;
  const RowFunctions *rows;
  int64_t width;
} Kernel;

OrtStatus *create_branch_rows(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  (void)op;
  int64_t width = 0;
  OrtStatus *status = api->KernelInfoGetAttribute_int64(info, "width", &width);
  if (status != NULL) return status;
  Kernel *kernel = malloc(sizeof *kernel);
  if (kernel == NULL) return api->CreateStatus(ORT_FAIL, "embedge: out of memory");
  *kernel = (Kernel){api, isa_in_use()->int8, isa_in_use()->rows, width};
  *out = kernel;
  return NULL;
}

void destroy_branch_rows(void *kernel) { free(kernel); }

/* The product's rows in floats, then as bytes. */
static OrtStatus *quantize_product(const Kernel *kernel, OrtKernelContext *context, PanelProduct *p, Rows *r) {
  const OrtApi *api = kernel->api;
  float *y = allocate((size_t)(p->rows * p->columns) * sizeof *y);
  if (y == NULL) return api->CreateStatus(ORT_FAIL, "embedge branch: out of memory for the rows");
  p->product.weight = &p->weight;
  p->product.y = y;
  r->x = y;
  OrtStatus *status = prepare(api, context, kernel->isa, p);
  const Int8 *isa = kernel->isa;
  Work work = {isa->strip, &p->product, p->rows, p->weight.depth, p->columns, isa->panels, isa->rows, 0, 0, 0};
  if (status == NULL) status = run_work(api, context, &work);
  if (status == NULL) status = quantize_all(api, context, r);
  release(y);
  return status;
}

static OrtStatus *compute(const Kernel *kernel, OrtKernelContext *context, PanelProduct *p) {
  enum { STEP = BRANCH_INPUTS, ZERO_POINTS, VALUES = 0, SCALE };
  const OrtApi *api = kernel->api;
  Tensor step, zero_points, shape = p->values;
  OrtStatus *status = read_input(api, context, STEP, &step);
  if (status == NULL) status = read_input(api, context, ZERO_POINTS, &zero_points);
  if (status != NULL) return status;
  if (p->columns != kernel->width)
    return invalid(api, "embedge branch: expected panels of as many columns as the rank");
  if (step.elements != 1 || zero_points.elements != p->rows)
    return invalid(api, "embedge branch: expected one step, and a zero point for each row");
  void *values = NULL, *scales = NULL;
  shape.dims[shape.rank - 1] = p->columns;
  status = make_output(api, context, VALUES, shape.dims, shape.rank, &values);
  shape.dims[shape.rank - 1] = 1;
  if (status == NULL) status = make_output(api, context, SCALE, shape.dims, shape.rank, &scales);
  if (status != NULL || p->rows == 0) return status;
  Rows r = {
      .isa = kernel->rows,
      .zero_points = zero_points.data,
      .step = *(const float *)step.data,
      .rows = p->rows,
      .width = p->columns,
      .values = values,
      .scales = scales,
  };
  return quantize_product(kernel, context, p, &r);
}

/* BranchRows(values, scale, zero_point, down, down_scale, step, zero_points) -> values, scale */
OrtStatus *compute_branch_rows(void *data, OrtKernelContext *context) {
  const Kernel *kernel = data;
  PanelProduct p;
  OrtStatus *status = read_product(kernel->api, context, 0, &p);
  if (status == NULL) status = compute(kernel, context, &p);
  close_product(&p);
  return status;
}
