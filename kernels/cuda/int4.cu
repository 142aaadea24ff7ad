// The int4 layer with its branch on CUDA devices: types, launches, errors.
#include "diablo/int4.h"

#include "device.cuh"

#include "int4.cuh"

namespace {

using namespace diablo;

bool starts_whole(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool is_empty(const DiabloShape& s) { return s.num_blocks == 0 || s.block_size_in == 0 || s.block_size_out == 0; }

template <class T>
cudaError_t launch(const DiabloShape& s, const DiabloInt4& weights, const void* x, const void* blocks, void* y,
                   cudaStream_t stream) {
  const int64_t tiles = (s.rows + kInt4Rows - 1) / kInt4Rows, columns = (s.out_features + kInt4Outputs - 1) / kInt4Outputs;
  const Int4Job<T> job{s,
                       (s.in_features + weights.group_size - 1) / weights.group_size,
                       static_cast<int>(weights.group_size),
                       tiles,
                       starts_whole(x) && s.x_stride % 8 == 0,
                       !is_empty(s),
                       static_cast<const T*>(x),
                       static_cast<const uint8_t*>(weights.codes),
                       static_cast<const T*>(weights.scales),
                       weights.zeros,
                       static_cast<const T*>(blocks),
                       static_cast<T*>(y)};
  if (columns > INT32_MAX) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(tiles < 65535 ? tiles : 65535));
  int4_rows<T><<<grid, kInt4Threads, 0, stream>>>(job);
  return cudaGetLastError();
}

}  // namespace

int diablo_int4_takes(const DiabloShape* shape, const DiabloInt4* weights) {
  const bool type = shape->type == DIABLO_F16 || shape->type == DIABLO_BF16;
  return type && shape->block_type == shape->type && weights->group_size > 0 && weights->group_size % kInt4Lane == 0 &&
         weights->group_size <= 4096 && starts_whole(weights->codes);
}

DiabloError diablo_int4_cuda(const DiabloShape* shape, const DiabloInt4* weights, const void* x, const void* blocks,
                             void* y, void* stream, const char** cause) {
  const DiabloError error = diablo_check(shape);
  if (error != DIABLO_OK) return error;
  if (!diablo_int4_takes(shape, weights)) return DIABLO_UNKNOWN_TYPE;
  if (shape->rows == 0 || shape->out_features == 0) return DIABLO_OK;
  cudaStream_t queue = static_cast<cudaStream_t>(stream);
  const cudaError_t code = shape->type == DIABLO_F16 ? launch<__half>(*shape, *weights, x, blocks, y, queue)
                                                     : launch<__nv_bfloat16>(*shape, *weights, x, blocks, y, queue);
  if (code == cudaSuccess) return DIABLO_OK;
  if (cause != nullptr) *cause = cudaGetErrorString(code);
  return DIABLO_CUDA_FAILED;
}
