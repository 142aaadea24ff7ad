// What the plan hands to the kernel of an instruction set.
#pragma once

#include "diablo/block_diag.h"

namespace diablo {

struct Job {
  DiabloShape shape;
  const void* x;
  const void* blocks;
  const float* scales;
  const void* y0;
  void* y;
};

// What one thread does at a time: some columns of some blocks on some rows. No two pieces write the same part of y.
struct Piece {
  int64_t first_block, end_block;
  int64_t first_column, end_column;  // of each of these blocks
  int64_t first_row, end_row;
};

using Kernel = void (*)(const Job&, const Piece&);

void portable_kernel(const Job& job, const Piece& piece);
void avx2_kernel(const Job& job, const Piece& piece);
void avx512_kernel(const Job& job, const Piece& piece);
void neon_kernel(const Job& job, const Piece& piece);

}  // namespace diablo
