// The int4 kernels on the emulated device behind the C interface, for trying gpu/ where there is no GPU.
#include "../ort/export.h"
#include "int4_grid.h"

namespace {

std::mt19937 order(1);  // of the threads

DiabloError known(const DiabloShape& s) {
  return s.type == DIABLO_F16 || s.type == DIABLO_BF16 ? DIABLO_OK : DIABLO_UNKNOWN_TYPE;
}

}  // namespace

DIABLO_EXPORT DiabloError diablo_int4_emulated(const DiabloInt4Layer* layers, int count, const void* x, void*, const char**) {
  if (known(layers->shape) != DIABLO_OK || layers->shape.rows == 0) return known(layers->shape);
  if (layers->shape.type == DIABLO_F16)
    diablo::run_int4<Half, diablo::kInt4Warps>(layers, count, x, order, 1);
  else
    diablo::run_int4<Brain, diablo::kInt4Warps>(layers, count, x, order, 1);
  return DIABLO_OK;
}

DIABLO_EXPORT DiabloError diablo_int4_dense_emulated(const DiabloInt4Layer* layer, void* dense, void*, const char**) {
  if (known(layer->shape) != DIABLO_OK) return DIABLO_UNKNOWN_TYPE;
  if (layer->shape.type == DIABLO_F16)
    diablo::run_dense<Half>(*layer, dense, order);
  else
    diablo::run_dense<Brain>(*layer, dense, order);
  return DIABLO_OK;
}
