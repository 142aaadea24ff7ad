// The operator ai.diablo::BlockDiagMatMul for ONNX Runtime, one for each element type.
#pragma once

#include "diablo/block_diag.h"
#include "ort_abi.h"

namespace diablo {

// What ONNX Runtime sees of one kernel. It has no state: the same object is the operator and its kernel.
struct BlockDiagOp : OrtCustomOp {
  DiabloType type;
  ort::Api api;

  BlockDiagOp(DiabloType type, ort::Api api);
  OrtStatus* compute(OrtKernelContext* context) const;
};

}  // namespace diablo
