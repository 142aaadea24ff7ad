/* y = x · W + x · blockdiag(blocks), W as ONNX Runtime's MatMulNBits stores it in 4 bits; on CUDA alone.
 *
 * For few rows one launch reads codes and blocks once, those of all layers that read the same x. For many, the sum of W
 * and the blocks is written out, for whoever multiplies dense matrices fast.
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
  int64_t group_size;   /* a power of two, 32 to 4096 */
  const void* codes;    /* (out_features, groups, group_size / 2) bytes: the even input in the low half; 16-byte aligned */
  const void* scales;   /* (out_features, groups) of the shape's type */
  const uint8_t* zeros; /* (out_features, groups / 2 rounded up) bytes, the even group in the low half; NULL: all 8 */
} DiabloInt4;

/* A layer with its branch; `blocks` as for diablo_block_diag_cuda, of the shape's own type. */
typedef struct {
  DiabloShape shape;
  DiabloInt4 weights;
  const void* blocks;
  void* y;
} DiabloInt4Layer;

enum { DIABLO_INT4_LAYERS = 3 }; /* the most in one launch: q, k and v */

/* 1 where diablo_int4_cuda takes these layers: x in F16 or BF16, blocks of the same type, codes that it can read, and
 * all with the same rows, inputs, type and group size. */
int diablo_int4_takes(const DiabloInt4Layer* layers, int count);

/* Each y = x · W + x · blockdiag(blocks), all in one launch; `stream` and `cause` as for diablo_block_diag_cuda. It answers
 * DIABLO_UNKNOWN_TYPE to layers that are not taken. */
DiabloError diablo_int4_cuda(const DiabloInt4Layer* layers, int count, const void* x, void* stream, const char** cause);

/* W + blockdiag(blocks)ᵀ into `dense`, (out_features, in_features) of the shape's type, rounded once, as W alone would be;
 * for a layer that diablo_int4_takes, whose rows and y are not looked at. */
DiabloError diablo_int4_dense_cuda(const DiabloInt4Layer* layer, void* dense, void* stream, const char** cause);

#ifdef __cplusplus
}
#endif
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#endif
