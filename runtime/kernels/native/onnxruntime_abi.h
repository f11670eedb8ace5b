/* The part of ONNX Runtime's C interface that a custom-operator library needs, as of version 17.

   Positions in OrtApi and the order of OrtCustomOp never change: ONNX Runtime only appends to them
   (its onnxruntime_c_api.h says so, and its build asserts it). Names are its own. */

#ifndef EMBEDGE_ONNXRUNTIME_ABI_H
#define EMBEDGE_ONNXRUNTIME_ABI_H

#include <stddef.h>
#include <stdint.h>

#define ORT_API_VERSION 17

typedef struct OrtStatus OrtStatus; /* null: success */
typedef struct OrtValue OrtValue;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtCustomOp OrtCustomOp;

enum OrtErrorCode { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_NOT_IMPLEMENTED = 9 };
enum ONNXTensorElementDataType { ONNX_FLOAT = 1, ONNX_UINT8 = 2, ONNX_INT8 = 3, ONNX_INT32 = 6, ONNX_INT64 = 7 };
enum OrtCustomOpInputOutputCharacteristic { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 };
enum OrtMemType { ORT_MEM_TYPE_DEFAULT = 0 };

typedef struct OrtApi {
  OrtStatus *(*CreateStatus)(int code, const char *message);
  void *unused_1[25];
  OrtStatus *(*CreateCustomOpDomain)(const char *domain, OrtCustomOpDomain **out);
  OrtStatus *(*CustomOpDomain_Add)(OrtCustomOpDomain *domain, const OrtCustomOp *op);
  OrtStatus *(*AddCustomOpDomain)(OrtSessionOptions *options, OrtCustomOpDomain *domain);
  void *unused_29[22];
  OrtStatus *(*GetTensorMutableData)(OrtValue *value, void **out);
  void *unused_52[9];
  OrtStatus *(*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo *info, size_t *out);
  OrtStatus *(*GetDimensions)(const OrtTensorTypeAndShapeInfo *info, int64_t *out, size_t count);
  void *unused_63[2];
  OrtStatus *(*GetTensorTypeAndShape)(const OrtValue *value, OrtTensorTypeAndShapeInfo **out);
  void *unused_66[19];
  OrtStatus *(*KernelInfoGetAttribute_float)(const OrtKernelInfo *info, const char *name, float *out);
  OrtStatus *(*KernelInfoGetAttribute_int64)(const OrtKernelInfo *info, const char *name, int64_t *out);
  void *unused_87[3];
  OrtStatus *(*KernelContext_GetInput)(const OrtKernelContext *context, size_t index, const OrtValue **out);
  OrtStatus *(*KernelContext_GetOutput)(OrtKernelContext *context, size_t index, const int64_t *dims, size_t count,
                                        OrtValue **out);
  void *unused_92[7];
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo *info);
  void *unused_100;
  void (*ReleaseCustomOpDomain)(OrtCustomOpDomain *domain);
  void *unused_102[135];
  OrtStatus *(*HasSessionConfigEntry)(const OrtSessionOptions *options, const char *key, int *out);
  OrtStatus *(*GetSessionConfigEntry)(const OrtSessionOptions *options, const char *key, char *value, size_t *size);
  void *unused_239[10];
  OrtStatus *(*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo *info, size_t index, int *is_constant,
                                                  const OrtValue **out);
  void *unused_250[24];
  OrtStatus *(*KernelContext_ParallelFor)(const OrtKernelContext *context, void (*task)(void *data, size_t index),
                                          size_t total, size_t batches, void *data);
} OrtApi;

#define ORT_AT(name, position) \
  _Static_assert(offsetof(OrtApi, name) == (position) * sizeof(void *), #name " is at another position")
ORT_AT(AddCustomOpDomain, 28);
ORT_AT(GetTensorMutableData, 51);
ORT_AT(GetDimensions, 62);
ORT_AT(GetTensorTypeAndShape, 65);
ORT_AT(KernelInfoGetAttribute_float, 85);
ORT_AT(KernelInfoGetAttribute_int64, 86);
ORT_AT(KernelContext_GetOutput, 91);
ORT_AT(ReleaseTensorTypeAndShapeInfo, 99);
ORT_AT(ReleaseCustomOpDomain, 101);
ORT_AT(GetSessionConfigEntry, 238);
ORT_AT(KernelInfoGetConstantInput_tensor, 249);
ORT_AT(KernelContext_ParallelFor, 274);

typedef struct OrtApiBase {
  const OrtApi *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)(void);
} OrtApiBase;

struct OrtCustomOp {
  uint32_t version;
  void *(*CreateKernel)(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info);
  const char *(*GetName)(const OrtCustomOp *op);
  const char *(*GetExecutionProviderType)(const OrtCustomOp *op);
  int (*GetInputType)(const OrtCustomOp *op, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp *op);
  int (*GetOutputType)(const OrtCustomOp *op, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp *op);
  void (*KernelCompute)(void *kernel, OrtKernelContext *context);
  void (*KernelDestroy)(void *kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp *op, size_t index);
  int (*GetOutputCharacteristic)(const OrtCustomOp *op, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp *op, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp *op);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp *op);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp *op);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *op);
  OrtStatus *(*CreateKernelV2)(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel);
  OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *context);
  OrtStatus *(*InferOutputShapeFn)(const OrtCustomOp *op, void *context);
  int (*GetStartVersion)(const OrtCustomOp *op);
  int (*GetEndVersion)(const OrtCustomOp *op);
};

#endif
