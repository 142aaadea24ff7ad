// The kernels for float32 sums on plain cores: for few rows, and tiles for many. Plain CUDA C++, which cuda_test.cc also
// compiles for the CPU. Whoever includes this has device.cuh, or the test's stand-in for it.
#pragma once

#include "launch.h"

namespace diablo {

template <class T, class B>
struct Job {
  DiabloShape shape;
  Launch launch;
  Aligned aligned;  // rows of x, of the blocks and of y, eight elements from any column that is a multiple of eight
  const T* x;
  const B* blocks;
  const float* scales;  // NULL: all 1
  const T* y0;
  T* y;
};

template <class T, class B>
__device__ inline float scale_of(const Job<T, B>& job, int64_t block) {
  return job.scales == nullptr ? 1.0f : job.scales[block];
}

// Each thread reads the same columns again and again, `vector` of them in one load, period rows further down for each
// group of threads; the groups' sums meet in shared memory. A load may end in the row below: `split` of its elements
// are of the first row.
// Two thread blocks at a time: left to itself ptxas takes fewer registers than it needs, and spills.
template <class T, class B, int Vector, int Rows>
__global__ void __launch_bounds__(kFewThreads, 2) few_rows(const Job<T, B> job) {
  constexpr int kPitch = kFewThreads + 32 / Vector;  // neither writing nor reading meets a bank twice
  __shared__ float sums[Vector][kPitch];
  const DiabloShape& s = job.shape;
  const Launch& launch = job.launch;
  const Area area = area_of(s, launch, blockIdx.x);
  const int thread = threadIdx.x, width = static_cast<int>(launch.columns_per_tile);
  const int group = thread / launch.slots, first = thread % launch.slots * Vector;
  const int down = first / width, column = first % width, split = width - column < Vector ? width - column : Vector;
  const int depth = static_cast<int>(area.depth), step = launch.groups * launch.period;
  const B* block = job.blocks + area.block * s.block_size_in * s.block_size_out + area.first_column + column;
  const int terms = launch.groups * launch.period, part = thread % launch.parts, mine = thread / launch.parts;
  const float scale = scale_of(job, area.block);

  for (int64_t tile = blockIdx.y; tile < launch.row_tiles; tile += gridDim.y) {
    const int64_t row = tile * Rows;
    const T* x = job.x + row * s.x_stride + area.input;
    const int64_t out = row * s.y_stride + area.output + mine;
    float y0[Rows] = {}, sum[Rows][Vector] = {};
#pragma unroll
    for (int r = 0; r < Rows; ++r)  // early, beside the blocks
      if (part == 0 && mine < area.columns && row + r < s.rows) y0[r] = to_float(job.y0[out + r * s.y_stride]);
    if (group < launch.groups && (column < area.columns || split < Vector)) {
#pragma unroll 4
      for (int k = group * launch.period + down; k < depth; k += step) {
        alignas(16) B d[Vector];
        if (Vector == 1)
          d[0] = block[static_cast<int64_t>(k) * s.block_size_out];
        else
          load_whole<Vector == 1 ? 16 : Vector * sizeof(B)>(block + static_cast<int64_t>(k) * s.block_size_out, d);
        const bool below = split < Vector && k + 1 < depth;
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
          if (row + r >= s.rows) continue;
          const float here = to_float(x[r * s.x_stride + k]);
          const float next = below ? to_float(x[r * s.x_stride + k + 1]) : 0.0f;
#pragma unroll
          for (int i = 0; i < Vector; ++i)
            if (i < split || below) sum[r][i] += (i < split ? here : next) * to_float(d[i]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
#pragma unroll
      for (int i = 0; i < Vector; ++i) sums[i][thread] = sum[r][i];
      __syncthreads();
      float total = 0;
      if (mine < area.columns) {
#pragma unroll 4
        for (int n = part; n < terms; n += launch.parts) {
          const int at = n * width + mine;
          total += sums[at % Vector][at / Vector];
        }
      }
      for (int bits = 1; bits < launch.parts; bits *= 2) total += __shfl_xor_sync(0xffffffffu, total, bits);
      if (part == 0 && mine < area.columns && row + r < s.rows)
        from_float(y0[r] + scale * total, job.y[out + r * s.y_stride]);
      __syncthreads();
    }
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
  constexpr int kThreads = kThreadsAcross * kThreadsAcross, kEachLoad = kTile * kStep / kThreads;

  for (int64_t tile = blockIdx.y; tile < job.launch.row_tiles; tile += gridDim.y) {
    const int64_t row = tile * kTile;
    float sums[kEach][kEach] = {};
    for (int64_t k = 0; k < area.depth; k += kStep) {
#pragma unroll
      for (int n = 0; n < kEachLoad; ++n) {
        const int i = n * kThreads + thread, r = i / kStep, depth = i % kStep;
        const bool there = row + r < s.rows && k + depth < area.depth;
        x_tile[depth][r] = there ? to_float(job.x[(row + r) * s.x_stride + area.input + k + depth]) : 0.0f;
      }
#pragma unroll
      for (int n = 0; n < kEachLoad; ++n) {
        const int i = n * kThreads + thread, depth = i / kTile, column = i % kTile;
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
    const float scale = scale_of(job, area.block);
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
