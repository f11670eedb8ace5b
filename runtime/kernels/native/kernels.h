/* What the kernels share: tensors, tasks, and how an operator is described to ONNX Runtime. */

#ifndef EMBEDGE_KERNELS_H
#define EMBEDGE_KERNELS_H

#if !defined(__x86_64__)
#error "these kernels are written for x86-64, GCC or Clang; elsewhere ONNX Runtime's own are used"
#endif

#if defined(__GNUC__) && !defined(__clang__)
/* Partial redundancy elimination copies every accumulator in every step; reassociation adds pairs of products before
   they are added to a sum, for which there are no registers. */
#pragma GCC optimize("no-tree-pre", "no-tree-reassoc")
#endif

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "onnxruntime_abi.h"
#include "system.h"

enum { LANES = 16, MAX_DIMS = 8 }; /* columns of a panel */

/* An input: `data` is null where an optional one is left out. */
typedef struct {
  const void *data;
  int64_t dims[MAX_DIMS], elements;
  size_t rank;
} Tensor;

OrtStatus *read_value(const OrtApi *api, const OrtValue *value, Tensor *out);
OrtStatus *read_input(const OrtApi *api, const OrtKernelContext *context, size_t index, Tensor *out);

OrtStatus *make_output(const OrtApi *api, OrtKernelContext *context, size_t index, const int64_t *dims, size_t rank,
                       void **data);

OrtStatus *invalid(const OrtApi *api, const char *message);

/* An input that is a constant; `data` is null where it is left out or is none. */
OrtStatus *read_constant(const OrtApi *api, const OrtKernelInfo *info, size_t index, Tensor *out);

/* Runs task(data, 0 .. tasks - 1), with the session's threads unless `small`. */
OrtStatus *run_tasks(const OrtApi *api, const OrtKernelContext *context, void (*task)(void *, size_t), size_t tasks,
                     int small, void *data);

/* Some rows of a slab: those over which one pass goes while the cache holds the slab. */
typedef struct {
  int64_t row, rows, column; /* column: the slab's first */
  int64_t next;              /* the panel, of all, to fetch meanwhile; -1: none */
  int panels;                /* of the slab, 16 columns each */
  int last;                  /* columns of the last panel that exist */
  /* [rows, panels * 16] of a branch, which is added to a matmul's result; or where the branch's own goes, instead of
     into y. Null: there is none. See branch.c. */
  const float *branch;
  float *into;
} Strip;

/* A matmul in tasks: slabs of columns, in the order they lie in memory, by blocks of rows in strips. */
typedef struct {
  void (*strip)(const void *matmul, Strip *strip);
  const void *matmul;
  int64_t rows, depth, columns, slab_panels, strip_rows; /* the last two: at most */
  int64_t slabs, slabs_per_task, row_blocks;             /* filled in */
} Work;

OrtStatus *run_work(const OrtApi *api, const OrtKernelContext *context, Work *work);

/* Values of rows that are brought into another form in less time than waking a second thread takes. */
enum { FEW_VALUES = 1 << 15 };

/* Whether a matmul takes less time than waking a second thread. */
static inline int is_small(const Work *work) { return work->rows * work->depth * work->columns < 1 << 20; }

/* ---- Memory of weights ---- */

/* Weights up to it, in bytes, lie in the graph and are never stored in panels: INLINE_BYTES of
   runtime/bundle/contract.py. */
#define SMALL_WEIGHT 4096

/* An operator whose inputs and outputs are listed by their types; inputs behind the `required` ones may be
   left out. */
typedef struct {
  OrtCustomOp op; /* first: ONNX Runtime hands it back to the functions below */
  const char *name;
  int inputs, required, outputs;
  int types[12];         /* of the inputs, then of the outputs */
  int subtracts, panels; /* see matmul_int8.c */
  int floats;            /* see attention.c */
  int gated;             /* see quantize.c */
  int branch;            /* whether a branch's inputs are the last: branch.c */
} Operator;

const char *operator_name(const OrtCustomOp *op);
const char *operator_provider(const OrtCustomOp *op);
int operator_input_type(const OrtCustomOp *op, size_t index);
size_t operator_input_count(const OrtCustomOp *op);
int operator_output_type(const OrtCustomOp *op, size_t index);
size_t operator_output_count(const OrtCustomOp *op);
int operator_input_kind(const OrtCustomOp *op, size_t index);
int operator_output_kind(const OrtCustomOp *op, size_t index);
int operator_memory(const OrtCustomOp *op, size_t index);
int operator_one(const OrtCustomOp *op);
int operator_any_version(const OrtCustomOp *op);

/* clang-format off */
#define OPERATOR(create, compute, destroy) \
  { \
    .version = ORT_API_VERSION, .GetName = operator_name, .GetExecutionProviderType = operator_provider, \
    .GetInputType = operator_input_type, .GetInputTypeCount = operator_input_count, \
    .GetOutputType = operator_output_type, .GetOutputTypeCount = operator_output_count, .KernelDestroy = destroy, \
    .GetInputCharacteristic = operator_input_kind, .GetOutputCharacteristic = operator_output_kind, \
    .GetInputMemoryType = operator_memory, .GetVariadicInputMinArity = operator_one, \
    .GetVariadicInputHomogeneity = operator_one, .GetVariadicOutputMinArity = operator_one, \
    .GetVariadicOutputHomogeneity = operator_one, .CreateKernelV2 = create, .KernelComputeV2 = compute, \
    .GetStartVersion = operator_one, .GetEndVersion = operator_any_version, \
  }
/* clang-format on */

/* attention.c */
OrtStatus *create_attention(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out);
OrtStatus *compute_attention(void *kernel, OrtKernelContext *context);
void destroy_attention(void *kernel);

/* matmul_int8.c */
OrtStatus *create_matmul_int8(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out);
OrtStatus *compute_matmul_int8(void *kernel, OrtKernelContext *context);
void destroy_matmul_int8(void *kernel);

/* matmul_int4.c */
OrtStatus *create_matmul_int4(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out);
OrtStatus *compute_matmul_int4(void *kernel, OrtKernelContext *context);
void destroy_matmul_int4(void *kernel);

/* branch.c */
OrtStatus *create_branch_rows(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out);
OrtStatus *compute_branch_rows(void *kernel, OrtKernelContext *context);
void destroy_branch_rows(void *kernel);

/* quantize.c */
OrtStatus *create_quantizer(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **out);
OrtStatus *compute_rows(void *kernel, OrtKernelContext *context);
OrtStatus *compute_rows_above(void *kernel, OrtKernelContext *context);
OrtStatus *compute_rotated(void *kernel, OrtKernelContext *context);
void destroy_quantizer(void *kernel);

#endif
