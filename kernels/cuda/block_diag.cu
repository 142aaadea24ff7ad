// The branch on CUDA devices: types, launches, errors.
//
// Sums are float32, as on the CPU. Nothing is allocated and nothing waited for, and all goes to the caller's stream, so
// that a launch can be captured into a CUDA graph.
#include "device.cuh"

#include "matrix.cuh"

namespace {

using namespace diablo;

bool starts_whole(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <class T, class B>
constexpr bool kOnTensorCores = fits_tensor_cores(type_of(T()), type_of(B()));

template <class T, class B, int Vector>
void launch_few(const Job<T, B>& job, dim3 grid, cudaStream_t stream) {
  if (job.launch.rows_per_tile == 1)
    few_rows<T, B, Vector, 1><<<grid, kFewThreads, 0, stream>>>(job);
  else if (kOnTensorCores<T, B> || job.launch.rows_per_tile == 4)
    few_rows<T, B, Vector, 4><<<grid, kFewThreads, 0, stream>>>(job);
  else if constexpr (!kOnTensorCores<T, B>)
    few_rows<T, B, Vector, 8><<<grid, kFewThreads, 0, stream>>>(job);
}

template <class T, class B>
void launch_many(const Job<T, B>& job, dim3 grid, cudaStream_t stream) {
  if constexpr (!kOnTensorCores<T, B>)
    many_rows<T, B><<<grid, kThreadsAcross * kThreadsAcross, 0, stream>>>(job);
  else if (job.launch.way == Way::kMatrix16)
    matrix_rows<T, B, Tile16><<<grid, kMatrixThreads, 0, stream>>>(job);
  else
    matrix_rows<T, B, Tile64><<<grid, kMatrixThreads, 0, stream>>>(job);
}

template <class T, class B>
cudaError_t launch(const DiabloShape& shape, const void* x, const void* blocks, const float* scales, const void* y0,
                   void* y, cudaStream_t stream) {
  const Aligned pointers{starts_whole(x, 16), starts_whole(blocks, sizeof(B) == 1 ? 8 : 16),
                         starts_whole(y0, 16) && starts_whole(y, 16)};
  const Job<T, B> job{shape,
                      launch_of(shape, pointers),
                      aligned_rows(shape, pointers),
                      static_cast<const T*>(x),
                      static_cast<const B*>(blocks),
                      scales,
                      static_cast<const T*>(y0),
                      static_cast<T*>(y)};
  if (job.launch.grid_x > INT32_MAX) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(job.launch.grid_x), static_cast<unsigned>(job.launch.grid_y));
  if (job.launch.way != Way::kFewRows)
    launch_many(job, grid, stream);
  else if (job.launch.vector > 1)
    launch_few<T, B, elements_per_load(type_of(B()))>(job, grid, stream);
  else
    launch_few<T, B, 1>(job, grid, stream);
  return cudaGetLastError();
}

using Launcher = cudaError_t (*)(const DiabloShape&, const void*, const void*, const float*, const void*, void*,
                                 cudaStream_t);

// The pairs that the operators have; nullptr for others, which the CPU alone computes.
template <class T>
Launcher launcher_of(DiabloType own, DiabloType block_type) {
  if (block_type == own) return launch<T, T>;
  if (block_type == DIABLO_I8) return launch<T, int8_t>;
  if (block_type == DIABLO_F16) return launch<T, __half>;
  return nullptr;
}

Launcher launcher_of(const DiabloShape& s) {
  if (s.type == DIABLO_F16) return launcher_of<__half>(DIABLO_F16, s.block_type);
  if (s.type == DIABLO_BF16) return launcher_of<__nv_bfloat16>(DIABLO_BF16, s.block_type);
  return launcher_of<float>(DIABLO_F32, s.block_type);
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
  const Launcher launcher = launcher_of(s);
  if (launcher == nullptr) return DIABLO_UNKNOWN_TYPE;
  cudaStream_t queue = static_cast<cudaStream_t>(stream);
  const cudaError_t code = empty ? copy(s, y0, y, queue) : launcher(s, x, blocks, used, y0, y, queue);
  if (code == cudaSuccess) return DIABLO_OK;
  if (cause != nullptr) *cause = cudaGetErrorString(code);
  return DIABLO_CUDA_FAILED;
}
