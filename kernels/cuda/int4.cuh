// The int4 layer and its branch for few rows, in one pass over the codes.
//
// Tensor cores with the weight on the left: 16 outputs by 16 inputs, times 16 inputs by 8 rows of x, so that up to eight
// rows cost what one does. The order of the inputs within a product is free as long as both sides have the same: each
// lane takes 32 neighbouring ones, the codes in one load, in the order in which pairs of codes unpack. Other warps add
// the branch meanwhile.
#pragma once

#include <cstdint>

#include "diablo/block_diag.h"

namespace diablo {

constexpr int kInt4Outputs = 16, kInt4Rows = 8, kInt4Warps = 8, kBranchParts = 8;
constexpr int kBranchThreads = kInt4Outputs * kBranchParts;
constexpr int kInt4Threads = 32 * kInt4Warps + kBranchThreads;
constexpr int kInt4Lane = 32, kInt4Pass = 4 * kInt4Lane;  // inputs of a lane, and of a warp, at a time

template <class T>
struct Int4Job {
  DiabloShape shape;
  int64_t groups;
  int group_size;
  int64_t row_tiles;
  bool x_aligned, branch;  // whether rows of x begin at multiples of 16 bytes; whether there are blocks
  const T* x;
  const uint8_t* codes;
  const T* scales;
  const uint8_t* zeros;
  const T* blocks;
  T* y;
};

// Two 16-bit halves, from the lower halves of two pairs or from the upper ones.
__device__ inline uint32_t lower_halves(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
__device__ inline uint32_t upper_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

// What a lane reads of one output's weights, and how they unpack.
template <class T>
struct Codes {
  alignas(16) uint32_t words[4];
  T scale, zero;

  __device__ void read(const Int4Job<T>& job, int64_t output, int64_t input) {
    words[0] = words[1] = words[2] = words[3] = 0;
    scale = zero = T();
    const int64_t padded = job.groups * job.group_size;
    if (output >= job.shape.out_features || input >= padded) return;
    load_whole<16>(job.codes + (output * padded + input) / 2, words);
    const int64_t group = input / job.group_size;
    scale = job.scales[output * job.groups + group];
    int code = 8;
    if (job.zeros != nullptr) code = job.zeros[output * ((job.groups + 1) / 2) + group / 2] >> (group % 2 * 4) & 15;
    from_float(static_cast<float>(code), zero);
  }
  // Inputs n and n + 4 of the eight in a word
  __device__ uint32_t pair(int word, int n) const {
    return dequantize_pair(words[word] >> (4 * n) & 0x000f000fu, zero, scale);
  }
};

// 32 inputs of one row, zero where there are none.
template <class T>
struct Inputs {
  alignas(16) T at[kInt4Lane];

  __device__ void read(const Int4Job<T>& job, int64_t row, int64_t input) {
    const int64_t count = row < job.shape.rows ? job.shape.in_features - input : 0;
    const T* from = job.x + row * job.shape.x_stride + input;
    if (count >= kInt4Lane && job.x_aligned) {
#pragma unroll
      for (int i = 0; i < kInt4Lane; i += 8) load_whole<16>(from + i, at + i);
      return;
    }
#pragma unroll
    for (int i = 0; i < kInt4Lane; ++i) at[i] = i < count ? from[i] : T();
  }
  __device__ uint32_t pair(int n) const { return load_pair(at + n); }
};

// This warp's share of the inputs, times 16 outputs' weights.
template <class T>
__device__ inline void add_codes(const Int4Job<T>& job, int64_t output, int64_t row, float (*sums)[kInt4Rows + 1]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t padded = job.groups * job.group_size;
  float sum[2][4] = {};  // two, as each product waits for the one before
#pragma unroll 2
  for (int64_t pass = warp * kInt4Pass; pass < padded; pass += kInt4Warps * kInt4Pass) {
    const int64_t input = pass + lane % 4 * kInt4Lane;
    Codes<T> upper, lower;
    Inputs<T> x;
    upper.read(job, output + lane / 4, input);
    lower.read(job, output + lane / 4 + 8, input);
    x.read(job, row + lane / 4, input);
#pragma unroll
    for (int word = 0; word < 4; ++word)
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // inputs 0, 4, 1, 5 of the word, then 2, 6, 3, 7
        const int n = 2 * half;
        const uint32_t a[4] = {upper.pair(word, n), lower.pair(word, n), upper.pair(word, n + 1), lower.pair(word, n + 1)};
        const uint32_t near = x.pair(word * 8 + n), far = x.pair(word * 8 + n + 4);
        multiply_tile(sum[half], a, lower_halves(near, far), upper_halves(near, far), T());
      }
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) sums[lane / 4 + n / 2 * 8][lane % 4 * 2 + n % 2] = sum[0][n] + sum[1][n];
}

// One output's share of the branch: every kBranchParts-th input of its block.
template <class T>
__device__ inline void add_branch(const Int4Job<T>& job, int64_t output, int part, int64_t row, float (&sum)[kInt4Rows]) {
  const DiabloShape& s = job.shape;
  if (!job.branch || output >= s.out_features) return;
  const int64_t block = output / s.block_size_out, input = block * s.block_size_in;
  const int64_t depth = s.block_size_in < s.in_features - input ? s.block_size_in : s.in_features - input;
  const T* column = job.blocks + block * s.block_size_in * s.block_size_out + output % s.block_size_out;
  const T* x = job.x + row * s.x_stride + input;
#pragma unroll 8
  for (int64_t k = part; k < depth; k += kBranchParts) {
    const float d = to_float(column[k * s.block_size_out]);
#pragma unroll
    for (int r = 0; r < kInt4Rows; ++r)
      if (row + r < s.rows) sum[r] += to_float(x[r * s.x_stride + k]) * d;
  }
}

template <class T>
__global__ void __launch_bounds__(kInt4Threads, 2) int4_rows(const Int4Job<T> job) {
  __shared__ float sums[kInt4Warps + kBranchParts][kInt4Outputs][kInt4Rows + 1];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t output = static_cast<int64_t>(blockIdx.x) * kInt4Outputs;
  for (int64_t tile = blockIdx.y; tile < job.row_tiles; tile += gridDim.y) {
    const int64_t row = tile * kInt4Rows;
    if (thread < 32 * kInt4Warps) {
      add_codes(job, output, row, sums[thread / 32]);
    } else {
      const int n = thread % kInt4Outputs, part = (thread - 32 * kInt4Warps) / kInt4Outputs;
      float sum[kInt4Rows] = {};
      add_branch(job, output + n, part, row, sum);
#pragma unroll
      for (int r = 0; r < kInt4Rows; ++r) sums[kInt4Warps + part][n][r] = sum[r];
    }
    __syncthreads();
    const int n = thread % kInt4Outputs, r = thread / kInt4Outputs;
    if (r < kInt4Rows && row + r < job.shape.rows && output + n < job.shape.out_features) {
      float total = 0;
#pragma unroll
      for (int i = 0; i < kInt4Warps + kBranchParts; ++i) total += sums[i][n][r];
      from_float(total, job.y[(row + r) * job.shape.y_stride + output + n]);
    }
    __syncthreads();
  }
}

}  // namespace diablo
