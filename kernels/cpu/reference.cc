// The obvious loops. Slow on purpose: nothing here can be wrong for a reason of speed.
#include "job.h"
#include "number.h"

namespace {

float read(const void* data, DiabloType type, int64_t at) {
  switch (type) {
    case DIABLO_F16:
      return to_float(static_cast<const Half*>(data)[at]);
    case DIABLO_BF16:
      return to_float(static_cast<const Brain*>(data)[at]);
    case DIABLO_I8:
      return to_float(static_cast<const int8_t*>(data)[at]);
    default:
      return static_cast<const float*>(data)[at];
  }
}

void write(void* data, DiabloType type, int64_t at, float value) {
  switch (type) {
    case DIABLO_F16:
      return from_float(value, static_cast<Half*>(data)[at]);
    case DIABLO_BF16:
      return from_float(value, static_cast<Brain*>(data)[at]);
    default:
      return from_float(value, static_cast<float*>(data)[at]);
  }
}

}  // namespace

DiabloError diablo_block_diag_reference(const DiabloShape* shape, const void* x, const void* blocks,
                                        const float* scales, const void* y0, void* y) {
  const DiabloError error = diablo_check(shape);
  if (error != DIABLO_OK) return error;
  const DiabloShape& s = *shape;
  const bool empty = s.num_blocks == 0 || s.block_size_in == 0 || s.block_size_out == 0;
  if (s.block_type == DIABLO_I8 && scales == nullptr && !empty) return DIABLO_NO_SCALES;
  for (int64_t row = 0; row < s.rows; ++row) {
    for (int64_t output = 0; output < s.out_features; ++output) {
      double sum = read(y0, s.type, row * s.y_stride + output);
      if (!empty) {
        const int64_t block = output / s.block_size_out, column = output % s.block_size_out;
        const double scale = s.block_type == DIABLO_I8 ? scales[block] : 1.0;
        for (int64_t k = 0; k < s.block_size_in; ++k) {
          const int64_t input = block * s.block_size_in + k;
          if (input >= s.in_features) break;
          sum += static_cast<double>(read(x, s.type, row * s.x_stride + input)) * scale *
                 read(blocks, s.block_type, input * s.block_size_out + column);
        }
      }
      write(y, s.type, row * s.y_stride + output, static_cast<float>(sum));
    }
  }
  return DIABLO_OK;
}
