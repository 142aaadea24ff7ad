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
struct OrtOp;
struct OrtOpAttr;
struct OrtMemoryInfo;
struct OrtAllocator;

struct OrtApi {
  const void* functions[1];  // as many as the version has
};

struct OrtApiBase {
  const OrtApi*(ORT_CALL* GetApi)(uint32_t version);
  const char*(ORT_CALL* GetVersionString)();
};

enum OrtElementType : int {
  kOrtFloat = 1,
  kOrtUint8 = 2,
  kOrtInt8 = 3,
  kOrtInt32 = 6,
  kOrtFloat16 = 10,
  kOrtBFloat16 = 16
};
enum OrtCharacteristic : int { kOrtRequired = 0, kOrtOptional = 1 };
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
  OrtStatus* attribute(const OrtKernelInfo* info, const char* name, int64_t* value) const {
    return at<OrtStatus*(ORT_CALL*)(const OrtKernelInfo*, const char*, int64_t*)>(86)(info, name, value);
  }
  OrtStatus* info_input_count(const OrtKernelInfo* info, size_t* count) const {
    return at<OrtStatus*(ORT_CALL*)(const OrtKernelInfo*, size_t*)>(230)(info, count);
  }
  // Operators of ONNX Runtime's own, to be called from within a kernel; an attribute is one integer here.
  OrtStatus* create_attribute(const char* name, const int64_t* value, OrtOpAttr** attribute) const {
    using Function = OrtStatus*(ORT_CALL*)(const char*, const void*, int, int, OrtOpAttr**);
    constexpr int kInteger = 1;
    return at<Function>(211)(name, value, 1, kInteger, attribute);
  }
  void release_attribute(OrtOpAttr* attribute) const { at<void(ORT_CALL*)(OrtOpAttr*)>(212)(attribute); }
  OrtStatus* create_op(const OrtKernelInfo* info, const char* name, const char* domain, int version,
                       const char** constraints, const OrtElementType* types, int constraint_count,
                       const OrtOpAttr* const* attributes, int attribute_count, int inputs, int outputs,
                       OrtOp** op) const {
    using Function = OrtStatus*(ORT_CALL*)(const OrtKernelInfo*, const char*, const char*, int, const char**,
                                           const OrtElementType*, int, const OrtOpAttr* const*, int, int, int, OrtOp**);
    return at<Function>(213)(info, name, domain, version, constraints, types, constraint_count, attributes,
                             attribute_count, inputs, outputs, op);
  }
  OrtStatus* invoke(const OrtKernelContext* context, const OrtOp* op, const OrtValue* const* inputs, int input_count,
                    OrtValue* const* outputs, int output_count) const {
    using Function = OrtStatus*(ORT_CALL*)(const OrtKernelContext*, const OrtOp*, const OrtValue* const*, int,
                                           OrtValue* const*, int);
    return at<Function>(214)(context, op, inputs, input_count, outputs, output_count);
  }
  void release_op(OrtOp* op) const { at<void(ORT_CALL*)(OrtOp*)>(215)(op); }
  // Memory for the length of a call, on its stream, and a tensor in it; the caller gives back both.
  OrtStatus* memory_info(const OrtValue* value, const OrtMemoryInfo** info) const {
    return at<OrtStatus*(ORT_CALL*)(const OrtValue*, const OrtMemoryInfo**)>(194)(value, info);
  }
  OrtStatus* borrow(const OrtKernelContext* context, const OrtMemoryInfo* info, size_t bytes, void** memory) const {
    using Function = OrtStatus*(ORT_CALL*)(const OrtKernelContext*, const OrtMemoryInfo*, size_t, void**);
    return at<Function>(277)(context, info, bytes, memory);
  }
  OrtStatus* give_back(const OrtKernelContext* context, const OrtMemoryInfo* info, void* memory) const {
    OrtAllocator* allocator = nullptr;
    using Function = OrtStatus*(ORT_CALL*)(const OrtKernelContext*, const OrtMemoryInfo*, OrtAllocator**);
    if (OrtStatus* status = at<Function>(253)(context, info, &allocator)) return status;
    OrtStatus* status = at<OrtStatus*(ORT_CALL*)(OrtAllocator*, void*)>(76)(allocator, memory);
    at<void(ORT_CALL*)(OrtAllocator*)>(132)(allocator);
    return status;
  }
  OrtStatus* tensor_in(const OrtMemoryInfo* info, void* memory, size_t bytes, const int64_t* sizes, size_t rank,
                       OrtElementType element, OrtValue** value) const {
    using Function =
        OrtStatus*(ORT_CALL*)(const OrtMemoryInfo*, void*, size_t, const int64_t*, size_t, OrtElementType, OrtValue**);
    return at<Function>(49)(info, memory, bytes, sizes, rank, element, value);
  }
  void release_value(OrtValue* value) const { at<void(ORT_CALL*)(OrtValue*)>(96)(value); }
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
