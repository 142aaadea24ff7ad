// The part of onnxruntime_c_api.h that swap.cpp calls, for machines without that header: no package of ONNX Runtime for
// Python or node brings it. The table of functions only grows at its end, so a place in it is good for every later
// version; names and signatures are those of the header, which replaces this file wherever the compiler finds it.
#pragma once

#include <cstddef>
#include <cstdint>

#define ORT_API_VERSION 20  // the first with adapters

extern "C" {

struct OrtStatus;
struct OrtEnv;
struct OrtSession;
struct OrtSessionOptions;
struct OrtRunOptions;
struct OrtAllocator;
struct OrtMemoryInfo;
struct OrtValue;
struct OrtTypeInfo;
struct OrtTensorTypeAndShapeInfo;
struct OrtLoraAdapter;

typedef enum { ORT_LOGGING_LEVEL_ERROR = 3 } OrtLoggingLevel;
typedef enum { OrtArenaAllocator = 1 } OrtAllocatorType;
typedef enum { OrtMemTypeDefault = 0 } OrtMemType;
typedef enum {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7
} ONNXTensorElementDataType;

struct OrtApi {
  const void* before_2[2];
  const char* (*GetErrorMessage)(const OrtStatus*);
  OrtStatus* (*CreateEnv)(OrtLoggingLevel, const char* log_id, OrtEnv**);
  const void* before_7[3];
  OrtStatus* (*CreateSession)(const OrtEnv*, const char* path, const OrtSessionOptions*, OrtSession**);
  const void* before_9[1];
  OrtStatus* (*Run)(OrtSession*, const OrtRunOptions*, const char* const* input_names, const OrtValue* const* inputs,
                    size_t input_count, const char* const* output_names, size_t output_count, OrtValue** outputs);
  OrtStatus* (*CreateSessionOptions)(OrtSessionOptions**);
  const void* before_30[19];
  OrtStatus* (*SessionGetInputCount)(const OrtSession*, size_t*);
  OrtStatus* (*SessionGetOutputCount)(const OrtSession*, size_t*);
  const void* before_33[1];
  OrtStatus* (*SessionGetInputTypeInfo)(const OrtSession*, size_t index, OrtTypeInfo**);
  const void* before_36[2];
  OrtStatus* (*SessionGetInputName)(const OrtSession*, size_t index, OrtAllocator*, char**);
  OrtStatus* (*SessionGetOutputName)(const OrtSession*, size_t index, OrtAllocator*, char**);
  const void* before_39[1];
  OrtStatus* (*CreateRunOptions)(OrtRunOptions**);
  const void* before_49[9];
  OrtStatus* (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo*, void* data, size_t bytes, const int64_t* shape,
                                               size_t rank, ONNXTensorElementDataType, OrtValue**);
  const void* before_51[1];
  OrtStatus* (*GetTensorMutableData)(OrtValue*, void**);
  const void* before_55[3];
  OrtStatus* (*CastTypeInfoToTensorInfo)(const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo**);
  const void* before_61[5];
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo*, size_t*);
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t rank);
  const void* before_65[2];
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue*, OrtTensorTypeAndShapeInfo**);
  const void* before_69[3];
  OrtStatus* (*CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo**);
  const void* before_76[6];
  OrtStatus* (*AllocatorFree)(OrtAllocator*, void*);
  const void* before_78[1];
  OrtStatus* (*GetAllocatorWithDefaultOptions)(OrtAllocator**);
  const void* before_92[13];
  void (*ReleaseEnv)(OrtEnv*);
  void (*ReleaseStatus)(OrtStatus*);
  void (*ReleaseMemoryInfo)(OrtMemoryInfo*);
  void (*ReleaseSession)(OrtSession*);
  void (*ReleaseValue)(OrtValue*);
  void (*ReleaseRunOptions)(OrtRunOptions*);
  void (*ReleaseTypeInfo)(OrtTypeInfo*);
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo*);
  void (*ReleaseSessionOptions)(OrtSessionOptions*);
  const void* before_228[127];
  OrtStatus* (*RegisterCustomOpsLibrary_V2)(OrtSessionOptions*, const char* path);
  const void* before_280[51];
  OrtStatus* (*CreateLoraAdapter)(const char* path, OrtAllocator*, OrtLoraAdapter**);
  const void* before_282[1];
  void (*ReleaseLoraAdapter)(OrtLoraAdapter*);
  OrtStatus* (*RunOptionsAddActiveLoraAdapter)(OrtRunOptions*, const OrtLoraAdapter*);
};

#define ORT_SUBSET_PLACE(function, place) \
  static_assert(offsetof(OrtApi, function) == (place) * sizeof(void*), "place in the table")
ORT_SUBSET_PLACE(Run, 9);
ORT_SUBSET_PLACE(SessionGetOutputName, 37);
ORT_SUBSET_PLACE(CreateTensorWithDataAsOrtValue, 49);
ORT_SUBSET_PLACE(GetTensorTypeAndShape, 65);
ORT_SUBSET_PLACE(ReleaseSessionOptions, 100);
ORT_SUBSET_PLACE(RegisterCustomOpsLibrary_V2, 228);
ORT_SUBSET_PLACE(RunOptionsAddActiveLoraAdapter, 283);
#undef ORT_SUBSET_PLACE

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

}  // extern "C"
