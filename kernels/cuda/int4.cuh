// int4 layers and their branches: for few rows in one pass over the codes, and written out for many.
//
// Tensor cores with the weight on the left: 16 outputs by 16 inputs, times 16 inputs by 8 rows of x, so that up to eight
// rows cost what one does. The order of the inputs within a product is free as long as both sides have the same: each
// lane takes 32 neighbouring ones, the codes in one load, in the order in which pairs of codes unpack. Other warps add
// the branch meanwhile. Layers that read the same x share a launch: their tiles of outputs lie one after the other.
#pragma once

#include <cstdint>

#include "diablo/int4.h"

namespace diablo {

constexpr int kInt4Outputs = 16, kInt4Rows = 8, kInt4Warps = 8, kBranchParts = 4;
constexpr int kBranchThreads = kInt4Outputs * kBranchParts;
constexpr int kInt4Threads = 32 * kInt4Warps + kBranchThreads;
constexpr int kInt4Lane = 32, kInt4Pass = 4 * kInt4Lane;  // inputs of a lane, and of a warp, at a time
constexpr int kInt4Ahead = 4;                             // passes whose codes are under way

template <class T>
struct Int4Layer {
  int64_t out_features, y_stride, block_size_in, block_size_out, groups;
  int group_shift, first_tile;  // a group has 2^group_shift inputs; `first_tile` of the launch is the layer's own first
  const uint8_t* codes;
  const T* scales;
  const uint8_t* zeros;
  const T* blocks;  // NULL: no branch
  T* y;
};

template <class T>
struct Int4Job {
  int64_t rows, in_features, x_stride, row_tiles;
  bool whole;      // x in whole loads: rows begin at multiples of 16 bytes and have a multiple of 32 inputs
  int tiles;       // of outputs, of all layers
  const T* x;
  Int4Layer<T> layers[DIABLO_INT4_LAYERS];
};

inline bool has_branch(const DiabloShape& s) { return s.num_blocks != 0 && s.block_size_in != 0 && s.block_size_out != 0; }

inline int shift_of(int64_t power_of_two) {
  int shift = 0;
  while (int64_t{1} << (shift + 1) <= power_of_two) ++shift;
  return shift;
}

template <class T>
Int4Layer<T> int4_layer(const DiabloInt4Layer& given, int first_tile) {
  const DiabloShape& s = given.shape;
  const DiabloInt4& w = given.weights;
  return {s.out_features,
          s.y_stride,
          s.block_size_in,
          s.block_size_out,
          (s.in_features + w.group_size - 1) / w.group_size,
          shift_of(w.group_size),
          first_tile,
          static_cast<const uint8_t*>(w.codes),
          static_cast<const T*>(w.scales),
          w.zeros,
          has_branch(s) ? static_cast<const T*>(given.blocks) : nullptr,
          static_cast<T*>(given.y)};
}

// The layers' tiles one after the other; places without a layer begin behind the last tile.
template <class T>
Int4Job<T> int4_job(const DiabloInt4Layer* layers, int count, const void* x) {
  const DiabloShape& s = layers[0].shape;
  Int4Job<T> job{s.rows, s.in_features, s.x_stride, (s.rows + kInt4Rows - 1) / kInt4Rows, false, 0, static_cast<const T*>(x), {}};
  job.whole = reinterpret_cast<uintptr_t>(x) % 16 == 0 && (s.rows == 1 || s.x_stride % 8 == 0) && s.in_features % kInt4Lane == 0;
  for (int i = 0; i < count; ++i) {
    job.layers[i] = int4_layer<T>(layers[i], job.tiles);
    job.tiles += static_cast<int>((layers[i].shape.out_features + kInt4Outputs - 1) / kInt4Outputs);
  }
  for (int i = count; i < DIABLO_INT4_LAYERS; ++i) job.layers[i].first_tile = job.tiles;
  return job;
}

// Two 16-bit halves, from the lower halves of two pairs or from the upper ones.
__device__ inline uint32_t lower_halves(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
__device__ inline uint32_t upper_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

__device__ inline int least(int a, int b) { return a < b ? a : b; }

template <class T>
__device__ inline int zero_of(const Int4Layer<T>& layer, int64_t output, int64_t group) {
  if (layer.zeros == nullptr) return 8;
  return layer.zeros[output * ((layer.groups + 1) / 2) + group / 2] >> (group % 2 * 4) & 15;
}

// What a lane reads of one output's weights at 32 inputs, and how they unpack.
template <class T>
struct Codes {
  alignas(16) uint32_t words[4];
  uint32_t zero;  // in both halves
  T scale;

  __device__ void read(const Int4Layer<T>& layer, int64_t output, int input) {
    const int group = input >> layer.group_shift;
    load_once(layer.codes + ((output * layer.groups << layer.group_shift) + input) / 2, words);
    scale = layer.scales[output * layer.groups + group];
    zero = static_cast<uint32_t>(zero_of(layer, output, group)) * 0x00010001u;
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

  template <bool Whole>
  __device__ void read(const T* from, int count) {
    if (Whole) {
#pragma unroll
      for (int i = 0; i < kInt4Lane; i += 8) count > 0 ? load_whole<16>(from + i, at + i) : store_zeros(at + i);
    } else {
#pragma unroll
      for (int i = 0; i < kInt4Lane; ++i) at[i] = i < count ? from[i] : T();
    }
  }
  __device__ uint32_t pair(int n) const { return load_pair(at + n); }

 private:
  __device__ static void store_zeros(T* to) {
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = T();
  }
};

// 16 outputs' weights at one lane's inputs, and their product with as many inputs of a row.
template <class T>
struct Slice {
  Codes<T> upper, lower;

  __device__ void add(const Inputs<T>& x, float (&sum)[2][4]) const {
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
};

// This warp's share of the inputs, times 16 outputs' weights. What is multiplied was asked for several passes before.
// Rows of weights that are not there are those of the last one, whose sums nobody reads; inputs that are not there, zeros.
template <class T, bool Whole>
__device__ inline void add_codes(const Int4Job<T>& job, const Int4Layer<T>& layer, int64_t output, int64_t row,
                                 float (*sums)[kInt4Rows + 1]) {
  constexpr int kAhead = Whole ? kInt4Ahead : 1, kStep = kInt4Warps * kInt4Pass;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int padded = static_cast<int>(layer.groups << layer.group_shift), first = warp * kInt4Pass + lane % 4 * kInt4Lane;
  const int last = static_cast<int>(layer.out_features) - 1, upper = least(static_cast<int>(output) + lane / 4, last);
  const int lower = least(upper + 8, last);
  const int there = row + lane / 4 < job.rows ? static_cast<int>(job.in_features) : 0;
  const T* x = job.x + (there ? row + lane / 4 : 0) * job.x_stride;
  float sum[2][4] = {};  // two, as each product waits for the one before
  Slice<T> ahead[kAhead] = {};
  const auto read = [&](Slice<T>& to, int input) {
    if (input >= padded) return;
    to.upper.read(layer, upper, input);
    to.lower.read(layer, lower, input);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) read(ahead[i], first + i * kStep);
  for (int pass = 0; warp * kInt4Pass + pass < padded; pass += kAhead * kStep)
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int input = first + pass + i * kStep;
      Inputs<T> now;
      now.template read<Whole>(x + input, there - input);
      ahead[i].add(now, sum);
      read(ahead[i], input + kAhead * kStep);
    }
#pragma unroll
  for (int n = 0; n < 4; ++n) sums[lane / 4 + n / 2 * 8][lane % 4 * 2 + n % 2] = sum[0][n] + sum[1][n];
}

// One output's share of the branch: every kBranchParts-th input of its block.
template <class T>
__device__ inline void add_branch(const Int4Job<T>& job, const Int4Layer<T>& layer, int64_t output, int part, int64_t row,
                                  float (&sum)[kInt4Rows]) {
  if (layer.blocks == nullptr || output >= layer.out_features) return;
  const int64_t block = output / layer.block_size_out, input = block * layer.block_size_in;
  const int64_t depth = layer.block_size_in < job.in_features - input ? layer.block_size_in : job.in_features - input;
  const T* column = layer.blocks + block * layer.block_size_in * layer.block_size_out + output % layer.block_size_out;
  const T* x = job.x + row * job.x_stride + input;
#pragma unroll 16
  for (int64_t k = part; k < depth; k += kBranchParts) {
    const float d = to_float(column[k * layer.block_size_out]);
#pragma unroll
    for (int r = 0; r < kInt4Rows; ++r)
      if (row + r < job.rows) sum[r] += to_float(x[r * job.x_stride + k]) * d;
  }
}

template <class T, bool Whole>
__global__ void __launch_bounds__(kInt4Threads, 2) int4_rows(const __grid_constant__ Int4Job<T> job) {
  __shared__ float sums[kInt4Warps + kBranchParts][kInt4Outputs][kInt4Rows + 1];
  const int thread = static_cast<int>(threadIdx.x), place = static_cast<int>(blockIdx.x);
  int which = 0;
#pragma unroll
  for (int i = 1; i < DIABLO_INT4_LAYERS; ++i) which += place >= job.layers[i].first_tile;
  const Int4Layer<T>& layer = job.layers[which];
  const int64_t output = static_cast<int64_t>(place - layer.first_tile) * kInt4Outputs;
  for (int64_t tile = blockIdx.y; tile < job.row_tiles; tile += gridDim.y) {
    const int64_t row = tile * kInt4Rows;
    if (thread < 32 * kInt4Warps) {
      add_codes<T, Whole>(job, layer, output, row, sums[thread / 32]);
    } else {
      const int n = thread % kInt4Outputs, part = (thread - 32 * kInt4Warps) / kInt4Outputs;
      float sum[kInt4Rows] = {};
      add_branch(job, layer, output + n, part, row, sum);
#pragma unroll
      for (int r = 0; r < kInt4Rows; ++r) sums[kInt4Warps + part][n][r] = sum[r];
    }
    __syncthreads();
    const int n = thread % kInt4Outputs, r = thread / kInt4Outputs;
    if (r < kInt4Rows && row + r < job.rows && output + n < layer.out_features) {
      float total = 0;
#pragma unroll
      for (int i = 0; i < kInt4Warps + kBranchParts; ++i) total += sums[i][n][r];
      from_float(total, layer.y[(row + r) * layer.y_stride + output + n]);
    }
    __syncthreads();
  }
}

constexpr int kDenseThreads = 256, kDenseLane = 8, kDenseInputs = 16 * kDenseLane;  // 16 threads side by side
constexpr int kDenseOutputs = 64, kDenseDown = kDenseThreads / 16;

// The weight of a layer and its blocks, 64 outputs by 128 inputs a thread block, eight inputs a thread and turn.
template <class T>
__global__ void __launch_bounds__(kDenseThreads) int4_dense(const Int4Layer<T> layer, int64_t in_features, bool aligned, T* dense) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t input = blockIdx.y * static_cast<int64_t>(kDenseInputs) + thread % 16 * kDenseLane;
  if (input >= in_features) return;
  const int64_t group = input >> layer.group_shift;
#pragma unroll
  for (int turn = 0; turn < kDenseOutputs / kDenseDown; ++turn) {
    const int64_t output = blockIdx.x * static_cast<int64_t>(kDenseOutputs) + turn * kDenseDown + thread / 16;
    if (output >= layer.out_features) return;
    const uint32_t codes = load_word(layer.codes + ((output * layer.groups << layer.group_shift) + input) / 2);
    const float scale = to_float(layer.scales[output * layer.groups + group]);
    const int zero = zero_of(layer, output, group);
    // The output's block, and what of it lies beside these inputs
    const int64_t block = layer.blocks == nullptr ? 0 : output / layer.block_size_out, first = block * layer.block_size_in;
    const T* column = layer.blocks == nullptr ? nullptr
                                              : layer.blocks + first * layer.block_size_out + output % layer.block_size_out;
    alignas(16) T row[kDenseLane];
#pragma unroll
    for (int i = 0; i < kDenseLane; ++i) {
      float weight = static_cast<float>(static_cast<int>(codes >> (4 * i) & 15u) - zero) * scale;
      const int64_t k = input + i - first;
      if (column != nullptr && k >= 0 && k < layer.block_size_in && input + i < in_features)
        weight += to_float(column[k * layer.block_size_out]);
      from_float(weight, row[i]);
    }
    T* to = dense + output * in_features + input;
    if (aligned) {
#pragma unroll
      for (int i = 0; i < kDenseLane; i += 16 / static_cast<int>(sizeof(T))) store_whole<16>(to + i, row + i);
    } else {
#pragma unroll
      for (int i = 0; i < kDenseLane; ++i)
        if (input + i < in_features) to[i] = row[i];
    }
  }
}

// Whether int4_dense may write whole accesses.
inline bool dense_aligned(const void* dense, int64_t in_features) {
  return reinterpret_cast<uintptr_t>(dense) % 16 == 0 && in_features % kDenseLane == 0;
}

}  // namespace diablo
