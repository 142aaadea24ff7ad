// The innermost loop: a few rows of x times a few vectors of columns of one block, all sums in registers.
//
// Simd is a struct of static functions over one vector register of floats; see avx2.cc for what it has. Always float32:
// other types are widened on their way here. See number.h for why all is unnamed.
#pragma once

#include <cstdint>
#include <utility>

namespace {

constexpr int kMostRows = 12;
constexpr int kMostVectors = 8;

// With so many vectors of columns, this many rows fill the registers.
template <class Simd>
constexpr int rows_beside(int vectors) {
  return Simd::sums / vectors < kMostRows ? Simd::sums / vectors : kMostRows;
}

struct Tile {
  int64_t depth;
  const float* x;  // (rows, depth)
  int64_t x_stride;
  const float* d;  // (depth, columns)
  int64_t d_stride;
  const float* y0;  // (rows, columns)
  float* y;
  int64_t y_stride;
};

// `last` is how many columns the last vector has. Ragged: fewer than a full vector; then nothing beyond them is
// touched, as what follows in y belongs to another block and maybe to another thread.
template <class Simd, int Rows, int Vectors, bool Ragged>
void multiply_tile(const Tile& tile, int last) {
  using Vector = typename Simd::Vector;
  constexpr int kLast = Vectors - 1;
  const typename Simd::Lanes lanes = Simd::lanes(last);
  const int64_t x_stride = tile.x_stride, d_stride = tile.d_stride, y_stride = tile.y_stride;
  // Every loop over sums is unrolled: one that is not would keep them in memory.
  Vector sums[Rows][Vectors];
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sums[r][v] = Simd::zero();

  const float *x = tile.x, *d = tile.d;
  for (int64_t left = tile.depth; left > 0; --left, ++x, d += d_stride) {
    Vector columns[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const float* at = d + v * Simd::width;
      columns[v] = Ragged && v == kLast ? Simd::load(at, lanes) : Simd::load(at);
    }
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const Vector input = Simd::broadcast(x + r * x_stride);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sums[r][v] = Simd::fma(input, columns[v], sums[r][v]);
    }
  }
  const float* from = tile.y0;
  float* to = tile.y;
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r, from += y_stride, to += y_stride) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const int at = v * Simd::width;
      if (Ragged && v == kLast) {
        Simd::store(to + at, Simd::add(Simd::load(from + at, lanes), sums[r][v]), lanes);
      } else {
        Simd::store(to + at, Simd::add(Simd::load(from + at), sums[r][v]));
      }
    }
  }
}

using TileKernel = void (*)(const Tile&, int);

template <class Simd, int Vectors, bool Ragged, int... Row>
TileKernel pick_rows(int rows, std::integer_sequence<int, Row...>) {
  static constexpr TileKernel kernels[] = {multiply_tile<Simd, Row + 1, Vectors, Ragged>...};
  return kernels[rows - 1];
}

template <class Simd, bool Ragged>
TileKernel pick(int rows, int vectors) {
  switch (vectors) {
    case 8:
      return pick_rows<Simd, 8, Ragged>(rows, std::make_integer_sequence<int, rows_beside<Simd>(8)>());
    case 4:
      return pick_rows<Simd, 4, Ragged>(rows, std::make_integer_sequence<int, rows_beside<Simd>(4)>());
    case 2:
      return pick_rows<Simd, 2, Ragged>(rows, std::make_integer_sequence<int, rows_beside<Simd>(2)>());
    default:
      return pick_rows<Simd, 1, Ragged>(rows, std::make_integer_sequence<int, rows_beside<Simd>(1)>());
  }
}

// `rows` rows, at most rows_beside(1), and any number of columns: tile after tile, each as wide as the registers allow.
template <class Simd>
void multiply_rows(Tile tile, int rows, int64_t columns) {
  int vectors = kMostVectors;
  while (rows > rows_beside<Simd>(vectors)) vectors /= 2;
  for (int64_t left = columns; left > 0;) {
    while (vectors > 1 && left <= (vectors - 1) * Simd::width) vectors /= 2;
    const int64_t width = vectors * Simd::width, taken = left < width ? left : width;
    const int last = static_cast<int>(taken - (vectors - 1) * Simd::width);
    (left < width ? pick<Simd, true>(rows, vectors) : pick<Simd, false>(rows, vectors))(tile, last);
    tile.d += taken, tile.y0 += taken, tile.y += taken, left -= taken;
  }
}

// The same for so few columns that most of a vector would be idle: dot products instead. Here tile.d is transposed,
// (columns, depth).
template <class Simd>
void dot_rows(const Tile tile, int64_t rows, int64_t columns) {
  using Vector = typename Simd::Vector;
  const int64_t whole = (tile.depth - 1) / Simd::width * Simd::width;
  const typename Simd::Lanes lanes = Simd::lanes(static_cast<int>(tile.depth - whole));
  for (int64_t c = 0; c < columns; ++c) {
    const float* d = tile.d + c * tile.d_stride;
    const Vector rest = Simd::load(d + whole, lanes);  // all there is of a tiny block, read once for all rows
    const float *x = tile.x, *from = tile.y0 + c;
    float* to = tile.y + c;
    for (int64_t r = 0; r < rows; ++r, x += tile.x_stride, from += tile.y_stride, to += tile.y_stride) {
      Vector sum = Simd::mul(Simd::load(x + whole, lanes), rest);
      for (int64_t k = 0; k < whole; k += Simd::width) sum = Simd::fma(Simd::load(x + k), Simd::load(d + k), sum);
      *to = *from + Simd::sum(sum);
    }
  }
}

}  // namespace
