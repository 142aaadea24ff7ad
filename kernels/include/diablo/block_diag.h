/* y = y0 + x · blockdiag(blocks), on plain pointers: no ONNX Runtime, no torch, no C++ in the interface.
 *
 * Block i reads the inputs [i·block_size_in, (i+1)·block_size_in) and writes the outputs
 * [i·block_size_out, (i+1)·block_size_out), both cropped to in_features and out_features. Where a block size is 0
 * there is no adapter, and y is y0. Sums are taken in float32 and rounded once, to the type of y.
 */
#ifndef DIABLO_BLOCK_DIAG_H
#define DIABLO_BLOCK_DIAG_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif
#ifdef __cplusplus
extern "C" {
#endif

typedef enum { DIABLO_F32, DIABLO_F16, DIABLO_BF16, DIABLO_I8 } DiabloType;

/* What to compute with. AUTO takes the best that this processor has. */
typedef enum { DIABLO_AUTO, DIABLO_PORTABLE, DIABLO_AVX2, DIABLO_AVX512, DIABLO_NEON } DiabloIsa;

typedef enum {
  DIABLO_OK = 0,
  DIABLO_NEGATIVE_SIZE,       /* some size is below 0 */
  DIABLO_INPUTS_NOT_COVERED,  /* num_blocks · block_size_in < in_features */
  DIABLO_OUTPUTS_NOT_COVERED, /* num_blocks · block_size_out < out_features */
  DIABLO_ROWS_OVERLAP,        /* x_stride < in_features or y_stride < out_features */
  DIABLO_UNKNOWN_TYPE,        /* type is not F32, F16 or BF16; on CUDA also: blocks are not of it, F16 or I8 */
  DIABLO_NO_SCALES,           /* int8 blocks without scales */
  DIABLO_NO_SUCH_ISA,         /* this build or this processor does not have it */
  DIABLO_CUDA_FAILED          /* CUDA refused the launch */
} DiabloError;

typedef struct {
  int64_t rows;         /* of x and y: the product of their leading dimensions */
  int64_t in_features;  /* columns of x */
  int64_t out_features; /* columns of y */
  int64_t num_blocks, block_size_in, block_size_out;
  int64_t x_stride, y_stride; /* elements, not bytes, from one row to the next; y_stride holds for y0 too */
  DiabloType type;            /* of x, y0 and y: F32, F16 or BF16 */
  DiabloType block_type;      /* of blocks, read as stored whatever `type` is */
} DiabloShape;

/* Calls task(data, i) for each i in [0, count), on any threads, and returns when all are done. */
typedef struct {
  void (*run)(void* pool, void (*task)(void* data, size_t i), void* data, size_t count);
  void* pool;
} DiabloParallelFor;

/* Whether the sizes fit together; every entry point below asks this first. */
DiabloError diablo_check(const DiabloShape* shape);

/* One plain sentence for an error, without numbers: the caller has those. */
const char* diablo_error_text(DiabloError error);

/* 1 where this build and this processor have it. */
int diablo_has(DiabloIsa isa);

/* The obvious loops, for comparison: every other version is tested against this one. */
DiabloError diablo_block_diag_reference(const DiabloShape* shape, const void* x, const void* blocks,
                                        const float* scales, const void* y0, void* y);

/* On the CPU.
 *   x       (rows, in_features) of shape->type
 *   blocks  (num_blocks, block_size_in, block_size_out) of shape->block_type, contiguous
 *   scales  (num_blocks) for int8 blocks: what a stored 1 is worth; not read otherwise
 *   y0, y   (rows, out_features) of shape->type; y0 == y works in place, any other overlap does not
 *   pool    NULL: this thread alone
 */
DiabloError diablo_block_diag_cpu(const DiabloShape* shape, const void* x, const void* blocks, const float* scales,
                                  const void* y0, void* y, const DiabloParallelFor* pool, DiabloIsa isa);

/* On a CUDA device: the same, with pointers into its memory, scales too; only in a build with CUDA.
 *   stream  a cudaStream_t, on which all work is queued; nothing is allocated and nothing waited for
 *   cause   where CUDA fails, its own words; may be NULL
 */
DiabloError diablo_block_diag_cuda(const DiabloShape* shape, const void* x, const void* blocks, const float* scales,
                                   const void* y0, void* y, void* stream, const char** cause);

#ifdef __cplusplus
}
#endif
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#endif
