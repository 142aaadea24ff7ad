// The branch on tensor cores, for 16-bit x: tiles of x and of a block go through shared memory, each warp multiplies
// 16 x 16 by 16 x 8 pieces of them, sums are float32.
//
// The next tiles are read into registers while the present ones are multiplied. Eight elements are one access where
// rows allow it, else one each: no load is ever misaligned, whatever the sizes.
#pragma once

#include "kernels.cuh"

namespace diablo {

// The sizes of a tile of y, how much of the depth goes through shared memory at a time, and how its four warps share
// it: rows, columns, and depth, whose sums meet at the end.
template <int Rows, int Columns, int Step, int Down, int Across, int Deep>
struct MatrixTile {
  static constexpr int kRows = Rows, kColumns = Columns, kStep = Step;
  static constexpr int kDown = Down, kAcross = Across, kDeep = Deep;
  static constexpr int kWarpRows = Rows / Down, kWarpColumns = Columns / Across, kWarpStep = Step / Deep;
  static_assert(Down * Across * Deep * 32 == kMatrixThreads, "every warp has a place");
  static_assert(kWarpRows % 16 == 0 && kWarpColumns % 16 == 0 && kWarpStep % 16 == 0, "whole pieces");
};
using Tile16 = MatrixTile<16, 32, 128, 1, 1, 4>;
using Tile64 = MatrixTile<64, 64, 32, 2, 2, 1>;

// Gaps of 8: the rows that are read together lie in different banks, and each begins at a multiple of 16 bytes, which
// whole stores and ldmatrix need; a union alone would begin at any float.
template <class T, class Tile>
union alignas(16) MatrixShared {
  struct {
    T x[Tile::kRows][Tile::kStep + 8];
    T d[Tile::kStep][Tile::kColumns + 8];
  } in;
  float sums[Tile::kDeep][Tile::kRows][Tile::kColumns + 4];
};

// Eight neighbours of a row, of which `count` are there, and zeros after them.
template <class S>
struct Eight {
  alignas(8 * sizeof(S)) S at[8];

  __device__ void read(const S* from, int64_t count, bool aligned) {
    if (aligned && count >= 8) return load_whole<8 * sizeof(S)>(from, at);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      at[i] = i < count ? from[i] : S();
  }
  __device__ void write(S* to, int64_t count, bool aligned) const {
    if (aligned && count >= 8) return store_whole<8 * sizeof(S)>(to, at);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) to[i] = at[i];
  }
  // To shared memory, as it is or as another type
  __device__ void put(S* to) const { store_whole<8 * sizeof(S)>(to, at); }
  template <class T>
  __device__ void put(T* to) const {
    alignas(16) T all[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) from_float(to_float(at[i]), all[i]);
    store_whole<16>(to, all);
  }
};

// Reads a tile of `Height` x `Width`, and later puts it in shared memory.
template <class S, int Height, int Width>
struct TileReader {
  static constexpr int kEights = Height * Width / 8, kMine = kEights / kMatrixThreads;
  static_assert(kEights % kMatrixThreads == 0, "each thread has as many");
  Eight<S> mine[kMine];

  __device__ void read(const S* corner, int64_t stride, int64_t height, int64_t width, bool aligned) {
#pragma unroll
    for (int n = 0; n < kMine; ++n) {
      const int i = n * kMatrixThreads + static_cast<int>(threadIdx.x), row = i / (Width / 8), column = i % (Width / 8) * 8;
      mine[n].read(corner + row * stride + column, row < height ? width - column : 0, aligned);
    }
  }
  template <class T, int Pitch>
  __device__ void put(T (&tile)[Height][Pitch]) const {
#pragma unroll
    for (int n = 0; n < kMine; ++n) {
      const int i = n * kMatrixThreads + static_cast<int>(threadIdx.x);
      mine[n].put(&tile[i / (Width / 8)][i % (Width / 8) * 8]);
    }
  }
};

// What one warp adds up: pieces of 16 x 8.
template <class T, class Tile>
struct WarpSums {
  static constexpr int kDown = Tile::kWarpRows / 16, kAcross = Tile::kWarpColumns / 8;
  int lane, row, column, deep;  // where the warp's part of the tile begins
  float at[kDown][kAcross][4];

  __device__ WarpSums() {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    lane = static_cast<int>(threadIdx.x) % 32;
    row = warp % Tile::kDown * Tile::kWarpRows;
    column = warp / Tile::kDown % Tile::kAcross * Tile::kWarpColumns;
    deep = warp / (Tile::kDown * Tile::kAcross);
  }
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int n = 0; n < 4; ++n) at[i][j][n] = 0;
  }
  __device__ void add(const MatrixShared<T, Tile>& tiles) {
#pragma unroll
    for (int step = 0; step < Tile::kWarpStep; step += 16) {
      const int k = deep * Tile::kWarpStep + step;
      uint32_t a[kDown][4];
#pragma unroll
      for (int i = 0; i < kDown; ++i)
#pragma unroll
        for (int n = 0; n < 4; ++n)  // rows 0 and 8 below, then columns 8 further
          a[i][n] = load_pair(&tiles.in.x[row + i * 16 + lane / 4 + n % 2 * 8][k + n / 2 * 8 + lane % 4 * 2]);
#pragma unroll
      for (int j = 0; j < kAcross; j += 2) {
        uint32_t b[4];
        load_transposed(b, &tiles.in.d[k + lane % 16][column + j * 8 + lane / 16 * 8]);
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
          multiply_tile(at[i][j], a[i], b[0], b[1], T());
          multiply_tile(at[i][j + 1], a[i], b[2], b[3], T());
        }
      }
    }
  }
  __device__ void put(MatrixShared<T, Tile>& shared) const {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int n = 0; n < 4; ++n)
          shared.sums[deep][row + i * 16 + lane / 4 + n / 2 * 8][column + j * 8 + lane % 4 * 2 + n % 2] = at[i][j][n];
  }
};

// y0 and y of a tile, eight outputs a thread and turn.
template <class T, class B, class Tile>
__device__ inline void write_tile(const Job<T, B>& job, const Area& area, int64_t row, const MatrixShared<T, Tile>& shared) {
  const float scale = scale_of(job, area.block);
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows * Tile::kColumns / 8; i += kMatrixThreads) {
    const int r = i / (Tile::kColumns / 8), column = i % (Tile::kColumns / 8) * 8;
    const int64_t count = row + r < job.shape.rows ? area.columns - column : 0;
    if (count <= 0) continue;
    const int64_t at = (row + r) * job.shape.y_stride + area.output + column;
    Eight<T> y;
    y.read(job.y0 + at, count, job.aligned.y);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      float sum = 0;
#pragma unroll
      for (int deep = 0; deep < Tile::kDeep; ++deep) sum += shared.sums[deep][r][column + n];
      from_float(to_float(y.at[n]) + scale * sum, y.at[n]);
    }
    y.write(job.y + at, count, job.aligned.y);
  }
}

template <class T, class B, class Tile>
__global__ void __launch_bounds__(kMatrixThreads) matrix_rows(const Job<T, B> job) {
  __shared__ MatrixShared<T, Tile> shared;
  const DiabloShape& s = job.shape;
  const Area area = area_of(s, job.launch, blockIdx.x);
  const B* block = job.blocks + area.block * s.block_size_in * s.block_size_out + area.first_column;
  const int64_t width = s.block_size_out - area.first_column;  // also columns behind the outputs are there to be read
  WarpSums<T, Tile> sums;

  for (int64_t tile = blockIdx.y; tile < job.launch.row_tiles; tile += gridDim.y) {
    const int64_t row = tile * Tile::kRows;
    const T* x = job.x + row * s.x_stride + area.input;
    TileReader<T, Tile::kRows, Tile::kStep> x_tile;
    TileReader<B, Tile::kStep, Tile::kColumns> d_tile;
    const auto read = [&](int64_t k) {
      x_tile.read(x + k, s.x_stride, s.rows - row, area.depth - k, job.aligned.x);
      d_tile.read(block + k * s.block_size_out, s.block_size_out, area.depth - k, width, job.aligned.blocks);
    };
    sums.clear();
    read(0);
    for (int64_t k = 0; k < area.depth; k += Tile::kStep) {
      x_tile.put(shared.in.x);
      d_tile.put(shared.in.d);
      __syncthreads();
      if (k + Tile::kStep < area.depth) read(k + Tile::kStep);
      sums.add(shared);
      __syncthreads();
    }
    sums.put(shared);
    __syncthreads();
    write_tile(job, area, row, shared);
    __syncthreads();
  }
}

}  // namespace diablo
