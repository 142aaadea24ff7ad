// The CPU entry: checks the sizes, chooses the instruction set, cuts the job into pieces for the threads.
#include "job.h"

namespace {

using diablo::Job;
using diablo::Kernel;
using diablo::Piece;

// What makes a piece worth handing to another thread, in products: about five microseconds on one core. Reading a byte
// of a block takes as long as two products, so this is also 128 KiB of blocks.
constexpr int64_t kPieceWork = 256 * 1024, kByteWork = 2;
constexpr int64_t kMostPieces = 16;
// So much of the blocks stays in a core's cache while rows stream past them.
constexpr int64_t kCachedBlocks = 96 * 1024;
// Columns of a block are shared out before rows: two pieces of the same columns copy the same panels of the block. Few
// rows read the block in long runs, which must not become short.
constexpr int64_t kFewRows = 48, kFewestRows = 384, kFewestColumns = 128, kFewestLongColumns = 4096;
constexpr int64_t kRowStep = 12;  // of a kernel: so many rows meet a block once, and need not find it in the cache again

struct Plan {
  Job job;
  Kernel kernel;
  int64_t blocks, columns, rows;                    // per piece
  int64_t block_pieces, column_pieces, row_pieces;  // how many
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

int64_t size_of(DiabloType type) { return type == DIABLO_F32 ? 4 : type == DIABLO_I8 ? 1 : 2; }

bool is_empty(const DiabloShape& s) { return s.num_blocks == 0 || s.block_size_in == 0 || s.block_size_out == 0; }

// Into how many parts to cut `size`, so that there are `wanted` pieces if none becomes smaller than `fewest`.
int64_t parts(int64_t wanted, int64_t size, int64_t fewest) { return clamp(wanted, 1, ceil_divide(size, fewest)); }

// All small blocks that fit in the cache by some of the rows: then whole rows pass through it. Large blocks, and all
// where rows are few, are shared out one by one; columns are cut only where blocks are too few to keep threads busy.
Plan make_plan(const Job& job, Kernel kernel) {
  const DiabloShape& s = job.shape;
  const int64_t block = s.block_size_in * s.block_size_out;
  // With few rows the time goes into reading the block, whatever their number.
  const int64_t rows = clamp(s.rows, kByteWork * size_of(s.block_type), kPieceWork);
  const int64_t wanted = clamp(s.num_blocks * block / (kPieceWork / rows), 1, kMostPieces);
  const bool few = s.rows <= kFewRows;
  Plan plan{job, kernel, s.num_blocks, s.block_size_out, s.rows, 1, 1, 1};
  if (wanted == 1 && s.rows <= kRowStep) return plan;  // what follows takes as long as some small blocks

  const int64_t cached = s.rows <= kRowStep ? s.num_blocks : clamp(kCachedBlocks / block, 1, s.num_blocks);
  const int64_t cached_parts = ceil_divide(s.num_blocks, cached);
  const bool by_blocks = few || s.block_size_out > kFewestColumns;
  const int64_t block_parts = by_blocks ? clamp(wanted, cached_parts, s.num_blocks) : cached_parts;
  plan.blocks = ceil_divide(s.num_blocks, block_parts);
  plan.block_pieces = ceil_divide(s.num_blocks, plan.blocks);

  const int64_t fewest_columns = few ? kFewestLongColumns : kFewestColumns;
  const int64_t column_parts = parts(ceil_divide(wanted, plan.block_pieces), s.block_size_out, fewest_columns);
  plan.columns = ceil_divide(ceil_divide(s.block_size_out, column_parts), fewest_columns) * fewest_columns;
  plan.column_pieces = ceil_divide(s.block_size_out, plan.columns);

  const int64_t fewest_rows = block > kCachedBlocks / 8 ? kFewestRows : kRowStep;
  const int64_t wanted_rows = ceil_divide(wanted, plan.block_pieces * plan.column_pieces);
  const int64_t row_parts = few ? 1 : parts(wanted_rows, s.rows, fewest_rows);
  plan.rows = ceil_divide(ceil_divide(s.rows, row_parts), kRowStep) * kRowStep;
  plan.row_pieces = ceil_divide(s.rows, plan.rows);
  return plan;
}

void run_piece(void* data, size_t i) {
  const Plan& plan = *static_cast<const Plan*>(data);
  const DiabloShape& s = plan.job.shape;
  const int64_t column_piece = static_cast<int64_t>(i) % plan.column_pieces;
  const int64_t block_piece = static_cast<int64_t>(i) / plan.column_pieces % plan.block_pieces;
  const int64_t row_piece = static_cast<int64_t>(i) / plan.column_pieces / plan.block_pieces;
  const int64_t block = block_piece * plan.blocks, column = column_piece * plan.columns, row = row_piece * plan.rows;
  plan.kernel(plan.job, Piece{block, clamp(block + plan.blocks, 0, s.num_blocks), column,
                              clamp(column + plan.columns, 0, s.block_size_out), row,
                              clamp(row + plan.rows, 0, s.rows)});
}

void copy(const Job& job) {
  const DiabloShape& s = job.shape;
  if (job.y0 == job.y) return;
  const size_t size = static_cast<size_t>(size_of(s.type));
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
  const size_t pieces = static_cast<size_t>(plan.row_pieces * plan.block_pieces * plan.column_pieces);
  if (pool != nullptr && pieces > 1) {
    pool->run(pool->pool, run_piece, &plan, pieces);
  } else {
    for (size_t i = 0; i < pieces; ++i) run_piece(&plan, i);
  }
  return DIABLO_OK;
}
