/* Matmuls of floats and 4-bit weights: com.microsoft.MatMulNBits at accuracy level 4.

   A row of the left side is quantized to int8 block by block, as ONNX Runtime does at this level, and

       y[m, n] = sum over blocks of (sum over k of a[m, k] * (b[n, k] - zero[n, block]))
                                    * a_scale[m, block] * scale[n, block]

   with the inner sum in integers. ONNX Runtime adds the blocks in another order, so the last bits of a float
   differ. Here a row's result does not depend on the rows beside it. MatMulNBitsBranch, a function of embedge's graphs,
   then adds a product of low rank: branch.c.

   A line of weights is unpacked once for all rows of a strip, and multiplied at once: what is read from memory are
   4 bits. Weights lie in panels of 16 columns, [columns / 16, depth / 8, 16, 4] bytes. Of 8 values along the depth
   the first four are the low halves of 4 bytes, the others the high ones. README.md has a drawing. */

#include <stdlib.h>
#include <string.h>

#include "branch.h"

enum { GROUP = 8, NO_ZERO_POINT = 8 }; /* values of a column in a line; what is subtracted where there are none */
enum { A, B, SCALES, ZERO_POINTS, GROUPS, BIAS, BRANCH = GROUPS }; /* inputs; a branch's in the place of the last */

typedef struct {
  const OrtApi *api;
  const Int4 *isa;
  const Int8 *branch_isa;
  Int4Weight weight;
  int with_zeros; /* whether the operator has constant zero points */
  int with_branch;
} Kernel;

typedef struct {
  const Int4 *isa;
  const Int4Product *product;
} Quantizing;

static void quantize_task(void *data, size_t row) {
  const Quantizing *q = data;
  q->isa->quantize_row(q->product, (int64_t)row);
}

/* ---- Weights ---- */

/* ONNX Runtime's [columns, blocks, block / 2], two neighbours along the depth in a byte, into panels. */
static void pack(Int4Weight *weight, const uint8_t *b) {
  const int64_t bytes = weight->blocks * weight->block / 2, lines = weight->blocks * weight->lines;
  for (int64_t column = 0; column < weight->columns; column++) {
    const uint8_t *from = b + column * bytes;
    uint8_t *to = weight->owned + column / LANES * lines * LINE + column % LANES * 4;
    for (int64_t line = 0; line < lines; line++, from += 4, to += LINE) {
      to[0] = (uint8_t)((from[0] & 15) | (from[2] & 15) << 4);
      to[1] = (uint8_t)(from[0] >> 4 | (from[2] & 0xf0));
      to[2] = (uint8_t)((from[1] & 15) | (from[3] & 15) << 4);
      to[3] = (uint8_t)(from[1] >> 4 | (from[3] & 0xf0));
    }
  }
}

/* Scales and zero points, each for all parts of a block of the operator's. */
static void pack_scales(Int4Weight *weight, const float *scales, const uint8_t *zero_points) {
  const int64_t parts = weight->parts, blocks = weight->blocks / parts, bytes = (blocks + 1) / 2;
  for (int64_t column = 0; column < weight->columns; column++)
    for (int64_t part = 0; part < weight->blocks; part++) {
      const int64_t block = part / parts;
      const int64_t at = (column / LANES * weight->blocks + part) * LANES + column % LANES;
      weight->scales[at] = scales[column * blocks + block];
      const uint8_t *pair = zero_points == NULL ? NULL : zero_points + column * bytes + block / 2;
      weight->zeros[at] = pair == NULL ? NO_ZERO_POINT : block % 2 == 0 ? *pair & 15 : *pair >> 4;
    }
}

/* ---- The operator ---- */

void destroy_matmul_int4(void *data) {
  Kernel *kernel = data;
  if (kernel == NULL) return;
  release(kernel->weight.owned);
  release(kernel->weight.scales);
  release(kernel->weight.zeros);
  free(kernel);
}

/* Into how many parts a block is cut, each with the block's scale, so that the sums of an instruction set hold one. */
static int64_t parts_of(const Int4 *isa, int64_t block) {
  return isa->largest_block == 0 || block <= isa->largest_block ? 1 : block / isa->largest_block;
}

OrtStatus *create_matmul_int4(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out) {
  int64_t depth = 0, columns = 0, bits = 0, block = 0, level = 0;
  OrtStatus *status = api->KernelInfoGetAttribute_int64(info, "K", &depth);
  if (status == NULL) status = api->KernelInfoGetAttribute_int64(info, "N", &columns);
  if (status == NULL) status = api->KernelInfoGetAttribute_int64(info, "bits", &bits);
  if (status == NULL) status = api->KernelInfoGetAttribute_int64(info, "block_size", &block);
  if (status == NULL) status = api->KernelInfoGetAttribute_int64(info, "accuracy_level", &level);
  if (status != NULL) return status;
  if (bits != 4 || level != 4 || block < LANES || (block & (block - 1)) != 0 || block > INT32_MAX || depth < 1 ||
      depth > INT32_MAX || columns < 1 || columns > INT32_MAX)
    return invalid(api, "embedge matmul: expected 4 bits, accuracy level 4 and blocks of 16, 32, 64 ...");
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
  kernel->isa = isa_in_use()->int4;
  kernel->branch_isa = isa_in_use()->int8;
  Int4Weight *weight = &kernel->weight;
  weight->depth = depth;
  weight->columns = columns;
  weight->parts = parts_of(kernel->isa, block);
  weight->block = block / weight->parts;
  weight->blocks = blocks * weight->parts;
  weight->lines = weight->block / GROUP;
  kernel->with_zeros = zero_points.data != NULL;
  kernel->with_branch = ((const Operator *)op)->branch;
  const int stored = ((const Operator *)op)->panels && b.elements > SMALL_WEIGHT && columns % LANES == 0;
  const size_t lanes = (size_t)(panels * weight->blocks * LANES);
  const size_t size = (size_t)(panels * weight->blocks * weight->lines * LINE);
  weight->scales = allocate(lanes * sizeof(float));
  weight->zeros = allocate(lanes);
  if (!stored) weight->owned = allocate(size);
  if (weight->scales == NULL || weight->zeros == NULL || (!stored && weight->owned == NULL)) {
    destroy_matmul_int4(kernel);
    return api->CreateStatus(ORT_FAIL, "embedge matmul: out of memory for a weight");
  }
  memset(weight->scales, 0, lanes * sizeof(float)); /* columns that fill up the last panel */
  memset(weight->zeros, 0, lanes);
  pack_scales(weight, scales.data, zero_points.data);
  drop_pages(scales.data, (size_t)scales.elements * sizeof(float));
  if (zero_points.data != NULL) drop_pages(zero_points.data, (size_t)zero_points.elements);
  weight->panels = stored ? b.data : weight->owned;
  if (!stored) {
    memset(weight->owned, 0, size);
    pack(weight, b.data);
    drop_pages(b.data, (size_t)b.elements);
  }
  *out = kernel;
  return NULL;
}

OrtStatus *compute_matmul_int4(void *data, OrtKernelContext *context) {
  const Kernel *kernel = data;
  const OrtApi *api = kernel->api;
  Tensor a, zero_points, groups = {0}, bias = {0};
  OrtStatus *status = read_input(api, context, A, &a);
  if (status == NULL) status = read_input(api, context, ZERO_POINTS, &zero_points);
  if (status == NULL && !kernel->with_branch) status = read_input(api, context, GROUPS, &groups);
  if (status == NULL && !kernel->with_branch) status = read_input(api, context, BIAS, &bias);
  if (status != NULL) return status;
  if (zero_points.data != NULL && !kernel->with_zeros)
    return invalid(api, "embedge matmul: zero points have to be constant");
  if (groups.data != NULL)
    return api->CreateStatus(ORT_NOT_IMPLEMENTED, "embedge matmul: g_idx, the order of columns, is not implemented");
  if (bias.data != NULL && bias.elements != kernel->weight.columns)
    return invalid(api, "embedge matmul: expected a bias for each column");
  if (a.rank < 1 || a.dims[a.rank - 1] != kernel->weight.depth)
    return invalid(api, "embedge matmul: rows and weight differ in depth");
  const int64_t rows = a.elements / kernel->weight.depth, columns = kernel->weight.columns;
  void *y = NULL;
  a.dims[a.rank - 1] = columns;
  if ((status = make_output(api, context, 0, a.dims, a.rank, &y)) != NULL) return status;
  if (rows == 0) return NULL;

  const int64_t blocks = kernel->weight.blocks;
  const Int4 *isa = kernel->isa;
  Int4Product product = {.weight = &kernel->weight, .a = a.data, .bias = bias.data, .y = y};
  product.values = allocate((size_t)(rows * blocks * kernel->weight.block));
  product.a_scales = allocate((size_t)(rows * blocks * 2) * sizeof(float));
  if (product.values == NULL || product.a_scales == NULL) {
    status = api->CreateStatus(ORT_FAIL, "embedge matmul: out of memory for the rows");
  } else {
    Work work = {isa->strip, &product, rows, kernel->weight.depth, columns, isa->panels, isa->rows, 0, 0, 0};
    BranchedProduct both = {.strip = isa->strip, .product = &product, .isa = kernel->branch_isa};
    if (kernel->with_branch) {
      status = open_branch(api, context, BRANCH, rows, columns, &both);
      work.strip = branched_strip;
      work.matmul = &both;
    }
    Quantizing quantizing = {isa, &product};
    const int few = rows * kernel->weight.depth < FEW_VALUES;
    if (status == NULL) status = run_tasks(api, context, quantize_task, (size_t)rows, few, &quantizing);
    if (status == NULL) status = run_work(api, context, &work);
    close_branch(&both);
  }
  release(product.values);
  release(product.a_scales);
  return status;
}
