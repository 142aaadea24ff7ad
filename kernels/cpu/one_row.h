// A row or a few by small blocks, all in one loop: so small that what is done once a block is most of the time.
//
// Blocks lie one behind the other in memory. Vectors reach over a block's end into the next one, whose numbers are
// never stored or added up; the last blocks, behind which there is nothing to read, are left to others.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tile.h"

namespace {

constexpr int64_t kStreamedColumns = 128;  // above, rows of a block are long runs of their own
constexpr int64_t kNarrowRows = 4;         // what is used by more rows is worth keeping in registers, unless narrow
constexpr int kMostStreamed = 6;           // vectors of columns at a time, two sums of each
constexpr int kCacheLine = 64;             // bytes
constexpr int kAhead = 2048;               // bytes; of 1 to 4 KiB the fastest for 8 and 16 bits

// Blocks [0, count), their inputs and their outputs.
template <class B>
struct Stream {
  int64_t count, depth, columns;
  const float* x;
  const B* d;
  const float* scales;  // of int8 blocks
  const float* y0;
  float* y;

  float scale(int64_t block) const { return std::is_same<B, int8_t>::value ? scales[block] : 1.0f; }
};

// A processor's own prefetching ends with each page, and few pages are all that a call reads. float32 comes as fast as
// memory delivers it anyway.
template <class B>
DIABLO_INLINE void prefetch_ahead(const B* d) {
  if (sizeof(B) < sizeof(float)) __builtin_prefetch(reinterpret_cast<const char*>(d) + kAhead);
}

// Some vectors of columns of one block; of the last vector, the lanes that are the block's. Two sums of each, over
// every other input, so that few of them do not wait for each other.
template <class Simd, class B, int Vectors>
DIABLO_INLINE void stream_columns(const float* x, const B* d, int64_t depth, int64_t stride, float scale,
                                  const float* y0, float* y, typename Simd::Lanes last) {
  using Vector = typename Simd::Vector;
  Vector even[Vectors], odd[Vectors];
#pragma GCC unroll 6
  for (int v = 0; v < Vectors; ++v) even[v] = odd[v] = Simd::zero();
  int64_t k = 0;
  for (; k + 2 <= depth; k += 2, d += 2 * stride) {
    const Vector first = Simd::broadcast(x + k), second = Simd::broadcast(x + k + 1);
    prefetch_ahead(d);
    if (2 * Vectors * Simd::width * sizeof(B) > kCacheLine) prefetch_ahead(d + stride);  // else two rows are a line or less
#pragma GCC unroll 6
    for (int v = 0; v < Vectors; ++v) {
      even[v] = Simd::fma(first, Simd::widen(d + v * Simd::width), even[v]);
      odd[v] = Simd::fma(second, Simd::widen(d + stride + v * Simd::width), odd[v]);
    }
  }
  if (k < depth) {
    const Vector input = Simd::broadcast(x + k);
#pragma GCC unroll 6
    for (int v = 0; v < Vectors; ++v) even[v] = Simd::fma(input, Simd::widen(d + v * Simd::width), even[v]);
  }
  const Vector factor = Simd::broadcast(&scale);
#pragma GCC unroll 6
  for (int v = 0; v < Vectors; ++v) {
    const float* from = y0 + v * Simd::width;
    float* to = y + v * Simd::width;
    const Vector sum = Simd::add(even[v], odd[v]);
    if (v < Vectors - 1) {
      Simd::store(to, Simd::fma(factor, sum, Simd::load(from)));
    } else {
      Simd::store(to, Simd::fma(factor, sum, Simd::load(from, last)), last);
    }
  }
}

template <class Simd, class B>
void stream_blocks(Stream<B> s) {
  constexpr int kMost = smaller_of(Simd::sums / 2, kMostStreamed), kGroup = kMost * Simd::width;
  const int64_t rest = (s.columns - 1) % kGroup + 1, whole = s.columns - rest;  // at least one column is left
  const int64_t vectors = (rest + Simd::width - 1) / Simd::width;
  const typename Simd::Lanes last = Simd::lanes(static_cast<int>(rest - (vectors - 1) * Simd::width));
  const typename Simd::Lanes all = Simd::lanes(Simd::width);
  for (int64_t i = 0; i < s.count; ++i) {
    const float scale = s.scale(i);
    for (int64_t c = 0; c < whole; c += kGroup)
      stream_columns<Simd, B, kMost>(s.x, s.d + c, s.depth, s.columns, scale, s.y0 + c, s.y + c, all);
    const B* d = s.d + whole;
    const float* y0 = s.y0 + whole;
    float* y = s.y + whole;
    switch (vectors) {
      case 1: stream_columns<Simd, B, 1>(s.x, d, s.depth, s.columns, scale, y0, y, last); break;
      case 2: stream_columns<Simd, B, 2>(s.x, d, s.depth, s.columns, scale, y0, y, last); break;
      case 3: stream_columns<Simd, B, 3>(s.x, d, s.depth, s.columns, scale, y0, y, last); break;
      case 4: stream_columns<Simd, B, 4>(s.x, d, s.depth, s.columns, scale, y0, y, last); break;
      case 5: stream_columns<Simd, B, 5>(s.x, d, s.depth, s.columns, scale, y0, y, last); break;
      default: stream_columns<Simd, B, kMost>(s.x, d, s.depth, s.columns, scale, y0, y, last); break;
    }
    s.x += s.depth, s.d += s.depth * s.columns, s.y0 += s.columns, s.y += s.columns;
  }
}

// So few columns that several rows of a block fill a vector: it is read as one run of numbers, each input repeated
// beside it, and the lanes of a column are added up at the end.
template <class Simd, class B, int Columns>
void stream_narrow_blocks(Stream<B> s) {
  using Vector = typename Simd::Vector;
  constexpr int kInputs = Simd::width / Columns;  // to a vector
  const int64_t whole = s.depth / kInputs * kInputs, rest = s.depth - whole;
  const typename Simd::Lanes lanes = Simd::lanes(static_cast<int>(rest * Columns));
  for (int64_t i = 0; i < s.count; ++i) {
    Vector sum = Simd::zero();
    prefetch_ahead(s.d);
    for (int64_t k = 0; k < whole; k += kInputs)
      sum = Simd::fma(Simd::template repeat<Columns>(s.x + k), Simd::widen(s.d + k * Columns), sum);
    if (rest > 0) {
      const Vector product = Simd::mul(Simd::template repeat<Columns>(s.x + whole), Simd::widen(s.d + whole * Columns));
      sum = Simd::add(sum, Simd::keep(product, lanes));
    }
    float sums[Columns];
    Simd::template fold<Columns>(sum, sums);
    for (int c = 0; c < Columns; ++c) s.y[c] = s.y0[c] + s.scale(i) * sums[c];
    s.x += s.depth, s.d += s.depth * Columns, s.y0 += Columns, s.y += Columns;
  }
}

constexpr bool is_narrow(int64_t columns) { return columns == 1 || columns == 2 || columns == 4; }

constexpr bool is_stream(int64_t rows, int64_t columns) {
  return rows <= kNarrowRows && (is_narrow(columns) || (rows == 1 && columns <= kStreamedColumns));
}

// How many blocks can be read a whole vector at a time; `inputs` of x and `numbers` of the blocks may be read.
template <class Simd>
int64_t streamable(int64_t inputs, int64_t outputs, int64_t numbers, int64_t depth, int64_t columns) {
  const int64_t by_x = (inputs - Simd::width) / depth, by_d = (numbers - Simd::width) / (depth * columns);
  const int64_t fewest = by_x < by_d ? by_x : by_d, by_y = outputs / columns;
  return fewest < 0 ? 0 : fewest < by_y ? fewest : by_y;
}

template <class Simd, class B>
void stream(const Stream<B>& s) {
  switch (s.columns) {
    case 1: return stream_narrow_blocks<Simd, B, 1>(s);
    case 2: return stream_narrow_blocks<Simd, B, 2>(s);
    case 4: return stream_narrow_blocks<Simd, B, 4>(s);
    default: return stream_blocks<Simd>(s);
  }
}

}  // namespace
