// Which part of y each thread block of a launch computes, and with which kernel. Arithmetic alone, shared by the kernels
// and the host, so that a machine without a GPU can test it.
#pragma once

#include <cstdint>

#include "diablo/block_diag.h"

#ifdef __CUDACC__
#define DIABLO_BOTH __host__ __device__
#else
#define DIABLO_BOTH
#endif

namespace diablo {

// kFewRows reads the blocks once, as a stream. kMatrix16 and kMatrix64 are tensor cores, 16 or 64 rows of y a tile;
// kTiles is for the types that they would round: 64 rows.
enum class Way { kFewRows, kMatrix16, kMatrix64, kTiles };

constexpr int kFewThreads = 256, kFewColumns = 32;
constexpr int kMatrixThreads = 128;
constexpr int kTile = 64, kStep = 16, kThreadsAcross = 16, kEach = kTile / kThreadsAcross;
constexpr int64_t kMostGridY = 65535;
constexpr int64_t kMostStreamed = 32768;  // elements of a block that one thread block reads alone

// x counts tiles of columns, of all blocks one after the other; y counts tiles of rows.
struct Launch {
  Way way;
  int64_t columns_per_tile, rows_per_tile;
  int64_t column_tiles;  // of each block
  int64_t grid_x, grid_y;
  int64_t row_tiles;  // more than grid_y where that is at its limit: a thread block then takes every grid_y-th
  // kFewRows alone: a thread reads `vector` neighbouring elements at a time. `period` rows of the tile are a whole number
  // of them, `slots`, one for each thread of a group; the `groups` share the depth. `parts` threads, a power of two, add up
  // a column's sums.
  int vector, period, slots, groups, parts;
};

// Which addresses are multiples of 16 bytes (of 8 for int8 blocks), so that eight elements, or four floats, are one load.
struct Aligned {
  bool x, blocks, y;
};

inline int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

constexpr int elements_per_load(DiabloType block_type) { return block_type == DIABLO_F32 ? 4 : 8; }

// Tensor cores multiply without rounding what T holds exactly: T itself, and int8.
constexpr bool fits_tensor_cores(DiabloType type, DiabloType block_type) {
  return type != DIABLO_F32 && (block_type == type || block_type == DIABLO_I8);
}

inline Way way_of(const DiabloShape& s) {
  const bool matrix = fits_tensor_cores(s.type, s.block_type);
  if (s.rows <= (matrix ? 4 : 16)) return Way::kFewRows;
  if (!matrix) return Way::kTiles;
  return s.rows <= 16 ? Way::kMatrix16 : Way::kMatrix64;
}

// How the threads of few_rows lie over a tile. Whole loads need rows that begin on one; or the block read as one run,
// rows and all, which begins on one more often: 64 blocks of 32 x 86 halves do, their rows do not.
inline void spread_threads(const DiabloShape& s, bool aligned, Launch* launch) {
  const int wide = elements_per_load(s.block_type);
  const int64_t width = s.block_size_out, area = s.block_size_in * width;
  launch->columns_per_tile = width < kFewColumns ? width : kFewColumns;
  launch->vector = launch->period = 1;
  if (aligned && width % wide == 0) {
    launch->vector = wide;
  } else if (aligned && width >= wide && width <= kFewThreads && area % wide == 0 && area <= kMostStreamed) {
    int period = wide;
    while (period > 1 && period / 2 * width % wide == 0) period /= 2;
    if (period * width / wide <= kFewThreads) {
      launch->columns_per_tile = width;
      launch->vector = wide, launch->period = period;
    }
  }
  launch->slots = static_cast<int>(launch->period * launch->columns_per_tile / launch->vector);
  launch->groups = kFewThreads / launch->slots;
  launch->parts = 1;
  while (launch->parts < 32 && 2 * launch->parts * launch->columns_per_tile <= kFewThreads) launch->parts *= 2;
}

// Needs every size above 0. Blocks that lie behind the outputs are not launched.
inline Launch launch_of(const DiabloShape& s, const Aligned& aligned) {
  Launch launch{};
  launch.way = way_of(s);
  switch (launch.way) {
    case Way::kFewRows:
      spread_threads(s, aligned.blocks, &launch);
      launch.rows_per_tile = s.rows == 1 ? 1 : s.rows <= 4 ? 4 : 8;
      break;
    case Way::kMatrix16:
      launch.columns_per_tile = 32, launch.rows_per_tile = 16;
      break;
    default:
      launch.columns_per_tile = launch.rows_per_tile = kTile;
  }
  launch.column_tiles = divide_up(s.block_size_out, launch.columns_per_tile);
  const int64_t blocks = divide_up(s.out_features, s.block_size_out);
  launch.grid_x = blocks * launch.column_tiles;
  launch.row_tiles = divide_up(s.rows, launch.rows_per_tile);
  launch.grid_y = launch.row_tiles < kMostGridY ? launch.row_tiles : kMostGridY;
  return launch;
}

// Which rows and tiles begin at such an address, given that x, the blocks and y (and y0) themselves do or do not.
inline Aligned aligned_rows(const DiabloShape& s, const Aligned& pointers) {
  Aligned aligned;
  aligned.x = pointers.x && s.block_size_in % 8 == 0 && (s.rows == 1 || s.x_stride % 8 == 0);
  aligned.blocks = pointers.blocks && s.block_size_out % 8 == 0;
  aligned.y = pointers.y && s.block_size_out % 8 == 0 && (s.rows == 1 || s.y_stride % 8 == 0);
  return aligned;
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
