// The CPU entry: checks the sizes, chooses the instruction set, cuts the job into pieces for the threads.
#include "job.h"

namespace {

using diablo::Job;
using diablo::Kernel;
using diablo::Piece;

// What makes a piece worth handing to another thread, in products: about five microseconds on one core.
constexpr int64_t kPieceWork = 256 * 1024;
constexpr int64_t kFewestRows = 96;  // each piece copies its panels of the block again, so not too few rows share one
constexpr int64_t kPiecesWanted = 16;

struct Plan {
  Job job;
  Kernel kernel;
  int64_t rows, blocks;              // per piece
  int64_t row_pieces, block_pieces;  // how many
};

int64_t ceil_divide(int64_t a, int64_t b) { return a / b + (a % b != 0); }

int64_t clamp(int64_t value, int64_t low, int64_t high) { return value < low ? low : value > high ? high : value; }

Kernel kernel_of(DiabloIsa isa) {
  switch (isa) {
    case DIABLO_PORTABLE:
      return diablo::portable_kernel;
#ifdef DIABLO_X86
    case DIABLO_AVX2:
      return diablo::avx2_kernel;
    case DIABLO_AVX512:
      return diablo::avx512_kernel;
#endif
#ifdef DIABLO_ARM
    case DIABLO_NEON:
      return diablo::neon_kernel;
#endif
    default:
      return nullptr;
  }
}

DiabloIsa best_isa() {
  constexpr DiabloIsa best_first[] = {DIABLO_AVX512, DIABLO_AVX2, DIABLO_NEON};
  for (DiabloIsa isa : best_first)
    if (diablo_has(isa)) return isa;
  return DIABLO_PORTABLE;
}

bool is_empty(const DiabloShape& s) { return s.num_blocks == 0 || s.block_size_in == 0 || s.block_size_out == 0; }

// Rows are cut only where the blocks alone are too few pieces to keep threads busy.
Plan make_plan(const Job& job, Kernel kernel) {
  const DiabloShape& s = job.shape;
  const int64_t row_pieces = clamp(ceil_divide(kPiecesWanted, s.num_blocks), 1, ceil_divide(s.rows, kFewestRows));
  const int64_t rows = ceil_divide(s.rows, row_pieces);
  // Below 8 rows the time goes into reading the block, whatever the number of rows.
  const int64_t work = s.block_size_in * s.block_size_out * (rows < 8 ? 8 : rows);
  const int64_t blocks = clamp(kPieceWork / work, 1, s.num_blocks);
  return {job, kernel, rows, blocks, ceil_divide(s.rows, rows), ceil_divide(s.num_blocks, blocks)};
}

void run_piece(void* data, size_t i) {
  const Plan& plan = *static_cast<const Plan*>(data);
  const DiabloShape& s = plan.job.shape;
  const int64_t block = static_cast<int64_t>(i) % plan.block_pieces * plan.blocks;
  const int64_t row = static_cast<int64_t>(i) / plan.block_pieces * plan.rows;
  plan.kernel(plan.job, Piece{block, clamp(block + plan.blocks, 0, s.num_blocks), row, clamp(row + plan.rows, 0, s.rows)});
}

void copy(const Job& job) {
  const DiabloShape& s = job.shape;
  if (job.y0 == job.y) return;
  const size_t size = s.type == DIABLO_F32 ? 4 : 2;
  const size_t step = static_cast<size_t>(s.y_stride) * size, count = static_cast<size_t>(s.out_features) * size;
  for (int64_t row = 0; row < s.rows; ++row) {
    const size_t at = static_cast<size_t>(row) * step;
    __builtin_memcpy(static_cast<char*>(job.y) + at, static_cast<const char*>(job.y0) + at, count);
  }
}

}  // namespace

int diablo_has(DiabloIsa isa) {
  switch (isa) {
#ifdef DIABLO_X86
    case DIABLO_AVX2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case DIABLO_AVX512:
      return __builtin_cpu_supports("avx512f") && diablo_has(DIABLO_AVX2);
#endif
    default:
      return isa == DIABLO_AUTO || kernel_of(isa) != nullptr;
  }
}

DiabloError diablo_block_diag_cpu(const DiabloShape* shape, const void* x, const void* blocks, const float* scales,
                                  const void* y0, void* y, const DiabloParallelFor* pool, DiabloIsa isa) {
  const DiabloError error = diablo_check(shape);
  if (error != DIABLO_OK) return error;
  if (!diablo_has(isa)) return DIABLO_NO_SUCH_ISA;
  const Job job{*shape, x, blocks, scales, y0, y};
  if (shape->rows == 0 || shape->out_features == 0) return DIABLO_OK;
  if (is_empty(*shape)) {
    copy(job);
    return DIABLO_OK;
  }
  if (shape->block_type == DIABLO_I8 && scales == nullptr) return DIABLO_NO_SCALES;
  Plan plan = make_plan(job, kernel_of(isa == DIABLO_AUTO ? best_isa() : isa));
  const size_t pieces = static_cast<size_t>(plan.row_pieces * plan.block_pieces);
  if (pool != nullptr && pieces > 1) {
    pool->run(pool->pool, run_piece, &plan, pieces);
  } else {
    for (size_t i = 0; i < pieces; ++i) run_piece(&plan, i);
  }
  return DIABLO_OK;
}
