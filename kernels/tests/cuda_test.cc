// The CUDA kernels without a GPU: their source compiled for the CPU, a thread for each of a thread block's, against the
// reference; and that the thread blocks of thousands of shapes cover each output once.
//
// This shows wrong indexes, and under ThreadSanitizer a missing barrier. It says nothing about speed.
#include <condition_variable>
#include <mutex>

#include "fixture.h"

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)

using __half = Half;
using __nv_bfloat16 = Brain;

namespace {

struct Index {
  int x = 0, y = 0;
};
thread_local Index threadIdx, blockIdx;
Index gridDim;

// All threads of a thread block wait for each other.
struct Barrier {
  std::mutex mutex;
  std::condition_variable turn;
  int count = 0, waiting = 0;
  long round = 0;

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    if (++waiting == count) {
      waiting = 0, ++round;
      return turn.notify_all();
    }
    turn.wait(lock, [this, now = round] { return round != now; });
  }
} barrier;

void __syncthreads() { barrier.wait(); }

}  // namespace

#include "../cuda/kernels.cuh"

namespace {

// The thread blocks of a grid one after the other, on the same threads.
template <class T, class B>
void run_grid(const diablo::Job<T, B>& job) {
  const int across = job.launch.few ? diablo::kFewColumns : diablo::kThreadsAcross * diablo::kThreadsAcross;
  const int down = job.launch.few ? diablo::kFewSplits : 1;
  gridDim = {static_cast<int>(job.launch.grid_x), static_cast<int>(job.launch.grid_y)};
  barrier.count = across * down;
  std::vector<std::thread> threads;
  for (int i = 0; i < barrier.count; ++i)
    threads.emplace_back([&, i] {
      threadIdx = {i % across, i / across};
      for (int y = 0; y < gridDim.y; ++y)
        for (int x = 0; x < gridDim.x; ++x) {
          blockIdx = {x, y};
          job.launch.few ? diablo::few_rows<T, B>(job) : diablo::many_rows<T, B>(job);
          barrier.wait();
        }
    });
  for (std::thread& thread : threads) thread.join();
}

template <class T, class B>
void check_numbers(std::mt19937& random, DiabloType type, DiabloType block_type, DiabloShape s) {
  s.type = type, s.block_type = block_type;
  Numbers x(type, static_cast<size_t>((s.rows - 1) * s.x_stride + s.in_features)),
      y(type, static_cast<size_t>((s.rows - 1) * s.y_stride + s.out_features)),
      blocks(block_type, static_cast<size_t>(s.num_blocks * s.block_size_in * s.block_size_out));
  x.fill(random, 1), y.fill(random, 1), blocks.fill(random, block_type == DIABLO_I8 ? 40 : 1);
  const std::vector<float> scales(static_cast<size_t>(s.num_blocks), 1.0f / 64);
  Numbers wanted = y;
  SUCCEEDS(diablo_block_diag_reference(&s, x.data(), blocks.data(), scales.data(), y.data(), wanted.data()));

  diablo::Job<T, B> job{s, diablo::launch_of(s), static_cast<const T*>(x.data()), static_cast<const B*>(blocks.data()),
                        block_type == DIABLO_I8 ? scales.data() : nullptr, static_cast<const T*>(y.data()),
                        static_cast<T*>(y.data())};
  if (job.launch.grid_y > 2) job.launch.grid_y = 2;  // then each thread block takes several tiles, as in huge grids
  run_grid(job);
  const double bit = type == DIABLO_F32 ? 0x1p-22 : type == DIABLO_F16 ? 0x1p-10 : 0x1p-7;  // one rounding to y's type
  for (size_t i = 0; i < y.size(); ++i) {
    const double a = wanted.get(i), b = y.get(i);
    // Sums of up to 150 products near 1 in float32
    CHECK(std::fabs(a - b) <= std::fabs(a) * bit + 2e-4, "%s %s M %lld blocks %lld x %lld x %lld: y[%zu] %g, not %g",
          name_of(type), name_of(block_type), (long long)s.rows, (long long)s.num_blocks, (long long)s.block_size_in,
          (long long)s.block_size_out, i, b, a);
  }
}

void test_numbers() {
  std::mt19937 random(3);
  constexpr DiabloType any = DIABLO_F32;
  const DiabloShape shapes[] = {
      {1, 28, 28, 2, 14, 14, 28, 28, any, any},     {3, 27, 5, 4, 7, 2, 30, 9, any, any},
      {7, 100, 130, 2, 50, 66, 101, 131, any, any}, {13, 9, 100, 4, 3, 40, 9, 100, any, any},
      {17, 40, 33, 3, 14, 14, 42, 35, any, any},    {150, 70, 90, 1, 75, 95, 70, 90, any, any},
      {200, 9, 30, 5, 3, 7, 9, 30, any, any}};
  for (const DiabloShape& s : shapes) {
    check_numbers<float, float>(random, DIABLO_F32, DIABLO_F32, s);
    check_numbers<float, Half>(random, DIABLO_F32, DIABLO_F16, s);
    check_numbers<Half, Half>(random, DIABLO_F16, DIABLO_F16, s);
    check_numbers<Brain, int8_t>(random, DIABLO_BF16, DIABLO_I8, s);
  }
}

// Also where sizes are far too large to compute.
void test_each_output_is_covered_once() {
  std::mt19937 random(4);
  const auto upto = [&](int64_t most) { return std::uniform_int_distribution<int64_t>(1, most)(random); };
  for (int i = 0; i < 4000; ++i) {
    DiabloShape s{upto(i % 10 ? 300 : 6'000'000), 0, 0, upto(40), upto(200), upto(200), 0, 0, DIABLO_F32, DIABLO_F32};
    s.in_features = s.num_blocks * s.block_size_in - (upto(4) == 1 ? upto(s.num_blocks * s.block_size_in) - 1 : 0);
    s.out_features = s.num_blocks * s.block_size_out - (upto(4) == 1 ? upto(s.num_blocks * s.block_size_out) - 1 : 0);
    const diablo::Launch launch = diablo::launch_of(s);
    std::vector<int> seen(static_cast<size_t>(s.out_features));
    for (int64_t x = 0; x < launch.grid_x; ++x) {
      const diablo::Area area = diablo::area_of(s, launch, x);
      const int64_t block = area.output / s.block_size_out;
      CHECK(area.columns <= 0 || area.block == block, "tile %lld", (long long)x);
      CHECK(area.input == block * s.block_size_in || area.columns <= 0, "tile %lld", (long long)x);
      CHECK(area.depth <= 0 || area.input + area.depth <= s.in_features, "tile %lld", (long long)x);
      for (int64_t c = 0; c < area.columns; ++c) ++seen.at(static_cast<size_t>(area.output + c));
    }
    for (size_t c = 0; c < seen.size(); ++c) CHECK(seen[c] == 1, "column %zu is computed %d times", c, seen[c]);
    CHECK(launch.row_tiles * launch.rows_per_tile >= s.rows && (launch.row_tiles - 1) * launch.rows_per_tile < s.rows,
          "%lld tiles of rows", (long long)launch.row_tiles);
    CHECK(launch.grid_y >= 1 && launch.grid_y <= 65535 && launch.grid_y <= launch.row_tiles, "%lld",
          (long long)launch.grid_y);
  }
}

}  // namespace

int main() {
  test_each_output_is_covered_once();
  test_numbers();
  std::puts("the CUDA kernels agree with the reference");
}
