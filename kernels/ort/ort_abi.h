// The part of ONNX Runtime's C interface that a custom operator needs, written from its binary layout.
//
// No onnxruntime package for Python, node or Debian brings headers. The interface only grows at its end: functions keep
// their place in the table and structs their fields, so what is compiled for version 18 (the first with GetMayInplace)
// runs on every later one. Nothing of ONNX Runtime is linked; it hands the table to RegisterCustomOps.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32) && !defined(_WIN64)
#define ORT_CALL __stdcall
#else
#define ORT_CALL
#endif

extern "C" {

struct OrtStatus;
struct OrtValue;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtTensorTypeAndShapeInfo;

struct OrtApi {
  const void* functions[1];  // as many as the version has
};

struct OrtApiBase {
  const OrtApi*(ORT_CALL* GetApi)(uint32_t version);
  const char*(ORT_CALL* GetVersionString)();
};

enum OrtElementType : int { kOrtFloat = 1, kOrtInt8 = 3, kOrtFloat16 = 10, kOrtBFloat16 = 16 };
enum OrtCharacteristic : int { kOrtRequired = 0 };
enum OrtMemType : int { kOrtMemDefault = 0 };
enum OrtErrorCode : int { kOrtFail = 1, kOrtInvalidArgument = 2 };

struct OrtCustomOp {
  uint32_t version;
  void*(ORT_CALL* CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char*(ORT_CALL* GetName)(const OrtCustomOp*);
  const char*(ORT_CALL* GetExecutionProviderType)(const OrtCustomOp*);
  OrtElementType(ORT_CALL* GetInputType)(const OrtCustomOp*, size_t index);
  size_t(ORT_CALL* GetInputTypeCount)(const OrtCustomOp*);
  OrtElementType(ORT_CALL* GetOutputType)(const OrtCustomOp*, size_t index);
  size_t(ORT_CALL* GetOutputTypeCount)(const OrtCustomOp*);
  void(ORT_CALL* KernelCompute)(void* kernel, OrtKernelContext*);
  void(ORT_CALL* KernelDestroy)(void* kernel);
  OrtCharacteristic(ORT_CALL* GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  OrtCharacteristic(ORT_CALL* GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  OrtMemType(ORT_CALL* GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int(ORT_CALL* GetVariadicInputMinArity)(const OrtCustomOp*);
  int(ORT_CALL* GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int(ORT_CALL* GetVariadicOutputMinArity)(const OrtCustomOp*);
  int(ORT_CALL* GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus*(ORT_CALL* CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus*(ORT_CALL* KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus*(ORT_CALL* InferOutputShape)(const OrtCustomOp*, OrtShapeInferContext*);
  int(ORT_CALL* GetStartVersion)(const OrtCustomOp*);
  int(ORT_CALL* GetEndVersion)(const OrtCustomOp*);
  size_t(ORT_CALL* GetMayInplace)(int** input_index, int** output_index);
  void(ORT_CALL* ReleaseMayInplace)(int* input_index, int* output_index);
  size_t(ORT_CALL* GetAliasMap)(int** input_index, int** output_index);
  void(ORT_CALL* ReleaseAliasMap)(int* input_index, int* output_index);
};
static_assert(sizeof(void*) != 8 || sizeof(OrtCustomOp) == 208, "26 fields, as in version 18");

}  // extern "C"

namespace ort {

constexpr uint32_t kVersion = 18;
constexpr int kShapeReferenceVersion = 24;

// The functions of the table, with their places in it. Each returns nullptr or a status to hand on.
struct Api {
  const OrtApi* table;
  bool has_shape_reference;

  template <class Function>
  Function at(int place) const {
    return reinterpret_cast<Function>(const_cast<void*>(table->functions[place]));
  }

  OrtStatus* create_status(OrtErrorCode code, const char* message) const {
    return at<OrtStatus*(ORT_CALL*)(OrtErrorCode, const char*)>(0)(code, message);
  }
  OrtStatus* create_domain(const char* name, OrtCustomOpDomain** domain) const {
    return at<OrtStatus*(ORT_CALL*)(const char*, OrtCustomOpDomain**)>(26)(name, domain);
  }
  OrtStatus* add_op(OrtCustomOpDomain* domain, const OrtCustomOp* op) const {
    return at<OrtStatus*(ORT_CALL*)(OrtCustomOpDomain*, const OrtCustomOp*)>(27)(domain, op);
  }
  OrtStatus* add_domain(OrtSessionOptions* options, OrtCustomOpDomain* domain) const {
    return at<OrtStatus*(ORT_CALL*)(OrtSessionOptions*, OrtCustomOpDomain*)>(28)(options, domain);
  }
  OrtStatus* data(OrtValue* value, void** data) const {
    return at<OrtStatus*(ORT_CALL*)(OrtValue*, void**)>(51)(value, data);
  }
  OrtStatus* rank(const OrtTensorTypeAndShapeInfo* info, size_t* rank) const {
    return at<OrtStatus*(ORT_CALL*)(const OrtTensorTypeAndShapeInfo*, size_t*)>(61)(info, rank);
  }
  OrtStatus* sizes(const OrtTensorTypeAndShapeInfo* info, int64_t* sizes, size_t rank) const {
    return at<OrtStatus*(ORT_CALL*)(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>(62)(info, sizes, rank);
  }
  OrtStatus* info(const OrtValue* value, OrtTensorTypeAndShapeInfo** info) const {
    return at<OrtStatus*(ORT_CALL*)(const OrtValue*, OrtTensorTypeAndShapeInfo**)>(65)(value, info);
  }
  OrtStatus* input(const OrtKernelContext* context, size_t index, const OrtValue** value) const {
    return at<OrtStatus*(ORT_CALL*)(const OrtKernelContext*, size_t, const OrtValue**)>(90)(context, index, value);
  }
  OrtStatus* output(OrtKernelContext* context, size_t index, const int64_t* sizes, size_t rank, OrtValue** value) const {
    using Function = OrtStatus*(ORT_CALL*)(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**);
    return at<Function>(91)(context, index, sizes, rank, value);
  }
  void release_status(OrtStatus* status) const { at<void(ORT_CALL*)(OrtStatus*)>(93)(status); }
  void release_info(OrtTensorTypeAndShapeInfo* info) const {
    at<void(ORT_CALL*)(OrtTensorTypeAndShapeInfo*)>(99)(info);
  }
  OrtStatus* gpu_stream(const OrtKernelContext* context, void** stream) const {
    return at<OrtStatus*(ORT_CALL*)(const OrtKernelContext*, void**)>(193)(context, stream);
  }
  OrtStatus* inferred_input(const OrtShapeInferContext* context, size_t index, OrtTensorTypeAndShapeInfo** info) const {
    using Function = OrtStatus*(ORT_CALL*)(const OrtShapeInferContext*, size_t, OrtTensorTypeAndShapeInfo**);
    return at<Function>(268)(context, index, info);
  }
  OrtStatus* infer_output(const OrtShapeInferContext* context, size_t index,
                          const OrtTensorTypeAndShapeInfo* info) const {
    using Function = OrtStatus*(ORT_CALL*)(const OrtShapeInferContext*, size_t, const OrtTensorTypeAndShapeInfo*);
    return at<Function>(270)(context, index, info);
  }
  // A tensor's own sizes, without a copy on the heap; from kShapeReferenceVersion on.
  OrtStatus* shape_reference(const OrtValue* value, OrtElementType* element, const int64_t** sizes,
                             size_t* rank) const {
    using Function = OrtStatus*(ORT_CALL*)(const OrtValue*, OrtElementType*, const int64_t**, size_t*);
    return at<Function>(414)(value, element, sizes, rank);
  }
  OrtStatus* parallel_for(const OrtKernelContext* context, void (*task)(void*, size_t), size_t count, size_t batches,
                          void* data) const {
    using Function = OrtStatus*(ORT_CALL*)(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*);
    return at<Function>(274)(context, task, count, batches, data);
  }
};

}  // namespace ort
