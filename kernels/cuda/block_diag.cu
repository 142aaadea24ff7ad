// The branch on CUDA devices: one kernel for few rows, which reads each block once, and a tiled one for many.
//
// Sums are float32, as on the CPU. No tensor cores: the branch is small beside the layer that it follows. Nothing is
// allocated and nothing waited for, so that a launch can be captured into a CUDA graph.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(int8_t value) { return static_cast<float>(value); }

__device__ inline void from_float(float value, float& to) { to = value; }
__device__ inline void from_float(float value, __half& to) { to = __float2half_rn(value); }
__device__ inline void from_float(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }

}  // namespace

#include "kernels.cuh"

namespace {

using namespace diablo;

template <class T, class B>
cudaError_t launch(const DiabloShape& shape, const void* x, const void* blocks, const float* scales, const void* y0,
                   void* y, cudaStream_t stream) {
  const Job<T, B> job{shape,  launch_of(shape),     static_cast<const T*>(x), static_cast<const B*>(blocks),
                      scales, static_cast<const T*>(y0), static_cast<T*>(y)};
  if (job.launch.grid_x > INT32_MAX) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(job.launch.grid_x), static_cast<unsigned>(job.launch.grid_y));
  if (job.launch.few) {
    few_rows<T, B><<<grid, dim3(kFewColumns, kFewSplits), 0, stream>>>(job);
  } else {
    many_rows<T, B><<<grid, dim3(kThreadsAcross * kThreadsAcross), 0, stream>>>(job);
  }
  return cudaGetLastError();
}

using Launcher = cudaError_t (*)(const DiabloShape&, const void*, const void*, const float*, const void*, void*,
                                 cudaStream_t);

template <class T>
Launcher launcher_of(DiabloType block_type) {
  switch (block_type) {
    case DIABLO_F16:
      return launch<T, __half>;
    case DIABLO_BF16:
      return launch<T, __nv_bfloat16>;
    case DIABLO_I8:
      return launch<T, int8_t>;
    default:
      return launch<T, float>;
  }
}

Launcher launcher_of(const DiabloShape& s) {
  switch (s.type) {
    case DIABLO_F16:
      return launcher_of<__half>(s.block_type);
    case DIABLO_BF16:
      return launcher_of<__nv_bfloat16>(s.block_type);
    default:
      return launcher_of<float>(s.block_type);
  }
}

cudaError_t copy(const DiabloShape& s, const void* y0, void* y, cudaStream_t stream) {
  if (y0 == y) return cudaSuccess;
  const size_t size = s.type == DIABLO_F32 ? 4 : 2, pitch = static_cast<size_t>(s.y_stride) * size;
  const size_t width = static_cast<size_t>(s.out_features) * size, rows = static_cast<size_t>(s.rows);
  // One run where it can be: a pitch has a limit of its own
  if (rows == 1 || pitch == width) return cudaMemcpyAsync(y, y0, width * rows, cudaMemcpyDeviceToDevice, stream);
  return cudaMemcpy2DAsync(y, pitch, y0, pitch, width, rows, cudaMemcpyDeviceToDevice, stream);
}

}  // namespace

DiabloError diablo_block_diag_cuda(const DiabloShape* shape, const void* x, const void* blocks, const float* scales,
                                   const void* y0, void* y, void* stream, const char** cause) {
  const DiabloError error = diablo_check(shape);
  if (error != DIABLO_OK) return error;
  const DiabloShape& s = *shape;
  if (s.rows == 0 || s.out_features == 0) return DIABLO_OK;
  const bool empty = s.num_blocks == 0 || s.block_size_in == 0 || s.block_size_out == 0;
  if (s.block_type == DIABLO_I8 && scales == nullptr && !empty) return DIABLO_NO_SCALES;
  const float* used = s.block_type == DIABLO_I8 ? scales : nullptr;
  cudaStream_t queue = static_cast<cudaStream_t>(stream);
  const cudaError_t code = empty ? copy(s, y0, y, queue) : launcher_of(s)(s, x, blocks, used, y0, y, queue);
  if (code == cudaSuccess) return DIABLO_OK;
  if (cause != nullptr) *cause = cudaGetErrorString(code);
  return DIABLO_CUDA_FAILED;
}
