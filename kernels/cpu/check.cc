// Whether sizes fit together, and what to say where they do not. Shared by every device.
#include "diablo/block_diag.h"

namespace {

// num_blocks · size ≥ features, without a product that could overflow.
bool covers(int64_t num_blocks, int64_t size, int64_t features) {
  return features / size + (features % size != 0) <= num_blocks;
}

}  // namespace

DiabloError diablo_check(const DiabloShape* shape) {
  const DiabloShape& s = *shape;
  const int64_t sizes[] = {s.rows, s.in_features, s.out_features, s.num_blocks, s.block_size_in, s.block_size_out};
  for (int64_t size : sizes)
    if (size < 0) return DIABLO_NEGATIVE_SIZE;
  if (s.rows > 1 && (s.x_stride < s.in_features || s.y_stride < s.out_features)) return DIABLO_ROWS_OVERLAP;
  if (s.type != DIABLO_F32 && s.type != DIABLO_F16 && s.type != DIABLO_BF16) return DIABLO_UNKNOWN_TYPE;
  if (s.num_blocks == 0 || s.block_size_in == 0 || s.block_size_out == 0) return DIABLO_OK;
  if (!covers(s.num_blocks, s.block_size_in, s.in_features)) return DIABLO_INPUTS_NOT_COVERED;
  if (!covers(s.num_blocks, s.block_size_out, s.out_features)) return DIABLO_OUTPUTS_NOT_COVERED;
  return DIABLO_OK;
}

const char* diablo_error_text(DiabloError error) {
  switch (error) {
    case DIABLO_OK:
      return "no error";
    case DIABLO_NEGATIVE_SIZE:
      return "a size is below 0";
    case DIABLO_INPUTS_NOT_COVERED:
      return "num_blocks * block_size_in is below the number of inputs";
    case DIABLO_OUTPUTS_NOT_COVERED:
      return "num_blocks * block_size_out is below the number of outputs";
    case DIABLO_ROWS_OVERLAP:
      return "a stride is below the length of a row";
    case DIABLO_UNKNOWN_TYPE:
      return "x and y must be float32, float16 or bfloat16, blocks on CUDA of that type, float16 or int8";
    case DIABLO_NO_SCALES:
      return "int8 blocks need scales";
    case DIABLO_NO_SUCH_ISA:
      return "this processor or this build does not have that instruction set";
    case DIABLO_CUDA_FAILED:
      return "CUDA refused the launch";
  }
  return "unknown error";
}
