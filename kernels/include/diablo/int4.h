/* y = x · W + x · blockdiag(blocks) in one launch, W as ONNX Runtime's MatMulNBits stores it in 4 bits; on CUDA alone.
 *
 * For few rows: the time is that of reading the codes once, and the blocks are read beside them.
 */
#ifndef DIABLO_INT4_H
#define DIABLO_INT4_H

#include "diablo/block_diag.h"

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif
#ifdef __cplusplus
extern "C" {
#endif

/* Weights in groups along the inputs: W[n][k] = (code − zero) · scale. `groups` is in_features over group_size, rounded
 * up; every pointer lies in the memory of the device. */
typedef struct {
  int64_t group_size;   /* 32, or a multiple */
  const void* codes;    /* (out_features, groups, group_size / 2) bytes: the even input in the low half; 16-byte aligned */
  const void* scales;   /* (out_features, groups) of the shape's type */
  const uint8_t* zeros; /* (out_features, groups / 2 rounded up) bytes, the even group in the low half; NULL: all 8 */
} DiabloInt4;

/* 1 where diablo_int4_cuda takes such a call: x in F16 or BF16, blocks of the same type, codes that it can read. */
int diablo_int4_takes(const DiabloShape* shape, const DiabloInt4* weights);

/* As diablo_block_diag_cuda, but with no y0; in front of a call that is not taken it answers DIABLO_UNKNOWN_TYPE. */
DiabloError diablo_int4_cuda(const DiabloShape* shape, const DiabloInt4* weights, const void* x, const void* blocks,
                             void* y, void* stream, const char** cause);

#ifdef __cplusplus
}
#endif
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#endif
