// One block times some rows, cut into panels that stay in cache; the same source for every instruction set.
//
// In float32, x and y are used where they lie. 16-bit rows are widened and narrowed in runs over many small blocks. A
// block is read as it is stored by few rows; for many, a panel of it is copied where that makes it float32, or dense:
// read in place, rows of a wide block lie at strides that fall on the same few sets of a cache.
#pragma once

#include <type_traits>

#include "convert.h"
#include "job.h"
#include "one_row.h"
#include "tile.h"

namespace {

// 64 KiB of a block, in any second-level cache, is used by all rows before the next is touched.
constexpr int64_t kColumns = 128, kDepth = 128;
constexpr int64_t kBehindCopy = 64;  // narrow strips are read up to a vector beyond their end
// Up to so many rows, reading a wide block is what takes time, and copying it never pays. So few that each element of
// it is used by one tile alone read it in long runs that the prefetcher follows; their sums wait in the first-level
// cache. Short rows of float32 are runs enough at twice the depth.
constexpr int64_t kFewRows = 48, kFewDepth = 32, kFewestDeep = 17, kDeepDepth = 64;
constexpr int64_t kOnceColumns = 4096, kOnceDepth = 8, kShortColumns = 256, kShortDepth = 16;
constexpr int64_t kCrowded = 2048;  // rows at such a stride, in bytes, share a few sets of a cache
constexpr int64_t kRowsForDots = 4;  // that make up for transposing the block
// Blocks that together stay in the second-level cache are read by so few rows at a time that whole rows pass through
// the cache as streams, not one line of each. More of them are read by more rows.
constexpr int64_t kSmallBlocks = 96 * 1024, kStreamedRows = 12, kSumRows = 96;
constexpr int64_t kRun = kSumRows * 128;  // of x and of y at once, where they have to be widened

// On the stack of the thread that runs a piece, and taken once: a compiler may touch every page of it at each call.
struct Scratch {
  alignas(64) float d[kColumns * kDepth + kBehindCopy];
  alignas(64) float x[kRun];
  alignas(64) float y[kRun];
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
void copy_rows(Matrix<const T> from, int64_t rows, int64_t columns, Matrix<T> to) {
  if (from.data == to.data) return;
  for (int64_t r = 0; r < rows; ++r)
    memcpy(to.data + r * to.stride, from.data + r * from.stride, static_cast<size_t>(columns) * sizeof(T));
}

template <class T>
void transpose(Matrix<const T> from, int64_t rows, int64_t columns, float scale, Matrix<float> to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to.data[c * to.stride + r] = scale * to_float(from.data[r * from.stride + c]);
}

// Asks for them early; a no-op for what does not exist.
template <class T>
void prefetch(Matrix<T> matrix, int64_t rows, int64_t columns) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += kLine) __builtin_prefetch(matrix.data + r * matrix.stride + c);
}

// A block, or some columns of it, and where the memory ends that may be read.
template <class B>
struct Block {
  Matrix<const B> d;
  const B* end;
  float scale;
};

// y = y0 + x · panel, with all of the panel's depth; of many rows so few at a time that they stay in the first-level
// cache.
template <class Simd, class B>
DIABLO_INLINE void multiply_panel(Matrix<const float> x, Block<B> panel, Matrix<const float> y0, Matrix<float> y,
                                  int64_t rows, int64_t depth, int64_t columns) {
  int64_t safe = depth;
  if (columns < Simd::width) {  // asked first: a division costs as much as a row of a small block
    const int64_t room = panel.end - panel.d.data - Simd::width;
    if (room < (depth - 1) * panel.d.stride) safe = room < 0 ? 0 : room / panel.d.stride + 1;
  }
  const int64_t step = rows <= kFewRows ? rows : kStreamedRows;
  for (int64_t r = 0; r < rows; r += step) {
    Strip<B> strip{depth, x.data + r * x.stride, x.stride, panel.d.data, panel.d.stride, panel.scale,
                   y0.data + r * y0.stride, y.data + r * y.stride, y.stride, 0, safe};
    multiply_rows<Simd>(strip, smaller(step, rows - r), columns);
  }
}

// The block is read where it lies.
template <class Simd, class B>
DIABLO_INLINE void multiply_in_place(Matrix<const float> x, Block<B> block, Matrix<const float> y0, Matrix<float> y,
                                     int64_t rows, int64_t depth, int64_t columns) {
  constexpr int64_t kTile = Simd::tile_vectors * Simd::width;
  const bool wide = columns > kColumns, once = rows <= kMostStoredRows, few = wide && !once;
  const int64_t panel_columns = few ? kTile : wide ? kOnceColumns : columns;
  const int64_t few_depth = rows < kFewestDeep ? kFewDepth : kDeepDepth;  // more rows give more time to fetch the next
  const int64_t once_depth = std::is_same<B, float>::value && columns <= kShortColumns ? kShortDepth : kOnceDepth;
  const int64_t panel_depth = few ? few_depth : wide ? once_depth : once ? depth : kDepth;
  for (int64_t k = 0; k < depth; k += panel_depth) {
    const int64_t height = smaller(panel_depth, depth - k);
    for (int64_t c = 0, width; c < columns; c += width) {
      width = few && columns - c < 2 * kTile ? columns - c : smaller(panel_columns, columns - c);
      // The rows of a panel lie far apart, where only the program knows which it will read
      if (few) prefetch(block.d.from(k + panel_depth, c), smaller(panel_depth, depth - k - panel_depth), width);
      multiply_panel<Simd>(x.from(0, k), Block<B>{block.d.from(k, c), block.end, block.scale},
                           k == 0 ? y0.from(0, c) : Matrix<const float>{y.data + c, y.stride}, y.from(0, c), rows,
                           height, width);
    }
  }
}

// As many of the columns that are left as go through the registers at once; a rest is at least a vector, if it can be.
template <class Simd>
constexpr int64_t strip_width(int64_t left) {
  constexpr int64_t kTile = Simd::tile_vectors * Simd::width;
  return left <= kTile ? left : left < kTile + Simd::width ? kTile - Simd::width : kTile;
}

// A strip's columns lie together in the copy, strip behind strip: rows of a whole panel, at strides of a power of two,
// would fall on the same few sets of the first-level cache.
template <class Simd, class B>
DIABLO_INLINE void copy_strips(Matrix<const B> from, int64_t rows, int64_t columns, float scale, float* to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0, width; c < columns; c += width) {
      width = strip_width<Simd>(columns - c);
      widen<Simd>(from.data + r * from.stride + c, width, scale, to + c * rows + r * width);
    }
}

// y = y0 + x · panel; `copy` as copy_strips made it. Of many rows a tile at a time, by all strips: x is the smaller part.
template <class Simd>
DIABLO_INLINE void multiply_strips(Matrix<const float> x, const float* copy, Matrix<const float> y0, Matrix<float> y,
                                   int64_t rows, int64_t depth, int64_t columns) {
  const float* end = copy + kColumns * kDepth + kBehindCopy;
  const int64_t step = rows <= kStreamedRows ? rows : Simd::sums / Simd::tile_vectors;
  for (int64_t r = 0; r < rows; r += step)
    for (int64_t c = 0, width; c < columns; c += width) {
      width = strip_width<Simd>(columns - c);
      multiply_panel<Simd>(x.from(r, 0), Block<float>{{copy + c * depth, width}, end, 1.0f}, y0.from(r, c),
                           y.from(r, c), smaller(step, rows - r), depth, width);
    }
}

// Panels of the block are copied, to float32; transposed where a vector would be idle in most of its lanes.
template <class Simd, class B>
DIABLO_INLINE void multiply_copied(Matrix<const float> x, Block<B> block, Matrix<const float> y0, Matrix<float> y,
                                   int64_t rows, int64_t depth, int64_t columns, bool dots, float* copy) {
  for (int64_t c = 0; c < columns; c += kColumns) {
    const int64_t width = smaller(kColumns, columns - c);
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t height = smaller(kDepth, depth - k);
      const Matrix<const float> before = k == 0 ? y0.from(0, c) : Matrix<const float>{y.data + c, y.stride};
      if (dots) {
        transpose(block.d.from(k, c), height, width, block.scale, Matrix<float>{copy, kDepth});
        dot_rows<Simd>(Strip<float>{height, x.data + k, x.stride, copy, kDepth, 1.0f, before.data, y.data + c,
                                    y.stride, 0, 0},
                       rows, width);
      } else {
        copy_strips<Simd>(block.d.from(k, c), height, width, block.scale, copy);
        multiply_strips<Simd>(x.from(0, k), copy, before, y.from(0, c), rows, height, width);
      }
    }
  }
}

// y = y0 + x · scale · d, with x (rows, depth), d (depth, columns), y0 and y (rows, columns); depth > 0.
template <class Simd, class B>
DIABLO_INLINE void multiply_block(Matrix<const float> x, Block<B> block, Matrix<const float> y0, Matrix<float> y,
                                  int64_t rows, int64_t depth, int64_t columns, float* copy) {
  constexpr bool kStored = !std::is_same<B, float>::value;
  const bool dots = 4 * columns <= Simd::width && rows >= kRowsForDots;
  const bool crowded = block.d.stride * static_cast<int64_t>(sizeof(B)) % kCrowded == 0;
  const int64_t few = crowded ? kMostStoredRows : kFewRows;
  const int64_t most_in_place = kStored ? kMostStoredRows : columns <= kColumns ? rows : few;
  if (dots || rows > most_in_place) {
    multiply_copied<Simd>(x, block, y0, y, rows, depth, columns, dots, copy);
  } else {
    multiply_in_place<Simd>(x, block, y0, y, rows, depth, columns);
  }
}

template <class B>
Block<B> block_of(const diablo::Job& job, int64_t block, int64_t column) {
  const DiabloShape& s = job.shape;
  const B* blocks = static_cast<const B*>(job.blocks);
  return {{blocks + block * s.block_size_in * s.block_size_out + column, s.block_size_out},
          blocks + s.num_blocks * s.block_size_in * s.block_size_out,
          std::is_same<B, int8_t>::value ? job.scales[block] : 1.0f};
}

// As many of the small blocks [first, end) as can be read as one stream, if rows are few; returns how many that were.
template <class Simd, class B>
DIABLO_INLINE int64_t multiply_stream(const diablo::Job& job, int64_t first, int64_t end, Matrix<const float> x,
                                      Matrix<const float> y0, Matrix<float> y, int64_t rows) {
  const DiabloShape& s = job.shape;
  const Block<B> block = block_of<B>(job, first, 0);
  const int64_t inputs = smaller(end * s.block_size_in, s.in_features) - first * s.block_size_in;
  const int64_t outputs = smaller(end * s.block_size_out, s.out_features) - first * s.block_size_out;
  const int64_t count = streamable<Simd>(inputs, outputs, block.end - block.d.data, s.block_size_in, s.block_size_out);
  for (int64_t r = 0; r < rows; ++r)
    stream<Simd>(Stream<B>{count, s.block_size_in, s.block_size_out, x.data + r * x.stride, block.d.data,
                           job.scales + (job.scales ? first : 0), y0.data + r * y0.stride, y.data + r * y.stride});
  return count;
}

// Blocks [first, end) on some rows; x begins at the first block's inputs, y0 and y at its outputs in the piece.
template <class Simd, class B>
void multiply_blocks(const diablo::Job& job, const diablo::Piece& piece, int64_t first, int64_t end,
                     Matrix<const float> x, Matrix<const float> y0, Matrix<float> y, int64_t rows, float* copy) {
  const DiabloShape& s = job.shape;
  const bool whole = piece.end_column - piece.first_column == s.block_size_out;
  int64_t block = first;
  if (whole && is_stream(rows, s.block_size_out))
    block += multiply_stream<Simd, B>(job, first, end, x, y0, y, rows);
  for (; block < end; ++block) {
    const int64_t depth = smaller(s.block_size_in, s.in_features - block * s.block_size_in);
    const int64_t left = s.out_features - block * s.block_size_out - piece.first_column;
    const int64_t columns = smaller(piece.end_column - piece.first_column, left);
    const int64_t input = (block - first) * s.block_size_in, output = (block - first) * s.block_size_out;
    if (columns <= 0) break;  // here and in all blocks behind it there is only padding
    if (depth <= 0) {         // it meets no input
      copy_rows(y0.from(0, output), rows, columns, y.from(0, output));
    } else {
      multiply_block<Simd>(x.from(0, input), block_of<B>(job, block, piece.first_column), y0.from(0, output),
                           y.from(0, output), rows, depth, columns, copy);
    }
  }
}

// The same for 16-bit rows, as many blocks at a time as there is room for; sums are rounded once, at their end.
template <class Simd, class T, class B>
void multiply_narrow(const diablo::Job& job, const diablo::Piece& piece, Matrix<const T> x, Matrix<const T> y0,
                     Matrix<T> y, int64_t rows, Scratch& scratch) {
  const DiabloShape& s = job.shape;
  const int64_t run = kRun / rows, width = piece.end_column - piece.first_column;
  const int64_t larger = s.block_size_in > s.block_size_out ? s.block_size_in : s.block_size_out;
  const int64_t group = width == s.block_size_out && larger <= run ? run / larger : 1;
  for (int64_t block = piece.first_block; block < piece.end_block; block += group) {
    const int64_t end = smaller(block + group, piece.end_block);
    const int64_t input = block * s.block_size_in, output = block * s.block_size_out + piece.first_column;
    const int64_t inputs = smaller((end - block) * s.block_size_in, s.in_features - input);
    const int64_t outputs = smaller((end - block - 1) * s.block_size_out + width, s.out_features - output);
    for (int64_t c = 0; c < outputs; c += run) {
      const int64_t columns = smaller(run, outputs - c);
      const Matrix<float> sums{scratch.y, columns};
      widen_rows<Simd>(y0.from(0, output + c), rows, columns, 1.0f, sums);
      for (int64_t k = 0; k < inputs; k += run) {
        const int64_t depth = smaller(run, inputs - k);
        const Matrix<float> wide{scratch.x, depth};
        const Matrix<const float> before{sums.data, sums.stride}, given{wide.data, wide.stride};
        if (c == 0 || inputs > run) widen_rows<Simd>(x.from(0, input + k), rows, depth, 1.0f, wide);
        if (group > 1 || (depth == inputs && columns == outputs)) {
          multiply_blocks<Simd, B>(job, piece, block, end, given, before, sums, rows, scratch.d);
        } else {
          Block<B> part = block_of<B>(job, block, piece.first_column);
          part.d = part.d.from(k, c);
          multiply_block<Simd>(given, part, before, sums, rows, depth, columns, scratch.d);
        }
      }
      narrow_rows<Simd>(Matrix<const float>{sums.data, sums.stride}, rows, columns, y.from(0, output + c));
    }
  }
}

// Whether so few rows at a time meet the blocks that whole rows pass through the cache.
template <class Simd>
bool is_streamed(const DiabloShape& s, const diablo::Piece& piece) {
  const int64_t blocks = piece.end_block - piece.first_block, columns = piece.end_column - piece.first_column;
  const bool large = s.block_size_out > kColumns, dots = 4 * s.block_size_out <= Simd::width;
  return blocks * s.block_size_in * columns <= kSmallBlocks && !large && !dots;
}

template <class Simd, class T, class B>
void run_piece(const diablo::Job& job, const diablo::Piece& piece) {
  const DiabloShape& s = job.shape;
  const Matrix<const T> x{static_cast<const T*>(job.x), s.x_stride}, y0{static_cast<const T*>(job.y0), s.y_stride};
  const Matrix<T> y{static_cast<T*>(job.y), s.y_stride};
  const int64_t all = piece.end_row - piece.first_row;
  // Large blocks by all rows, for what copying their panels costs; 16-bit ones by as many as there is room for
  const bool by_all = s.block_size_out > kColumns && std::is_same<T, float>::value;
  const int64_t step = is_streamed<Simd>(s, piece) ? kStreamedRows : by_all ? all : kSumRows;
  Scratch scratch;

  for (int64_t r = piece.first_row; r < piece.end_row; r += step) {
    const int64_t rows = smaller(step, piece.end_row - r);
    if constexpr (std::is_same<T, float>::value) {
      const int64_t input = piece.first_block * s.block_size_in;
      const int64_t output = piece.first_block * s.block_size_out + piece.first_column;
      multiply_blocks<Simd, B>(job, piece, piece.first_block, piece.end_block, x.from(r, input), y0.from(r, output),
                               y.from(r, output), rows, scratch.d);
    } else {
      multiply_narrow<Simd, T, B>(job, piece, x.from(r, 0), y0.from(r, 0), y.from(r, 0), rows, scratch);
    }
  }
}

// Small blocks beside many rows are widened once, a few at a time: the same job with float32 blocks.
template <class Simd, class T, class B>
void run_widened(const diablo::Job& job, const diablo::Piece& piece) {
  const DiabloShape& s = job.shape;
  const int64_t size = s.block_size_in * s.block_size_out, most = kColumns * kDepth / size;
  alignas(64) float wide[kColumns * kDepth];
  for (int64_t first = piece.first_block, end; first < piece.end_block; first = end) {
    end = smaller(first + most, piece.end_block);
    for (int64_t block = first; block < end; ++block) {
      const Block<B> from = block_of<B>(job, block, 0);
      widen<Simd>(from.d.data, size, from.scale, wide + (block - first) * size);
    }
    const int64_t input = first * s.block_size_in, output = first * s.block_size_out;
    diablo::Job part{s, static_cast<const T*>(job.x) + input, wide, nullptr, static_cast<const T*>(job.y0) + output,
                     static_cast<T*>(job.y) + output};
    part.shape.in_features -= input, part.shape.out_features -= output;
    part.shape.num_blocks = end - first, part.shape.block_type = DIABLO_F32;
    run_piece<Simd, T, float>(
        part, {0, end - first, piece.first_column, piece.end_column, piece.first_row, piece.end_row});
  }
}

template <class Simd, class T, class B>
void run_stored(const diablo::Job& job, const diablo::Piece& piece) {
  const DiabloShape& s = job.shape;
  const bool many = piece.end_row - piece.first_row > kStreamedRows;
  const bool fits = s.block_size_in * s.block_size_out <= kColumns * kDepth;
  many && fits && is_streamed<Simd>(s, piece) ? run_widened<Simd, T, B>(job, piece) : run_piece<Simd, T, B>(job, piece);
}

template <class Simd, class T>
void run_piece_of(const diablo::Job& job, const diablo::Piece& piece) {
  switch (job.shape.block_type) {
    case DIABLO_F32:
      return run_piece<Simd, T, float>(job, piece);
    case DIABLO_F16:
      return run_stored<Simd, T, Half>(job, piece);
    case DIABLO_BF16:
      return run_stored<Simd, T, Brain>(job, piece);
    case DIABLO_I8:
      return run_stored<Simd, T, int8_t>(job, piece);
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
