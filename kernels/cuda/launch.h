// Which part of y each thread block of a launch computes. Arithmetic alone, shared by the kernels and the host, so that
// a machine without a GPU can test it.
#pragma once

#include <cstdint>

#include "diablo/block_diag.h"

#ifdef __CUDACC__
#define DIABLO_BOTH __host__ __device__
#else
#define DIABLO_BOTH
#endif

namespace diablo {

// Few rows: a thread block takes kFewColumns columns of one block and up to kFewRows rows; its kFewSplits rows of
// threads share the depth. Many rows: a tile of y in registers, kTile x kTile, kStep of the depth at a time.
constexpr int kFewColumns = 32, kFewSplits = 8, kFewRows = 4;
constexpr int kTile = 64, kStep = 16, kThreadsAcross = 16, kEach = kTile / kThreadsAcross;
constexpr int64_t kMostFewRows = 16;  // beyond them, tiles read less
constexpr int64_t kMostGridY = 65535;

// x counts tiles of columns, of all blocks one after the other; y counts tiles of rows.
struct Launch {
  bool few;
  int64_t columns_per_tile, rows_per_tile;
  int64_t column_tiles;  // of each block
  int64_t grid_x, grid_y;
  int64_t row_tiles;  // more than grid_y where that is at its limit: a thread block then takes every grid_y-th
};

inline int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Needs every size above 0. Blocks that lie behind the outputs are not launched.
inline Launch launch_of(const DiabloShape& s) {
  Launch launch{};
  launch.few = s.rows <= kMostFewRows;
  launch.columns_per_tile = launch.few ? kFewColumns : kTile;
  launch.rows_per_tile = launch.few ? kFewRows : kTile;
  launch.column_tiles = divide_up(s.block_size_out, launch.columns_per_tile);
  const int64_t blocks = divide_up(s.out_features, s.block_size_out);
  launch.grid_x = blocks * launch.column_tiles;
  launch.row_tiles = divide_up(s.rows, launch.rows_per_tile);
  launch.grid_y = launch.row_tiles < kMostGridY ? launch.row_tiles : kMostGridY;
  return launch;
}

// A tile of y and the inputs that it needs. `columns` or `depth` is 0 or less where there is nothing.
struct Area {
  int64_t block, first_column;       // in the block
  int64_t columns, depth;
  int64_t input, output;             // where they begin in rows of x and y
};

DIABLO_BOTH inline Area area_of(const DiabloShape& s, const Launch& launch, int64_t index) {
  Area area;
  area.block = index / launch.column_tiles;
  area.first_column = index % launch.column_tiles * launch.columns_per_tile;
  area.input = area.block * s.block_size_in;
  area.output = area.block * s.block_size_out + area.first_column;
  int64_t columns = s.block_size_out - area.first_column;
  if (columns > launch.columns_per_tile) columns = launch.columns_per_tile;
  if (columns > s.out_features - area.output) columns = s.out_features - area.output;
  area.columns = columns;
  area.depth = s.block_size_in < s.in_features - area.input ? s.block_size_in : s.in_features - area.input;
  return area;
}

}  // namespace diablo
