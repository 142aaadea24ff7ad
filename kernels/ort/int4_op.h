// The operator ai.diablo::MatMulNBitsBlockDiag for ONNX Runtime: com.microsoft's MatMulNBits and the branch as one node.
#pragma once

#include "op.h"

namespace diablo {

// What ONNX Runtime sees of it, for X, scales, blocks and Y of one type.
struct Int4Op : Op {
  Int4Op(DiabloType type, Device device, ort::Api api);
};

}  // namespace diablo
