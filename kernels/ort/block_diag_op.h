// The operators ai.diablo::BlockDiagMatMul and BlockDiagMatMulInt8 for ONNX Runtime, one for each pair of types.
#pragma once

#include "op.h"

namespace diablo {

// What ONNX Runtime sees of one kernel. It has no state: the same object is the operator and its kernel.
struct BlockDiagOp : Op {
  DiabloType block_type;  // of D, where int8 makes it BlockDiagMatMulInt8

  BlockDiagOp(DiabloType type, DiabloType block_type, Device device, ort::Api api);
  OrtStatus* compute(OrtKernelContext* context) const;

  bool scaled() const { return block_type == DIABLO_I8; }
  const char* name() const { return scaled() ? "BlockDiagMatMulInt8" : "BlockDiagMatMul"; }
};

}  // namespace diablo
