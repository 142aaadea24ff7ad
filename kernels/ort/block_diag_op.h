// The operators ai.diablo::BlockDiagMatMul and BlockDiagMatMulInt8 for ONNX Runtime, one for each pair of types.
#pragma once

#include "diablo/block_diag.h"
#include "ort_abi.h"

namespace diablo {

enum class Device { kCpu, kCuda };

// What ONNX Runtime sees of one kernel. It has no state: the same object is the operator and its kernel.
struct BlockDiagOp : OrtCustomOp {
  DiabloType type, block_type;  // of X, Y0 and Y; of D, where int8 makes it BlockDiagMatMulInt8
  Device device;
  ort::Api api;

  BlockDiagOp(DiabloType type, DiabloType block_type, Device device, ort::Api api);
  OrtStatus* compute(OrtKernelContext* context) const;

  bool scaled() const { return block_type == DIABLO_I8; }
  const char* name() const { return scaled() ? "BlockDiagMatMulInt8" : "BlockDiagMatMul"; }
};

}  // namespace diablo
