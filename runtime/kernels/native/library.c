/* The custom-operator library: what is registered in a session, and what the kernels share. */

#include <string.h>

#include "isa.h"

/* ---- Tensors ---- */

OrtStatus *invalid(const OrtApi *api, const char *message) { return api->CreateStatus(ORT_INVALID_ARGUMENT, message); }

OrtStatus *read_value(const OrtApi *api, const OrtValue *value, Tensor *out) {
  OrtTensorTypeAndShapeInfo *info = NULL;
  OrtStatus *status = api->GetTensorTypeAndShape(value, &info);
  if (status != NULL) return status;
  status = api->GetDimensionsCount(info, &out->rank);
  if (status == NULL && out->rank > MAX_DIMS) status = invalid(api, "embedge: a tensor has more than 8 dimensions");
  if (status == NULL) status = api->GetDimensions(info, out->dims, out->rank);
  api->ReleaseTensorTypeAndShapeInfo(info);
  if (status != NULL) return status;
  out->elements = 1;
  for (size_t i = 0; i < out->rank; i++) out->elements *= out->dims[i];
  return api->GetTensorMutableData((OrtValue *)value, (void **)&out->data);
}

OrtStatus *read_input(const OrtApi *api, const OrtKernelContext *context, size_t index, Tensor *out) {
  const OrtValue *value = NULL;
  memset(out, 0, sizeof *out);
  OrtStatus *status = api->KernelContext_GetInput(context, index, &value);
  return status != NULL || value == NULL ? status : read_value(api, value, out);
}

OrtStatus *read_constant(const OrtApi *api, const OrtKernelInfo *info, size_t index, Tensor *out) {
  const OrtValue *value = NULL;
  int constant = 0;
  memset(out, 0, sizeof *out);
  OrtStatus *status = api->KernelInfoGetConstantInput_tensor(info, index, &constant, &value);
  return status != NULL || !constant || value == NULL ? status : read_value(api, value, out);
}

OrtStatus *make_output(const OrtApi *api, OrtKernelContext *context, size_t index, const int64_t *dims, size_t rank,
                       void **data) {
  OrtValue *value = NULL;
  OrtStatus *status = api->KernelContext_GetOutput(context, index, dims, rank, &value);
  return status != NULL || value == NULL ? status : api->GetTensorMutableData(value, data);
}

OrtStatus *run_tasks(const OrtApi *api, const OrtKernelContext *context, void (*task)(void *, size_t), size_t tasks,
                     int small, void *data) {
  if (!small) return api->KernelContext_ParallelFor(context, task, tasks, 0, data);
  for (size_t i = 0; i < tasks; i++) task(data, i);
  return NULL;
}

/* Tasks of a matmul, enough to balance 64 threads; several rows and neighbouring slabs in each. One has enough strips
   to fetch the next slab in, and takes the time of many claims of a task. bench/studies/tasks.py compares rules. */
enum { TASKS = 512, MIN_TASK_ROWS = 32, MIN_TASK_PRODUCTS = 1 << 20 };

/* Rows from .. to of a slab, in strips of equal height as far as possible. */
static void run_strips(const Work *work, int64_t slab, int64_t from, int64_t to) {
  const int64_t panels = (work->columns + LANES - 1) / LANES, first = slab * work->slab_panels;
  const int64_t left = panels - first, strips = (to - from + work->strip_rows - 1) / work->strip_rows;
  Strip strip = {.row = from, .column = first * LANES};
  strip.panels = (int)(left < work->slab_panels ? left : work->slab_panels);
  strip.last = (int)(left > work->slab_panels ? LANES : work->columns - (panels - 1) * LANES);
  for (int64_t i = 0; i < strips; i++) {
    const int64_t next = first + work->slab_panels + i;
    strip.rows = (to - strip.row + strips - i - 1) / (strips - i);
    strip.next = from == 0 && i < work->slab_panels && next < panels ? next : -1;
    work->strip(work->matmul, &strip);
    strip.row += strip.rows;
  }
}

static void run_task(void *data, size_t index) {
  const Work *work = data;
  const int64_t block = (int64_t)index % work->row_blocks, group = (int64_t)index / work->row_blocks;
  const int64_t from = work->rows * block / work->row_blocks, to = work->rows * (block + 1) / work->row_blocks;
  const int64_t first = group * work->slabs_per_task, end = first + work->slabs_per_task;
  for (int64_t slab = first; slab < end && slab < work->slabs; slab++) run_strips(work, slab, from, to);
}

OrtStatus *run_work(const OrtApi *api, const OrtKernelContext *context, Work *work) {
  const int64_t width = work->slab_panels * LANES;
  work->slabs = (work->columns + width - 1) / width;
  work->slabs_per_task = (work->slabs + TASKS - 1) / TASKS;
  const int64_t groups = (work->slabs + work->slabs_per_task - 1) / work->slabs_per_task;
  const int64_t wanted = (TASKS + groups - 1) / groups, most = work->rows / MIN_TASK_ROWS;
  const int64_t worth = work->rows * work->depth * work->slabs_per_task * width / MIN_TASK_PRODUCTS;
  const int64_t fit = most < worth ? most : worth;
  work->row_blocks = fit < 1 ? 1 : wanted < fit ? wanted : fit;
  const int64_t tasks = groups * work->row_blocks;
  return run_tasks(api, context, run_task, (size_t)tasks, tasks == 1 || is_small(work), work);
}

/* ---- Operators ---- */

const char *operator_name(const OrtCustomOp *op) { return ((const Operator *)op)->name; }
const char *operator_provider(const OrtCustomOp *op) { return (void)op, "CPUExecutionProvider"; }
size_t operator_input_count(const OrtCustomOp *op) { return (size_t)((const Operator *)op)->inputs; }
size_t operator_output_count(const OrtCustomOp *op) { return (size_t)((const Operator *)op)->outputs; }
int operator_memory(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, ORT_MEM_TYPE_DEFAULT; }
int operator_one(const OrtCustomOp *op) { return (void)op, 1; }
int operator_any_version(const OrtCustomOp *op) { return (void)op, INT32_MAX; }

int operator_input_type(const OrtCustomOp *op, size_t index) { return ((const Operator *)op)->types[index]; }

int operator_output_type(const OrtCustomOp *op, size_t index) {
  const Operator *known = (const Operator *)op;
  return known->types[(size_t)known->inputs + index];
}

int operator_input_kind(const OrtCustomOp *op, size_t index) {
  return (int)index < ((const Operator *)op)->required ? ORT_REQUIRED : ORT_OPTIONAL;
}

int operator_output_kind(const OrtCustomOp *op, size_t index) { return (void)op, (void)index, ORT_REQUIRED; }

/* ---- Registration ---- */

/* The best first. */
static const Isa *const SETS[] = {&isa_avx512vnni, &isa_avxvnni, &isa_avx2, &isa_avxvnni_evex};
static const Isa *in_use;

const Isa *isa_in_use(void) { return __atomic_load_n(&in_use, __ATOMIC_ACQUIRE); }

/* Chooses the instruction set of sessions that open from now on: the best, or the one of this name. To be asked first,
   the kernels do not look. Returns its name; null where the processor does not have it, and nothing changes. */
EXPORT const char *embedge_kernels_choose(const char *name) {
  for (size_t i = 0; i < sizeof SETS / sizeof *SETS; i++)
    if ((name == NULL ? SETS[i] != &isa_avxvnni_evex : strcmp(name, SETS[i]->name) == 0) && SETS[i]->runs_here()) {
      __atomic_store_n(&in_use, SETS[i], __ATOMIC_RELEASE);
      return SETS[i]->name;
    }
  return NULL;
}

/* Whether attention multiplies bfloat16 in sessions that do not ask for float32. */
EXPORT int embedge_kernels_use_bfloat16(void) {
  const Isa *isa = isa_in_use();
  return isa != NULL && isa->attention(0) != isa->attention(1);
}

enum { F = ONNX_FLOAT, U = ONNX_UINT8, S = ONNX_INT8, I = ONNX_INT32, L = ONNX_INT64 };

/* clang-format off */
#define INT8(in_panels) \
  {OPERATOR(create_matmul_int8, compute_matmul_int8, destroy_matmul_int8), "MatMulIntegerToFloat", 5, 4, 1, \
   {U, S, F, F, U, F}, .panels = in_panels}
#define INT8_AND(what, minus, in_panels) \
  {OPERATOR(create_matmul_int8, compute_matmul_int8, destroy_matmul_int8), what, 6, 5, 1, \
   {U, S, F, F, F, U, F}, .subtracts = minus, .panels = in_panels}
#define INT4(in_panels) \
  {OPERATOR(create_matmul_int4, compute_matmul_int4, destroy_matmul_int4), "MatMulNBits", 6, 3, 1, \
   {F, U, F, U, I, F, F}, .panels = in_panels}
static const Operator MATMUL_INT8[2] = {INT8(0), INT8(1)};
static const Operator MATMUL_INT8_ADD[2] = {INT8_AND("MatMulIntegerToFloatAdd", 0, 0),
                                            INT8_AND("MatMulIntegerToFloatAdd", 0, 1)};
static const Operator MATMUL_INT8_SUB[2] = {INT8_AND("MatMulIntegerToFloatSub", 1, 0),
                                            INT8_AND("MatMulIntegerToFloatSub", 1, 1)};
static const Operator MATMUL_INT4[2] = {INT4(0), INT4(1)};
#define BRANCH U, F, U, S, F
#define INT8_BRANCH(in_panels) \
  {OPERATOR(create_matmul_int8, compute_matmul_int8, destroy_matmul_int8), "MatMulIntegerToFloatBranch", 10, 10, 1, \
   {U, S, F, F, U, BRANCH, F}, .panels = in_panels, .branch = 1}
#define INT8_BRANCH_AND(what, minus, in_panels) \
  {OPERATOR(create_matmul_int8, compute_matmul_int8, destroy_matmul_int8), what, 11, 11, 1, \
   {U, S, F, F, F, U, BRANCH, F}, .subtracts = minus, .panels = in_panels, .branch = 1}
#define INT4_BRANCH(in_panels) \
  {OPERATOR(create_matmul_int4, compute_matmul_int4, destroy_matmul_int4), "MatMulNBitsBranch", 9, 9, 1, \
   {F, U, F, U, BRANCH, F}, .panels = in_panels, .branch = 1}
#define BRANCHES(in_panels) \
  {INT8_BRANCH(in_panels), INT8_BRANCH_AND("MatMulIntegerToFloatBranchAdd", 0, in_panels), \
   INT8_BRANCH_AND("MatMulIntegerToFloatBranchSub", 1, in_panels), INT4_BRANCH(in_panels)}
static const Operator BRANCHED[2][4] = {BRANCHES(0), BRANCHES(1)};
static const Operator BRANCH_ROWS = {OPERATOR(create_branch_rows, compute_branch_rows, destroy_branch_rows),
                                     "BranchRows", 7, 7, 2, {BRANCH, F, U, U, F}, .gated = 0};
static const Operator ROWS = {OPERATOR(create_quantizer, compute_rows, destroy_quantizer),
                              "QuantizeRows", 3, 3, 2, {F, F, U, U, F}, .gated = 0};
static const Operator ROWS_ABOVE = {OPERATOR(create_quantizer, compute_rows_above, destroy_quantizer),
                                    "QuantizeRowsAbove", 4, 4, 2, {F, F, F, U, U, F}, .gated = 0};
#define ROTATED(what, gated_, outputs, ...) \
  {OPERATOR(create_quantizer, compute_rotated, destroy_quantizer), what, 6, 6, outputs, \
   {F, F, F, L, F, U, U, F, ##__VA_ARGS__}, .gated = gated_}
static const Operator ROTATED_ROWS[4] = {
    ROTATED("QuantizeRotated", 0, 2),
    ROTATED("QuantizeRotatedAndProduct", 0, 3, F),
    ROTATED("QuantizeRotatedSwiGLU", 1, 2),
    ROTATED("QuantizeRotatedSwiGLUAndProduct", 1, 3, F),
};
#define ATTENTION_OF(what, inputs, floats_, ...) \
  {OPERATOR(create_attention, compute_attention, destroy_attention), what, inputs, inputs, 1, \
   {F, F, F, __VA_ARGS__}, .floats = floats_}
#define CAUSAL(floats) ATTENTION_OF("CausalAttention", 5, floats, I, I, F)
#define PADDED(floats) ATTENTION_OF("PaddedAttention", 4, floats, L, F)
#define FULL(floats) ATTENTION_OF("FullAttention", 3, floats, F)
static const Operator ATTENTION[2][3] = {{CAUSAL(0), PADDED(0), FULL(0)}, {CAUSAL(1), PADDED(1), FULL(1)}};
/* clang-format on */

/* A domain serves any number of sessions, and has to outlive them: made once, never released. */
static OrtStatus *add_domain(const OrtApi *api, OrtSessionOptions *options, OrtCustomOpDomain **kept, const char *name,
                             const Operator *const *operators, size_t count) {
  if (__atomic_load_n(kept, __ATOMIC_ACQUIRE) == NULL) {
    OrtCustomOpDomain *made = NULL, *none = NULL;
    OrtStatus *status = api->CreateCustomOpDomain(name, &made);
    if (status != NULL) return status;
    for (size_t i = 0; i < count && status == NULL; i++) status = api->CustomOpDomain_Add(made, &operators[i]->op);
    if (status != NULL || !__atomic_compare_exchange_n(kept, &none, made, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
      api->ReleaseCustomOpDomain(made); /* another thread was first */
    if (status != NULL) return status;
  }
  return api->AddCustomOpDomain(options, *kept);
}

/* Whether a session is asked for in some way. */
static OrtStatus *is_set(const OrtApi *api, const OrtSessionOptions *options, const char *key, const char *expected,
                         int *set) {
  char value[16] = "";
  size_t size = sizeof value;
  int given = 0;
  OrtStatus *status = api->HasSessionConfigEntry(options, key, &given);
  if (status == NULL && given) status = api->GetSessionConfigEntry(options, key, value, &size);
  *set = strcmp(value, expected) == 0;
  return status;
}

/* Called by SessionOptions.register_custom_ops_library. */
EXPORT OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  static OrtCustomOpDomain *contrib[2], *own[4];
  const OrtApi *api = base->GetApi(ORT_API_VERSION);
  if (api == NULL) return NULL; /* older than the interface: ONNX Runtime keeps its own kernels */
  if (isa_in_use() == NULL && embedge_kernels_choose(NULL) == NULL)
    return invalid(api, "embedge: the processor has none of the kernels' instruction sets");
  int panels = 0, floats = 0;
  OrtStatus *status = is_set(api, options, "embedge.weights", "panels", &panels);
  if (status == NULL) status = is_set(api, options, "embedge.attention", "float32", &floats);
  if (status != NULL) return status;
  const Operator *const matmuls[] = {&MATMUL_INT8[panels], &MATMUL_INT4[panels]};
  /* clang-format off */
  const Operator *const functions[] = {
      &MATMUL_INT8_ADD[panels], &MATMUL_INT8_SUB[panels],
      &BRANCHED[panels][0], &BRANCHED[panels][1], &BRANCHED[panels][2], &BRANCHED[panels][3],
      &ROWS, &ROWS_ABOVE, &BRANCH_ROWS,
      &ROTATED_ROWS[0], &ROTATED_ROWS[1], &ROTATED_ROWS[2], &ROTATED_ROWS[3],
      &ATTENTION[floats][0], &ATTENTION[floats][1], &ATTENTION[floats][2],
  };
  /* clang-format on */
  status = add_domain(api, options, &contrib[panels], "com.microsoft", matmuls, 2);
  if (status != NULL) return status;
  return add_domain(api, options, &own[2 * panels + floats], "embedge", functions,
                    sizeof functions / sizeof *functions);
}
