// The innermost loop: a few rows of x times a few vectors of columns of one block, all sums in registers.
//
// Simd is a struct of static functions over one vector register of floats; see avx2.cc for what it has. x and y are
// float32 here, a block may be of any type it is stored in. See number.h for why all is unnamed.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "number.h"

namespace {

// Inlined, as what they would hand on in memory is read again before it got there.
#define DIABLO_INLINE inline __attribute__((always_inline))

constexpr int kMostRows = 12;
constexpr int kMostVectors = 8;
constexpr int kMostStoredRows = 4;  // beside blocks that are not float32: more are worth widening the block once

constexpr int smaller_of(int a, int b) { return a < b ? a : b; }

// With so many vectors of columns, this many rows fill the registers.
template <class Simd, class B>
constexpr int rows_beside(int vectors) {
  return smaller_of(Simd::sums / vectors, std::is_same<B, float>::value ? kMostRows : kMostStoredRows);
}

// Beside so many rows, this many vectors; never so few that loading x is what takes time.
template <class Simd>
constexpr int vectors_beside(int64_t rows) {
  if (rows * Simd::tile_vectors >= Simd::sums) return Simd::tile_vectors;
  return smaller_of(Simd::sums / static_cast<int>(rows), kMostVectors);
}

template <class B>
struct Strip {
  int64_t depth;
  const float* x;  // (rows, depth)
  int64_t x_stride;
  const B* d;  // (depth, columns)
  int64_t d_stride;
  float scale;    // of int8 blocks; 1 otherwise
  const float* y0;  // (rows, columns)
  float* y;
  int64_t y_stride;
  int64_t last;        // column where the last vector begins
  int64_t safe_depth;  // narrow blocks: so many rows can be read a whole vector at a time
};

// The first `count` lanes of a vector, the others 0, where nothing behind them may be read.
template <class Simd, class B>
typename Simd::Vector widen_few(const B* at, int64_t count) {
  B whole[Simd::width] = {};
  for (int64_t i = 0; i < count; ++i) whole[i] = at[i];
  return Simd::widen(whole);
}

// As many rows as there are, Rows at a time. The last vector overlaps the one before it rather than being ragged: both
// compute the same. Narrow: less than one vector in all. Then vectors of d reach into the next row of d, but nothing
// beyond the columns is touched in y, which belongs to another block and maybe to another thread.
// Few sums would wait for each other, so there are several of each, over every Splits-th input.
template <class Simd, class B, int Rows, int Vectors, bool Narrow>
void multiply_strip(const Strip<B>& strip, int64_t row, int64_t rows) {
  using Vector = typename Simd::Vector;
  constexpr int kSplits = Rows * Vectors <= 2 ? 4 : Rows * Vectors <= 4 ? 2 : 1;
  constexpr bool kScaled = std::is_same<B, int8_t>::value;
  const int64_t x_stride = strip.x_stride, d_stride = strip.d_stride, y_stride = strip.y_stride;
  const int64_t last = Narrow ? 0 : strip.last, columns = strip.last + Simd::width;
  const typename Simd::Lanes lanes = Simd::lanes(static_cast<int>(Narrow ? columns : Simd::width));
  const auto column = [&](int v) { return v == Vectors - 1 ? last : int64_t{v} * Simd::width; };

  const float *first_x = strip.x + row * x_stride, *from = strip.y0 + row * y_stride;
  for (float* to = strip.y + row * y_stride; rows >= Rows;
       rows -= Rows, first_x += Rows * x_stride, from += Rows * y_stride, to += Rows * y_stride) {
    // Every loop over sums is unrolled: one that is not would keep them in memory.
    Vector sums[kSplits][Rows][Vectors];
#pragma GCC unroll 4
    for (int s = 0; s < kSplits; ++s)
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
          if (s > 0 || kScaled) {
            sums[s][r][v] = Simd::zero();
          } else {
            const float* at = from + r * y_stride + column(v);
            sums[s][r][v] = Narrow ? Simd::load(at, lanes) : Simd::load(at);
          }
        }
    const float* x = first_x;
    const B* d = strip.d;
    const auto step = [&](int split, const Vector* block) {
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r) {
        const Vector input = Simd::broadcast(x + r * x_stride);
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sums[split][r][v] = Simd::fma(input, block[v], sums[split][r][v]);
      }
      ++x, d += d_stride;
    };
    const auto whole_step = [&](int split) {
      Vector block[Vectors];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) block[v] = Simd::widen(d + column(v));
      step(split, block);
    };
    const int64_t whole = Narrow ? strip.safe_depth : strip.depth;
    int64_t k = 0;
    for (; k + kSplits <= whole; k += kSplits) {
#pragma GCC unroll 4
      for (int s = 0; s < kSplits; ++s) whole_step(s);
    }
    if (kSplits > 1)
      for (; k < whole; ++k) whole_step(0);
    if (Narrow)
      for (; k < strip.depth; ++k) {
        const Vector block = widen_few<Simd>(d, columns);
        step(0, &block);
      }
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
#pragma GCC unroll 4
        for (int s = 1; s < kSplits; ++s) sums[0][r][v] = Simd::add(sums[0][r][v], sums[s][r][v]);
        if (kScaled) {
          const float* at = from + r * y_stride + column(v);
          const Vector before = Narrow ? Simd::load(at, lanes) : Simd::load(at);
          sums[0][r][v] = Simd::fma(Simd::broadcast(&strip.scale), sums[0][r][v], before);
        }
      }
    // After the last load: it may be in place, and vectors overlap
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        float* at = to + r * y_stride + column(v);
        Narrow ? Simd::store(at, sums[0][r][v], lanes) : Simd::store(at, sums[0][r][v]);
      }
  }
}

template <class B>
using StripKernel = void (*)(const Strip<B>&, int64_t row, int64_t rows);

template <class Simd, class B, int Vectors, bool Narrow, int... Row>
StripKernel<B> pick_rows(int64_t rows, std::integer_sequence<int, Row...>) {
  static constexpr StripKernel<B> kernels[] = {multiply_strip<Simd, B, Row + 1, Vectors, Narrow>...};
  return kernels[rows - 1];
}

// A strip is not passed by value: reading again what was just written in smaller parts stalls.
template <class Simd, class B, int Vectors, bool Narrow = false>
DIABLO_INLINE void run_strip(const Strip<B>& strip, int64_t rows) {
  constexpr int kFull = rows_beside<Simd, B>(Vectors);
  const int64_t rest = rows % kFull, full = rows - rest;
  if (full > 0) multiply_strip<Simd, B, kFull, Vectors, Narrow>(strip, 0, full);
  if (rest > 0) pick_rows<Simd, B, Vectors, Narrow>(rest, std::make_integer_sequence<int, kFull>())(strip, full, rest);
}

// Any number of rows and columns: strip after strip, each as wide as the registers allow.
template <class Simd, class B>
DIABLO_INLINE void multiply_rows(Strip<B>& strip, int64_t rows, int64_t columns) {
  constexpr int kWidth = Simd::width;
  const int64_t most = vectors_beside<Simd>(rows);
  for (int64_t left = columns, taken; left > 0; strip.d += taken, strip.y0 += taken, strip.y += taken, left -= taken) {
    // A rest of less than a vector needs another beside it to overlap
    int64_t vectors = (left + kWidth - 1) / kWidth;
    if (vectors > most) vectors = left < (most + 1) * kWidth && most > 1 ? most - 1 : most;
    taken = left < vectors * kWidth ? left : vectors * kWidth;
    strip.last = taken - kWidth;
    if (taken < kWidth) {
      run_strip<Simd, B, 1, true>(strip, rows);
      continue;
    }
    switch (vectors) {
      case 1: run_strip<Simd, B, 1>(strip, rows); break;
      case 2: run_strip<Simd, B, 2>(strip, rows); break;
      case 3: run_strip<Simd, B, 3>(strip, rows); break;
      case 4: run_strip<Simd, B, 4>(strip, rows); break;
      case 5: run_strip<Simd, B, 5>(strip, rows); break;
      case 6: run_strip<Simd, B, 6>(strip, rows); break;
      case 7: run_strip<Simd, B, 7>(strip, rows); break;
      default: run_strip<Simd, B, 8>(strip, rows); break;
    }
  }
}

// Dot products, for so few columns that most of a vector would be idle. Here strip.d is transposed, (columns, depth).
template <class Simd>
void dot_rows(const Strip<float>& strip, int64_t rows, int64_t columns) {
  using Vector = typename Simd::Vector;
  const int64_t whole = (strip.depth - 1) / Simd::width * Simd::width;
  const typename Simd::Lanes lanes = Simd::lanes(static_cast<int>(strip.depth - whole));
  for (int64_t c = 0; c < columns; ++c) {
    const float* d = strip.d + c * strip.d_stride;
    const Vector rest = Simd::load(d + whole, lanes);  // all there is of a tiny block, read once for all rows
    const float *x = strip.x, *from = strip.y0 + c;
    float* to = strip.y + c;
    for (int64_t r = 0; r < rows; ++r, x += strip.x_stride, from += strip.y_stride, to += strip.y_stride) {
      Vector sum = Simd::mul(Simd::load(x + whole, lanes), rest);
      for (int64_t k = 0; k < whole; k += Simd::width) sum = Simd::fma(Simd::load(x + k), Simd::load(d + k), sum);
      *to = *from + Simd::sum(sum);
    }
  }
}

}  // namespace
