// int4 layers with their branches on CUDA devices: types, launches, errors.
#include "diablo/int4.h"

#include "device.cuh"

#include "int4.cuh"

namespace {

using namespace diablo;

constexpr int64_t kMostGroup = 4096, kMostSize = INT32_MAX / 2;  // what stays in 32 bits a few passes further

bool starts_whole(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <bool Whole, bool Zeros, int Warps, class T>
cudaError_t launch_with(const Int4Job<T>& job, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(job.tiles), static_cast<unsigned>(job.row_tiles < 65535 ? job.row_tiles : 65535));
  int4_rows<T, Whole, Zeros, Warps><<<grid, 32 * Warps, 0, stream>>>(job);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_rows(const DiabloInt4Layer* layers, int count, const void* x, cudaStream_t stream) {
  const Int4Job<T> job = int4_job<T>(layers, count, x);
  if (!job.whole) return launch_with<false, true, kInt4Warps>(job, stream);
  if (many_tiles(job.tiles * job.row_tiles))
    return job.zeros ? launch_with<true, true, kInt4WarpsOfMany>(job, stream)
                     : launch_with<true, false, kInt4WarpsOfMany>(job, stream);
  return job.zeros ? launch_with<true, true, kInt4Warps>(job, stream) : launch_with<true, false, kInt4Warps>(job, stream);
}

template <class T>
cudaError_t launch_dense(const DiabloInt4Layer& given, void* dense, cudaStream_t stream) {
  const int64_t inputs = given.shape.in_features, across = (inputs + kDenseInputs - 1) / kDenseInputs,
                down = (given.shape.out_features + kDenseOutputs - 1) / kDenseOutputs;
  if (across > 65535 || down > INT32_MAX) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(down), static_cast<unsigned>(across));
  int4_dense<T><<<grid, kDenseThreads, 0, stream>>>(int4_layer<T>(given, 0), static_cast<int>(inputs),
                                                    dense_aligned(dense, inputs), static_cast<T*>(dense));
  return cudaGetLastError();
}

DiabloError answer(cudaError_t code, const char** cause) {
  if (code == cudaSuccess) return DIABLO_OK;
  if (cause != nullptr) *cause = cudaGetErrorString(code);
  return DIABLO_CUDA_FAILED;
}

}  // namespace

int diablo_int4_takes(const DiabloInt4Layer* layers, int count) {
  if (count < 1 || count > DIABLO_INT4_LAYERS) return 0;
  const DiabloShape& first = layers[0].shape;
  const int64_t size = layers[0].weights.group_size;
  if (first.type != DIABLO_F16 && first.type != DIABLO_BF16) return 0;
  if (size < kInt4Lane || size > kMostGroup || (size & (size - 1)) != 0 || first.in_features > kMostSize) return 0;
  int64_t outputs = 0;
  for (const DiabloInt4Layer* layer = layers; layer != layers + count; ++layer) {
    const DiabloShape& s = layer->shape;
    if (s.type != first.type || s.block_type != first.type || s.rows != first.rows || s.x_stride != first.x_stride) return 0;
    if (s.in_features != first.in_features || layer->weights.group_size != size) return 0;
    if (!starts_whole(layer->weights.codes) || s.block_size_in > kMostSize || s.block_size_out > kMostSize) return 0;
    if (s.out_features > kMostSize - outputs) return 0;
    outputs += s.out_features;
  }
  return 1;
}

DiabloError diablo_int4_cuda(const DiabloInt4Layer* layers, int count, const void* x, void* stream, const char** cause) {
  for (int i = 0; i < count; ++i) {
    const DiabloError error = diablo_check(&layers[i].shape);
    if (error != DIABLO_OK) return error;
  }
  if (!diablo_int4_takes(layers, count)) return DIABLO_UNKNOWN_TYPE;
  int64_t outputs = 0;
  for (int i = 0; i < count; ++i) outputs += layers[i].shape.out_features;
  if (layers[0].shape.rows == 0 || outputs == 0) return DIABLO_OK;
  cudaStream_t queue = static_cast<cudaStream_t>(stream);
  return answer(layers[0].shape.type == DIABLO_F16 ? launch_rows<__half>(layers, count, x, queue)
                                                   : launch_rows<__nv_bfloat16>(layers, count, x, queue),
                cause);
}

DiabloError diablo_int4_dense_cuda(const DiabloInt4Layer* layer, void* dense, void* stream, const char** cause) {
  const DiabloShape& s = layer->shape;
  const DiabloError error = diablo_check(&s);
  if (error != DIABLO_OK) return error;
  if (!diablo_int4_takes(layer, 1)) return DIABLO_UNKNOWN_TYPE;
  if (s.in_features == 0 || s.out_features == 0) return DIABLO_OK;
  cudaStream_t queue = static_cast<cudaStream_t>(stream);
  return answer(s.type == DIABLO_F16 ? launch_dense<__half>(*layer, dense, queue)
                                     : launch_dense<__nv_bfloat16>(*layer, dense, queue),
                cause);
}
