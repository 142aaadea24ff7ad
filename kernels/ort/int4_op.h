// The operators ai.diablo::MatMulNBitsBlockDiag for ONNX Runtime: com.microsoft's MatMulNBits and the branch as one node;
// …Pair and …Triple are two and three such layers that read the same X.
#pragma once

#include "op.h"

namespace diablo {

// What ONNX Runtime sees of it, for X, scales, blocks and Y of one type.
struct Int4Op : Op {
  int layers;

  Int4Op(DiabloType type, Device device, int layers, ort::Api api);
};

}  // namespace diablo
