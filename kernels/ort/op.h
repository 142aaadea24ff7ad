// What every operator here has in common: one output, all in the device's own memory, every version from 1 on.
#pragma once

#include <climits>

#include "diablo/block_diag.h"
#include "ort_abi.h"

#ifndef DIABLO_CUDA_PROVIDER
#define DIABLO_CUDA_PROVIDER "CUDAExecutionProvider"  // a test takes another, where there is no GPU
#endif

namespace diablo {

enum class Device { kCpu, kCuda };

inline OrtElementType element_of(DiabloType type) {
  switch (type) {
    case DIABLO_F16:
      return kOrtFloat16;
    case DIABLO_BF16:
      return kOrtBFloat16;
    case DIABLO_I8:
      return kOrtInt8;
    default:
      return kOrtFloat;
  }
}

// What ONNX Runtime sees of one kernel; who derives from it adds the name, the inputs and the kernel itself.
struct Op : OrtCustomOp {
  DiabloType type;  // of X and Y
  Device device;
  ort::Api api;

  Op(DiabloType element_type, Device runs_on, ort::Api table)
      : OrtCustomOp{}, type(element_type), device(runs_on), api(table) {
    version = ort::kVersion;
    GetExecutionProviderType = [](const OrtCustomOp* op) -> const char* {
      return of(op).device == Device::kCuda ? DIABLO_CUDA_PROVIDER : "CPUExecutionProvider";
    };
    GetOutputType = [](const OrtCustomOp* op, size_t) { return element_of(of(op).type); };
    GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
    GetInputCharacteristic = GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return kOrtRequired; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return kOrtMemDefault; };
    GetVariadicInputMinArity = GetVariadicInputHomogeneity = one;
    GetVariadicOutputMinArity = GetVariadicOutputHomogeneity = one;
    GetStartVersion = one;
    GetEndVersion = [](const OrtCustomOp*) { return INT_MAX; };
  }

 private:
  static const Op& of(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }
  static int ORT_CALL one(const OrtCustomOp*) { return 1; }
};

}  // namespace diablo
