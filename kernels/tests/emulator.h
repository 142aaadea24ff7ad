// CUDA on the CPU, as far as the kernels use it: the threads of a thread block take turns on one thread of the machine,
// and give way where they wait for each other. They run in another order every turn, so that a result that hangs on the
// order, for want of a barrier, comes out differently.
//
// Tensor cores and ldmatrix are written here from the fragment layouts in the PTX manual, sums in float32.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "fixture.h"

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

using __half = Half;
using __nv_bfloat16 = Brain;

namespace emulated {

struct Index {
  int x = 0, y = 0;
};

struct Gate {
  int waiting = 0;
  long round = 0;
};

struct Warp {
  Gate gate;
  // What the lanes show each other; a second one for whoever is a step ahead
  std::array<std::array<uint32_t, 8>, 32> shown[2];
  const void* rows[2][32];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done;
  int steps;  // exchanges in its warp
};

constexpr size_t kStack = 256 << 10;
constexpr int kMostThreads = 384;

inline std::array<Fiber, kMostThreads> fibers;
inline std::array<Warp, kMostThreads / 32> warps;
inline ucontext_t scheduler;
inline Gate block_gate;
inline int threads = 0, current = 0;
inline bool moved = false;
inline std::function<void()> body;

inline void start() {
  body();
  fibers[current].done = moved = true;
}

inline void wait(Gate& gate, int count) {
  if (++gate.waiting == count) {
    gate.waiting = 0, ++gate.round;
    moved = true;
    return;
  }
  for (const long now = gate.round; gate.round == now;) swapcontext(&fibers[current].context, &scheduler);
}

// One thread block of `count` threads, a multiple of 32.
inline void run_block(int count, std::mt19937& random, std::function<void()> kernel, Index& thread_index) {
  threads = count, body = std::move(kernel);
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    fiber.done = false, fiber.steps = 0;
    makecontext(&fiber.context, start, 0);
  }
  std::vector<int> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  const int every = count / 32;
  int alone = every;  // a warp that runs on while the others stand still, up to the next barrier of all
  for (bool running = true; running;) {
    running = moved = false;
    if (random() & 1u) std::reverse(order.begin(), order.end());
    std::rotate(order.begin(), order.begin() + random() % order.size(), order.end());
    for (const int i : order) {
      if (fibers[i].done) continue;
      running = true;
      if (alone != every && i / 32 != alone) continue;
      current = i, thread_index = {i, 0};
      swapcontext(&scheduler, &fibers[i].context);
    }
    CHECK(moved || !running || alone != every, "threads wait for a barrier that the others have left behind");
    if (!moved || alone == every) alone = moved ? static_cast<int>(random() % (every + 1u)) : every;
  }
}

// The lanes of a warp show each other `mine`, and all read what all have shown.
inline Warp& exchange(const uint32_t* mine, size_t count, const void* row, int* turn) {
  Warp& warp = warps[current / 32];
  *turn = fibers[current].steps++ & 1;
  std::copy(mine, mine + count, warp.shown[*turn][current % 32].begin());
  warp.rows[*turn][current % 32] = row;
  wait(warp.gate, 32);
  return warp;
}

template <class T>
float half_of(uint32_t pair, int which) {
  return to_float(T{static_cast<uint16_t>(pair >> (16 * which))});
}

}  // namespace emulated

namespace {

emulated::Index threadIdx, blockIdx, gridDim;

inline void __syncthreads() {
  const emulated::Index mine = threadIdx;
  emulated::wait(emulated::block_gate, emulated::threads);
  threadIdx = mine;
}

template <int Bytes>
inline void load_whole(const void* from, void* to) {
  CHECK(reinterpret_cast<uintptr_t>(from) % Bytes == 0 && reinterpret_cast<uintptr_t>(to) % Bytes == 0,
        "an access to %d bytes is misaligned", Bytes);
  std::memcpy(to, from, Bytes);
}

template <int Bytes>
inline void store_whole(void* to, const void* from) {
  load_whole<Bytes>(from, to);
}

template <class T>
inline T* kept(T* pointer) {
  return pointer;
}

inline void load_once(const void* from, uint32_t (&to)[4]) { load_whole<16>(from, to); }

template <class T>
inline T load_constant(const T* from) {
  return *from;
}

inline uint32_t load_word(const void* from) {
  CHECK(reinterpret_cast<uintptr_t>(from) % 4 == 0, "a word is misaligned");
  uint32_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

inline uint32_t load_pair(const void* from) { return load_word(from); }

inline uint32_t lower_halves(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
inline uint32_t upper_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

template <class T>
inline uint32_t dequantize_low(uint32_t codes, uint32_t zeros, T scale) {
  uint32_t pair = 0;
  for (int i = 0; i < 2; ++i) {
    T value;
    const int code = static_cast<int>(codes >> (16 * i) & 15), zero = static_cast<int>(zeros >> (16 * i) & 15);
    from_float(static_cast<float>(code - zero) * to_float(scale), value);
    pair |= static_cast<uint32_t>(value.bits) << (16 * i);
  }
  return pair;
}

template <class T>
inline uint32_t dequantize_high(uint32_t codes, uint32_t zeros, T scale) {
  return dequantize_low(codes >> 4, zeros, scale);
}

// D = A B + C of m16n8k16: lane l holds rows l / 4 and 8 below of A and C, in pairs of columns from l % 4 * 2 on; of B
// column l / 4, in pairs of rows.
template <class T>
inline void multiply_tile(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  const emulated::Index mine = threadIdx;
  const uint32_t all[6] = {a[0], a[1], a[2], a[3], b0, b1};
  int turn;
  const emulated::Warp& warp = emulated::exchange(all, 6, nullptr, &turn);
  threadIdx = mine;
  const int lane = mine.x % 32;
  for (int n = 0; n < 4; ++n) {
    const int row = lane / 4 + n / 2 * 8, column = lane % 4 * 2 + n % 2;
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2, below = row / 8, right = k / 8;
      const uint32_t of_a = warp.shown[turn][row % 8 * 4 + pair][below + 2 * right];
      const uint32_t of_b = warp.shown[turn][column * 4 + pair][4 + right];
      c[n] += emulated::half_of<T>(of_a, k % 2) * emulated::half_of<T>(of_b, k % 2);
    }
  }
}

// ldmatrix.x4.trans: lane l names row l % 8 of matrix l / 8, and gets column l / 4 of each, rows l % 4 * 2 and the next.
inline void load_transposed(uint32_t (&to)[4], const void* row) {
  CHECK(reinterpret_cast<uintptr_t>(row) % 16 == 0, "a row of ldmatrix is misaligned");
  const emulated::Index mine = threadIdx;
  int turn;
  const emulated::Warp& warp = emulated::exchange(nullptr, 0, row, &turn);
  threadIdx = mine;
  const int lane = mine.x % 32;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i)
      std::memcpy(&pair[i], static_cast<const char*>(warp.rows[turn][matrix * 8 + lane % 4 * 2 + i]) + lane / 4 * 2, 2);
    to[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

// The sum over the lanes whose numbers differ in these bits.
inline float __shfl_xor_sync(unsigned, float value, int bits) {
  const emulated::Index mine = threadIdx;
  uint32_t number;
  std::memcpy(&number, &value, sizeof number);
  int turn;
  const emulated::Warp& warp = emulated::exchange(&number, 1, nullptr, &turn);
  threadIdx = mine;
  std::memcpy(&value, &warp.shown[turn][(mine.x % 32) ^ bits][0], sizeof value);
  return value;
}

}  // namespace
