// int4 layers and their branches: for few rows in one pass over the codes, and written out for many.
//
// Tensor cores with the weight on the left: 16 outputs by 16 inputs, times 16 inputs by 8 rows of x, so that up to eight
// rows cost what one does. The order of the inputs within a product is free as long as both sides have the same: each
// lane takes 32 neighbouring ones, the codes in one load, in the order in which pairs of codes unpack. The branch is
// added while the first codes are under way. Layers that read the same x share a launch: their tiles of outputs lie one
// after the other.
#pragma once

#include <cstdint>

#include "diablo/int4.h"

namespace diablo {

constexpr int kInt4Outputs = 16, kInt4Rows = 8;
constexpr int kInt4Lane = 32, kInt4Pass = 4 * kInt4Lane;  // inputs of a lane, and of a warp, at a time
// Passes whose codes are under way: as many as ptxas finds registers for
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900 && __CUDA_ARCH__ != 890
constexpr int kInt4Ahead = 3;
#else
constexpr int kInt4Ahead = 4;
#endif

// Warps that share a tile's inputs. A warp has as much to do before and after its passes as for three or four of them: where
// there are tiles for everybody, fewer warps with more passes each.
constexpr int kInt4Warps = 8, kInt4WarpsOfMany = 4;
constexpr int64_t kManyTiles = 512;  // some four for each multiprocessor of a large GPU
inline bool many_tiles(int64_t tiles) { return tiles >= kManyTiles; }

template <class T>
struct Int4Layer {
  int64_t y_stride;
  int out_features, block_size_in, block_size_out, groups;
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
  bool whole;      // rows of x begin at multiples of 16 bytes and have a multiple of kInt4Pass inputs
  bool zeros;      // some layer has zero points
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
  return {s.y_stride,
          static_cast<int>(s.out_features),
          static_cast<int>(s.block_size_in),
          static_cast<int>(s.block_size_out),
          static_cast<int>((s.in_features + w.group_size - 1) / w.group_size),
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
  Int4Job<T> job{s.rows, s.in_features, s.x_stride, (s.rows + kInt4Rows - 1) / kInt4Rows, false, false, 0, static_cast<const T*>(x),
                 {}};
  const bool rows_aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && (s.rows == 1 || s.x_stride % 8 == 0);
  job.whole = rows_aligned && s.in_features > 0 && s.in_features % kInt4Pass == 0;
  for (int i = 0; i < count; ++i) {
    job.layers[i] = int4_layer<T>(layers[i], job.tiles);
    job.zeros |= job.layers[i].zeros != nullptr;
    job.tiles += static_cast<int>((layers[i].shape.out_features + kInt4Outputs - 1) / kInt4Outputs);
  }
  for (int i = count; i < DIABLO_INT4_LAYERS; ++i) job.layers[i].first_tile = job.tiles;
  return job;
}

__device__ inline int least(int a, int b) { return a < b ? a : b; }

// A row of a layer's weights: where its codes, scales and zero points begin.
template <class T>
struct WeightRow {
  const uint8_t* codes;
  const T* scales;
  const uint8_t* zeros;  // NULL: all 8

  __device__ WeightRow(const Int4Layer<T>& layer, int64_t output)
      : codes(layer.codes + ((output * layer.groups << layer.group_shift) >> 1)),
        scales(layer.scales + output * layer.groups),
        zeros(layer.zeros == nullptr ? nullptr : layer.zeros + output * ((layer.groups + 1) >> 1)) {}
};

// The zero point of a group, from the byte that it shares with its neighbour.
__device__ inline uint32_t zero_of(uint32_t both, int group) { return both >> ((group & 1) * 4) & 15u; }

// What a lane reads of a row at 32 inputs, and how it unpacks. Nothing is done to what is read before it is multiplied:
// that would wait for it. Where no layer has zero points nothing is asked of them: that is a seventh of all instructions.
template <class T, bool Zeros>
struct Codes {
  alignas(16) uint32_t words[4];
  T scale;
  uint8_t zeros;

  __device__ void read(const WeightRow<T>& row, int pass, int group) {
    load_once(row.codes + (pass >> 1), words);
    scale = load_constant(row.scales + group);
    if (Zeros) zeros = row.zeros == nullptr ? 0x88 : row.zeros[group >> 1];
  }
  __device__ uint32_t zero(int group) const { return (Zeros ? zero_of(zeros, group) : 8u) * 0x00010001u; }
};

// 32 inputs of one row; where they are not Whole, zeros behind the last of `count`.
template <class T>
struct Inputs {
  alignas(16) T at[kInt4Lane];

  template <bool Whole>
  __device__ void read(const T* from, int count) {
    if (Whole) {
#pragma unroll
      for (int i = 0; i < kInt4Lane; i += 8) load_whole<16>(from + i, at + i);
    } else {
#pragma unroll
      for (int i = 0; i < kInt4Lane; ++i) at[i] = i < count ? from[i] : T();
    }
  }
  __device__ uint32_t pair(int n) const { return load_pair(at + n); }
};

// 16 outputs' weights at one lane's inputs, and their product with as many inputs of a row.
template <class T, bool Zeros>
struct Slice {
  Codes<T, Zeros> upper, lower;

  __device__ void add(const Inputs<T>& x, int group, float (&sum)[2][4]) const {
    const uint32_t up = upper.zero(group), low = lower.zero(group);
#pragma unroll
    for (int word = 0; word < 4; ++word)
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // inputs 0, 4, 1, 5 of the word, then 2, 6, 3, 7
        const uint32_t above = upper.words[word] >> (8 * half), below = lower.words[word] >> (8 * half);
        const uint32_t a[4] = {dequantize_low(above, up, upper.scale), dequantize_low(below, low, lower.scale),
                               dequantize_high(above, up, upper.scale), dequantize_high(below, low, lower.scale)};
        const uint32_t near = x.pair(word * 8 + 2 * half), far = x.pair(word * 8 + 2 * half + 4);
        multiply_tile(sum[half], a, lower_halves(near, far), upper_halves(near, far), T());
      }
  }
};

// One output's share of the branch: every Parts-th input of its block.
template <int Parts, class T>
__device__ inline void add_branch(const Int4Job<T>& job, const Int4Layer<T>& layer, int output, int part, int64_t row,
                                  float (&sum)[kInt4Rows]) {
  if (layer.blocks == nullptr || output >= layer.out_features) return;
  const int block = output / layer.block_size_out;
  const int64_t input = static_cast<int64_t>(block) * layer.block_size_in, left = job.in_features - input;
  const int depth = layer.block_size_in < left ? layer.block_size_in : static_cast<int>(left);
  const T* column = layer.blocks + input * layer.block_size_out + output % layer.block_size_out;
  const T* x = job.x + row * job.x_stride + input;
  constexpr int kTogether = 8;  // loads of blocks that are under way at a time
  for (int k = part; k < depth; k += kTogether * Parts) {
    float d[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int64_t at = k + i * Parts;
      d[i] = at < depth ? to_float(column[at * layer.block_size_out]) : 0.0f;
    }
#pragma unroll
    for (int r = 0; r < kInt4Rows; ++r) {
      if (row + r >= job.rows) break;
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int at = k + i * Parts;
        if (at < depth) sum[r] += to_float(x[r * job.x_stride + at]) * d[i];
      }
    }
  }
}

// The sums of a thread block, by warp: of codes, and of the branch.
template <int Warps>
struct Int4Sums {
  float codes[Warps][kInt4Outputs][kInt4Rows + 1], branch[Warps][kInt4Outputs][kInt4Rows + 1];
};

// The parts of one warp lie in its two halves.
template <int Warps, class T>
__device__ inline void put_branch(const Int4Job<T>& job, const Int4Layer<T>& layer, int output, int64_t row,
                                  Int4Sums<Warps>& sums) {
  const int thread = static_cast<int>(threadIdx.x), n = thread % kInt4Outputs;
  float sum[kInt4Rows] = {};
  add_branch<32 * Warps / kInt4Outputs>(job, layer, output + n, thread / kInt4Outputs, row, sum);
#pragma unroll
  for (int r = 0; r < kInt4Rows; ++r) {
    const float both = sum[r] + __shfl_xor_sync(0xffffffffu, sum[r], kInt4Outputs);
    if (thread % 32 < kInt4Outputs) sums.branch[thread / 32][n][r] = both;
  }
}

// Each warp's share of the inputs, times 16 outputs' weights. What is multiplied was asked for several passes before, and
// its x one pass. Rows that are not there, of weights and of x, are others twice, whose sums nobody reads. Whole passes
// are there for all lanes or for none; else inputs that are not there are zeros.
template <class T, bool Whole, bool Zeros, int Warps>
__device__ inline void add_tile(const Int4Job<T>& job, const Int4Layer<T>& layer, int output, int64_t row,
                                Int4Sums<Warps>& sums) {
  constexpr int kAhead = Whole ? kInt4Ahead : 1, kStep = Warps * kInt4Pass;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int inputs = static_cast<int>(job.in_features), begin = warp * kInt4Pass, first = begin + lane % 4 * kInt4Lane;
  const int last = layer.out_features - 1, place = least(output + lane / 4, last), shift = layer.group_shift;
  WeightRow<T> upper(layer, place), lower(layer, least(place + 8, last));
  const T* x = job.x + (row + lane / 4 < job.rows ? row + lane / 4 : row) * job.x_stride + (begin < inputs ? first : 0);
  upper.codes = kept(upper.codes + (first >> 1)), lower.codes = kept(lower.codes + (first >> 1));
  upper.scales = kept(upper.scales), lower.scales = kept(lower.scales);
  float sum[2][4] = {};  // two, as each product waits for the one before
  Slice<T, Zeros> ahead[kAhead] = {};
  Inputs<T> next = {};
  const auto read = [&](Slice<T, Zeros>& to, int pass) {  // the lane's inputs from first + pass on
    if ((Whole ? begin : first) + pass >= inputs) return;
    const int group = (first + pass) >> shift;
    to.upper.read(upper, pass, group);
    to.lower.read(lower, pass, group);
  };
  const auto read_x = [&](int pass) {  // behind the last pass, anything that is there
    next.template read<Whole>(x + (Whole && begin + pass >= inputs ? 0 : pass), inputs - first - pass);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) read(ahead[i], i * kStep);
  read_x(0);
  put_branch(job, layer, output, row, sums);
  for (int pass = 0; begin + pass < inputs; pass += kAhead * kStep)
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int now = pass + i * kStep;
      if (begin + now >= inputs) break;
      const Inputs<T> these = next;
      read_x(now + kStep);
      ahead[i].add(these, (first + now) >> shift, sum);
      read(ahead[i], now + kAhead * kStep);
    }
#pragma unroll
  for (int n = 0; n < 4; ++n)
    sums.codes[warp][lane / 4 + n / 2 * 8][lane % 4 * 2 + n % 2] = sum[0][n] + sum[1][n];
}

template <class T, bool Whole, bool Zeros, int Warps>
__global__ void __launch_bounds__(32 * Warps, 16 / Warps) int4_rows(const __grid_constant__ Int4Job<T> job) {
  static_assert(32 * Warps >= kInt4Outputs * kInt4Rows, "a thread for each output of a tile");
  __shared__ Int4Sums<Warps> sums;
  const int thread = static_cast<int>(threadIdx.x), place = static_cast<int>(blockIdx.x);
  int which = 0;
#pragma unroll
  for (int i = 1; i < DIABLO_INT4_LAYERS; ++i) which += place >= job.layers[i].first_tile;
  const Int4Layer<T>& layer = job.layers[which];
  const int output = (place - layer.first_tile) * kInt4Outputs;
  for (int64_t tile = blockIdx.y; tile < job.row_tiles; tile += gridDim.y) {
    const int64_t row = tile * kInt4Rows;
    add_tile<T, Whole, Zeros, Warps>(job, layer, output, row, sums);
    __syncthreads();
    const int n = thread % kInt4Outputs, r = thread / kInt4Outputs;
    if (r < kInt4Rows && row + r < job.rows && output + n < layer.out_features) {
      float total = 0;
#pragma unroll
      for (int i = 0; i < Warps; ++i) total += sums.codes[i][n][r] + sums.branch[i][n][r];
      from_float(total, layer.y[(row + r) * layer.y_stride + output + n]);
    }
    __syncthreads();
  }
}

constexpr int kDenseThreads = 256, kDenseLane = 8, kDenseInputs = 16 * kDenseLane;  // 16 threads side by side
constexpr int kDenseOutputs = 64, kDenseDown = kDenseThreads / 16;

// The weight of a layer and its blocks, 64 outputs by 128 inputs a thread block, eight inputs a thread and turn. Outputs
// that are not there are read as the last one.
template <class T>
__global__ void __launch_bounds__(kDenseThreads)
    int4_dense(const __grid_constant__ Int4Layer<T> layer, int in_features, bool aligned, T* dense) {
  constexpr int kTurns = kDenseOutputs / kDenseDown;
  const int thread = static_cast<int>(threadIdx.x), last = layer.out_features - 1;
  const int input = static_cast<int>(blockIdx.y) * kDenseInputs + thread % 16 * kDenseLane;
  const int from = static_cast<int>(blockIdx.x) * kDenseOutputs + thread / 16;
  if (input >= in_features) return;
  const int group = input >> layer.group_shift;
  uint32_t codes[kTurns];
  T scales[kTurns];
  uint8_t zeros[kTurns];
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {  // all that is read, before any of it is needed
    const WeightRow<T> row(layer, least(from + turn * kDenseDown, last));
    codes[turn] = load_word(row.codes + (input >> 1));
    scales[turn] = row.scales[group];
    zeros[turn] = row.zeros == nullptr ? 0x88 : row.zeros[group >> 1];
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int output = from + turn * kDenseDown;
    if (output > last) return;
    const int zero = static_cast<int>(zero_of(zeros[turn], group));
    const float scale = to_float(scales[turn]);
    float row[kDenseLane];
#pragma unroll
    for (int i = 0; i < kDenseLane; ++i)
      row[i] = static_cast<float>(static_cast<int>(codes[turn] >> (4 * i) & 15u) - zero) * scale;
    if (layer.blocks != nullptr) {  // where the output's block lies among these inputs
      const int block = output / layer.block_size_out;
      const int64_t begin = static_cast<int64_t>(block) * layer.block_size_in, skip = begin - input;
      const T* column = layer.blocks + begin * layer.block_size_out + output % layer.block_size_out;
      if (skip < kDenseLane && skip + layer.block_size_in > 0) {
#pragma unroll
        for (int i = 0; i < kDenseLane; ++i)
          if (i >= skip && i < skip + layer.block_size_in && input + i < in_features)
            row[i] += to_float(column[(i - skip) * layer.block_size_out]);
      }
    }
    alignas(16) T rounded[kDenseLane];
#pragma unroll
    for (int i = 0; i < kDenseLane; ++i) from_float(row[i], rounded[i]);
    T* to = dense + static_cast<int64_t>(output) * in_features + input;
    if (aligned) {
      store_whole<16>(to, rounded);
    } else {
#pragma unroll
      for (int i = 0; i < kDenseLane; ++i)
        if (input + i < in_features) to[i] = rounded[i];
    }
  }
}

// Whether int4_dense may write whole accesses.
inline bool dense_aligned(const void* dense, int64_t in_features) {
  return reinterpret_cast<uintptr_t>(dense) % 16 == 0 && in_features % kDenseLane == 0;
}

}  // namespace diablo
