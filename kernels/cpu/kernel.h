// One block times some rows, cut into panels that stay in cache; the same source for every instruction set.
//
// x and y are used where they lie, as sub-matrices of whole rows. A panel of a block is copied only where that makes it
// float32, or dense: read in place, rows of a wide block lie at strides that fall on the same few sets of a cache.
#pragma once

#include <type_traits>

#include "convert.h"
#include "job.h"
#include "tile.h"

namespace {

// Many rows: 64 KiB of a block, in any second-level cache, is used by all rows before the next is touched.
constexpr int64_t kColumns = 128, kDepth = 128;
// Few rows: reading the block is what takes time, so it is read in long runs that the prefetcher follows; the sums wait
// in the first-level cache. A block that one tile of rows reads once needs no copy, and less depth to spread over.
constexpr int64_t kFewRows = 32, kLongColumns = 1024, kLongDepth = 16, kOnceColumns = 4096, kOnceDepth = 8;
constexpr int64_t kRowsForDots = 4;  // that make up for transposing the block
// 16-bit outputs: the sums of so many rows wait in float32 until their last panel, to be rounded once.
constexpr int64_t kSumRows = 96;
static_assert(kLongColumns * kLongDepth <= kColumns * kDepth && kMostRows * kLongColumns <= kSumRows * kColumns);

// On the stack of the thread that runs a piece, and taken once: a compiler may touch every page of it at each call.
struct Scratch {
  alignas(64) float d[kColumns * kDepth];
  alignas(64) float x[kMostRows * kDepth];
  alignas(64) float y[kSumRows * kColumns];
};

template <class T>
struct Matrix {
  T* data;
  int64_t stride;

  Matrix from(int64_t row, int64_t column) const { return {data + row * stride + column, stride}; }
};

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class Simd, class T>
void widen_rows(Matrix<const T> from, int64_t rows, int64_t columns, float scale, Matrix<float> to) {
  for (int64_t r = 0; r < rows; ++r) widen<Simd>(from.data + r * from.stride, columns, scale, to.data + r * to.stride);
}

template <class Simd, class T>
void narrow_rows(Matrix<const float> from, int64_t rows, int64_t columns, Matrix<T> to) {
  for (int64_t r = 0; r < rows; ++r) narrow<Simd>(from.data + r * from.stride, columns, to.data + r * to.stride);
}

template <class T>
void transpose(Matrix<const T> from, int64_t rows, int64_t columns, float scale, Matrix<float> to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to.data[c * to.stride + r] = scale * to_float(from.data[r * from.stride + c]);
}

// How many rows to take at once: as many as the registers hold, and no odd few left over at the end.
template <class Simd>
int64_t even_rows(int64_t rows, int64_t columns) {
  const int64_t most = rows_beside<Simd>(columns <= Simd::width ? 1 : Simd::tile_vectors);
  if (rows <= most) return rows;
  const int64_t tiles = (rows + most - 1) / most;
  return (rows + tiles - 1) / tiles;
}

// y = y0 + x · scale · d, with x (rows, depth), d (depth, columns), y0 and y (rows, columns); depth > 0.
template <class Simd, class T, class B>
void multiply_block(Matrix<const T> x, Matrix<const B> d, float scale, Matrix<const T> y0, Matrix<T> y, int64_t rows,
                    int64_t depth, int64_t columns, Scratch& scratch) {
  constexpr bool kWideRows = std::is_same<T, float>::value, kWideBlocks = std::is_same<B, float>::value;
  const bool dots = 4 * columns <= Simd::width && rows >= kRowsForDots;
  const int64_t tile_rows = dots && kWideRows ? rows : even_rows<Simd>(rows, columns);
  const bool once = tile_rows == rows;  // each element of the block is used by one tile alone
  const bool few = columns > kColumns && (once || (kWideRows && rows <= kFewRows));
  const int64_t once_columns = kWideRows && kWideBlocks ? kOnceColumns : kLongColumns;
  const int64_t panel_columns = !few ? kColumns : once ? once_columns : kLongColumns;
  const int64_t panel_depth = !few ? kDepth : once ? kOnceDepth : kLongDepth;
  const bool in_place = kWideBlocks && !dots && (once || columns <= kColumns);

  for (int64_t c = 0; c < columns; c += panel_columns) {
    const int64_t width = smaller(panel_columns, columns - c);
    const Matrix<float> sums{scratch.y, width};
    if constexpr (!kWideRows) widen_rows<Simd>(y0.from(0, c), rows, width, 1.0f, sums);

    for (int64_t k = 0; k < depth; k += panel_depth) {
      const int64_t height = smaller(panel_depth, depth - k);
      Matrix<const float> panel{scratch.d, width};
      if constexpr (kWideBlocks) {
        if (in_place) panel = d.from(k, c);
      }
      if (dots) {
        panel.stride = kDepth;
        transpose(d.from(k, c), height, width, scale, Matrix<float>{scratch.d, kDepth});
      } else if (!in_place) {
        widen_rows<Simd>(d.from(k, c), height, width, scale, Matrix<float>{scratch.d, width});
      }

      for (int64_t r = 0; r < rows; r += tile_rows) {
        const int64_t taken = smaller(tile_rows, rows - r);
        Tile tile{height, scratch.x, kDepth, panel.data, panel.stride, nullptr, nullptr, 0};
        if constexpr (kWideRows) {
          const Matrix<const T> before = k == 0 ? y0 : Matrix<const T>{y.data, y.stride};
          tile.x = x.from(r, k).data, tile.x_stride = x.stride;
          tile.y0 = before.from(r, c).data, tile.y = y.from(r, c).data, tile.y_stride = y.stride;
        } else {
          widen_rows<Simd>(x.from(r, k), taken, height, 1.0f, Matrix<float>{scratch.x, kDepth});
          tile.y0 = tile.y = sums.from(r, 0).data, tile.y_stride = width;
        }
        if (dots) {
          dot_rows<Simd>(tile, taken, width);
        } else {
          multiply_rows<Simd>(tile, static_cast<int>(taken), width);
        }
      }
    }
    if constexpr (!kWideRows) narrow_rows<Simd>(Matrix<const float>{scratch.y, width}, rows, width, y.from(0, c));
  }
}

template <class T>
void copy_rows(Matrix<const T> from, int64_t rows, int64_t columns, Matrix<T> to) {
  if (from.data == to.data) return;
  for (int64_t r = 0; r < rows; ++r)
    memcpy(to.data + r * to.stride, from.data + r * from.stride, static_cast<size_t>(columns) * sizeof(T));
}

template <class Simd, class T, class B>
void run_piece(const diablo::Job& job, const diablo::Piece& piece) {
  const DiabloShape& s = job.shape;
  const Matrix<const T> x{static_cast<const T*>(job.x), s.x_stride}, y0{static_cast<const T*>(job.y0), s.y_stride};
  const Matrix<T> y{static_cast<T*>(job.y), s.y_stride};
  const Matrix<const B> blocks{static_cast<const B*>(job.blocks), s.block_size_out};
  // Small blocks: a few rows by all blocks, so that whole rows pass through the cache, not one line of each. Large ones
  // by all rows, for what copying their panels costs. 16-bit outputs have no room for more sums than these.
  const bool small = s.block_size_out <= kColumns || !std::is_same<T, float>::value;
  const int64_t step = small ? kSumRows : piece.end_row - piece.first_row;
  Scratch scratch;

  for (int64_t r = piece.first_row; r < piece.end_row; r += step) {
    const int64_t rows = smaller(step, piece.end_row - r);
    for (int64_t block = piece.first_block; block < piece.end_block; ++block) {
      const int64_t input = block * s.block_size_in, output = block * s.block_size_out + piece.first_column;
      const int64_t depth = smaller(s.block_size_in, s.in_features - input);
      const int64_t columns = smaller(piece.end_column - piece.first_column, s.out_features - output);
      if (columns <= 0) break;  // here and in all blocks behind it there is only padding
      if (depth <= 0) {         // it meets no input
        copy_rows(y0.from(r, output), rows, columns, y.from(r, output));
      } else {
        const float scale = std::is_same<B, int8_t>::value ? job.scales[block] : 1.0f;
        multiply_block<Simd>(x.from(r, input), blocks.from(input, piece.first_column), scale, y0.from(r, output),
                             y.from(r, output), rows, depth, columns, scratch);
      }
    }
  }
}

template <class Simd, class T>
void run_piece_of(const diablo::Job& job, const diablo::Piece& piece) {
  switch (job.shape.block_type) {
    case DIABLO_F32:
      return run_piece<Simd, T, float>(job, piece);
    case DIABLO_F16:
      return run_piece<Simd, T, Half>(job, piece);
    case DIABLO_BF16:
      return run_piece<Simd, T, Brain>(job, piece);
    case DIABLO_I8:
      return run_piece<Simd, T, int8_t>(job, piece);
  }
}

// The kernel of one instruction set, for every pair of types.
template <class Simd>
void run_any_piece(const diablo::Job& job, const diablo::Piece& piece) {
  switch (job.shape.type) {
    case DIABLO_F16:
      return run_piece_of<Simd, Half>(job, piece);
    case DIABLO_BF16:
      return run_piece_of<Simd, Brain>(job, piece);
    default:
      return run_piece_of<Simd, float>(job, piece);
  }
}

}  // namespace
