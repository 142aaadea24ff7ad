// The launches of cuda/int4.cu on the emulated device: the thread blocks of a grid, one after the other.
#pragma once

#include "emulator.h"

#include "../cuda/int4.cuh"

namespace diablo {

template <class Body>
void run_blocks(int across, int down, int threads, std::mt19937& random, Body body) {
  gridDim = {across, down};
  for (blockIdx.y = 0; blockIdx.y < down; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < across; ++blockIdx.x) emulated::run_block(threads, random, body, threadIdx);
}

// `down` thread blocks share the tiles of rows.
template <class T, int Warps>
void run_int4(const DiabloInt4Layer* layers, int count, const void* x, std::mt19937& random, int down) {
  const Int4Job<T> job = int4_job<T>(layers, count, x);
  const auto run = [&](auto kernel) { run_blocks(job.tiles, down, 32 * Warps, random, [&] { kernel(job); }); };
  if (!job.whole)
    run(int4_rows<T, false, true, Warps>);
  else
    job.zeros ? run(int4_rows<T, true, true, Warps>) : run(int4_rows<T, true, false, Warps>);
}

template <class T>
void run_dense(const DiabloInt4Layer& given, void* dense, std::mt19937& random) {
  const Int4Layer<T> layer = int4_layer<T>(given, 0);
  const int64_t inputs = given.shape.in_features, outputs = given.shape.out_features;
  const bool aligned = dense_aligned(dense, inputs);
  run_blocks(static_cast<int>((outputs + kDenseOutputs - 1) / kDenseOutputs),
             static_cast<int>((inputs + kDenseInputs - 1) / kDenseInputs), kDenseThreads, random,
             [&] { int4_dense<T>(layer, static_cast<int>(inputs), aligned, static_cast<T*>(dense)); });
}

}  // namespace diablo
