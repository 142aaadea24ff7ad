// The kernels themselves: plain CUDA C++, which cuda_test.cc also compiles for the CPU. Whoever includes this has
// to_float and from_float for the types, as in number.h.
#pragma once

#include "launch.h"

namespace diablo {

template <class T, class B>
struct Job {
  DiabloShape shape;
  Launch launch;
  const T* x;
  const B* blocks;
  const float* scales;  // NULL: all 1
  const T* y0;
  T* y;
};

// Neighbouring threads read neighbouring columns; kFewSplits warps share the depth and add up at the end. Each element
// of the block is used by kFewRows rows while it is in a register.
template <class T, class B>
__global__ void __launch_bounds__(kFewColumns * kFewSplits) few_rows(const Job<T, B> job) {
  __shared__ float sums[kFewSplits][kFewRows][kFewColumns];
  const DiabloShape& s = job.shape;
  const Area area = area_of(s, job.launch, blockIdx.x);
  const int column = threadIdx.x, split = threadIdx.y;
  const B* block = job.blocks + area.block * s.block_size_in * s.block_size_out + area.first_column + column;
  for (int64_t tile = blockIdx.y; tile < job.launch.row_tiles; tile += gridDim.y) {
    const int64_t row = tile * kFewRows;
    float sum[kFewRows] = {};
    if (column < area.columns) {
#pragma unroll 8
      for (int64_t k = split; k < area.depth; k += kFewSplits) {
        const float d = to_float(block[k * s.block_size_out]);
#pragma unroll
        for (int r = 0; r < kFewRows; ++r)
          if (row + r < s.rows) sum[r] += to_float(job.x[(row + r) * s.x_stride + area.input + k]) * d;
      }
    }
#pragma unroll
    for (int r = 0; r < kFewRows; ++r) sums[split][r][column] = sum[r];
    __syncthreads();
    const int r = split;  // one warp for each row
    if (r < kFewRows && row + r < s.rows && column < area.columns) {
      float total = 0;
#pragma unroll
      for (int i = 0; i < kFewSplits; ++i) total += sums[i][r][column];
      const float scale = job.scales == nullptr ? 1.0f : job.scales[area.block];
      const int64_t at = (row + r) * s.y_stride + area.output + column;
      from_float(to_float(job.y0[at]) + scale * total, job.y[at]);
    }
    __syncthreads();
  }
}

// The classic tiled product: kStep of x and of the block go through shared memory, each thread sums kEach x kEach
// outputs.
template <class T, class B>
__global__ void __launch_bounds__(kThreadsAcross * kThreadsAcross) many_rows(const Job<T, B> job) {
  __shared__ float x_tile[kStep][kTile + 4];  // transposed; the gap spreads a column over the banks
  __shared__ float d_tile[kStep][kTile];
  const DiabloShape& s = job.shape;
  const Area area = area_of(s, job.launch, blockIdx.x);
  const B* block = job.blocks + area.block * s.block_size_in * s.block_size_out + area.first_column;
  const int thread = threadIdx.x, down = thread / kThreadsAcross, across = thread % kThreadsAcross;
  constexpr int kThreads = kThreadsAcross * kThreadsAcross;

  for (int64_t tile = blockIdx.y; tile < job.launch.row_tiles; tile += gridDim.y) {
    const int64_t row = tile * kTile;
    float sums[kEach][kEach] = {};
    for (int64_t k = 0; k < area.depth; k += kStep) {
#pragma unroll
      for (int i = thread; i < kTile * kStep; i += kThreads) {
        const int r = i / kStep, depth = i % kStep;
        const bool there = row + r < s.rows && k + depth < area.depth;
        x_tile[depth][r] = there ? to_float(job.x[(row + r) * s.x_stride + area.input + k + depth]) : 0.0f;
      }
#pragma unroll
      for (int i = thread; i < kTile * kStep; i += kThreads) {
        const int depth = i / kTile, column = i % kTile;
        const bool there = column < area.columns && k + depth < area.depth;
        d_tile[depth][column] = there ? to_float(block[(k + depth) * s.block_size_out + column]) : 0.0f;
      }
      __syncthreads();
#pragma unroll
      for (int depth = 0; depth < kStep; ++depth) {
        float x[kEach], d[kEach];
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          x[i] = x_tile[depth][down * kEach + i];
          d[i] = d_tile[depth][across + i * kThreadsAcross];
        }
#pragma unroll
        for (int i = 0; i < kEach; ++i)
#pragma unroll
          for (int j = 0; j < kEach; ++j) sums[i][j] += x[i] * d[j];
      }
      __syncthreads();
    }
    const float scale = job.scales == nullptr ? 1.0f : job.scales[area.block];
#pragma unroll
    for (int i = 0; i < kEach; ++i)
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int64_t r = row + down * kEach + i;
        const int column = across + j * kThreadsAcross;
        if (r >= s.rows || column >= area.columns) continue;
        const int64_t at = r * s.y_stride + area.output + column;
        from_float(to_float(job.y0[at]) + scale * sums[i][j], job.y[at]);
      }
  }
}

}  // namespace diablo
