// The CUDA kernels without a GPU: their source compiled for the CPU, in emulator.h, against the reference; and that the
// thread blocks of thousands of shapes cover each output once.
//
// This shows wrong indexes, misaligned accesses, reading what is not there and missing barriers. It says nothing about
// speed. `cuda_test 2000 7` runs 2,000 random calls, seed 7.
#include "int4_grid.h"

#include "../cuda/matrix.cuh"

namespace {

using namespace diablo;

template <class T, class B>
void run_thread(const Job<T, B>& job) {
  constexpr int wide = sizeof(B) == 4 ? 4 : 8;
  const bool whole = job.launch.vector > 1;
  switch (job.launch.way) {
    case Way::kFewRows:
      if (job.launch.rows_per_tile == 1) return whole ? few_rows<T, B, wide, 1>(job) : few_rows<T, B, 1, 1>(job);
      if (job.launch.rows_per_tile == 4) return whole ? few_rows<T, B, wide, 4>(job) : few_rows<T, B, 1, 4>(job);
      return whole ? few_rows<T, B, wide, 8>(job) : few_rows<T, B, 1, 8>(job);
    case Way::kTiles:
      return many_rows<T, B>(job);
    default:
      if constexpr (sizeof(T) == 2 && sizeof(B) <= 2)
        return job.launch.way == Way::kMatrix16 ? matrix_rows<T, B, Tile16>(job) : matrix_rows<T, B, Tile64>(job);
  }
}

// The thread blocks of a grid, one after the other.
template <class T, class B>
void run_grid(const Job<T, B>& job, std::mt19937& random) {
  const bool matrix = job.launch.way == Way::kMatrix16 || job.launch.way == Way::kMatrix64;
  gridDim = {static_cast<int>(job.launch.grid_x), static_cast<int>(job.launch.grid_y)};
  for (int y = 0; y < gridDim.y; ++y)
    for (int x = 0; x < gridDim.x; ++x) {
      blockIdx = {x, y};
      emulated::run_block(matrix ? kMatrixThreads : kFewThreads, random, [&] { run_thread(job); }, threadIdx);
    }
}

bool starts_whole(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Numbers that begin `skipped` elements behind a multiple of 16 bytes, nothing but NaN in front of them.
struct Placed {
  Numbers all;
  size_t skipped;

  Placed(DiabloType type, int64_t count, size_t skip) : all(type, static_cast<size_t>(count) + skip), skipped(skip) {}
  void* data() { return all.bytes.data() + skipped * size_of(all.type); }
  float get(int64_t i) const { return all.get(static_cast<size_t>(i) + skipped); }
  void set(int64_t i, float value) { all.set(static_cast<size_t>(i) + skipped, value); }
  void poison() {
    for (size_t i = 0; i < all.size(); ++i) all.set(i, all.type == DIABLO_I8 ? 127 : NAN);
  }
};

int upto(std::mt19937& random, int most) { return std::uniform_int_distribution<int>(1, most)(random); }

// Fills what counts; what lies between the rows, and what of the blocks is cropped, stays poisoned.
void fill(Placed& to, std::mt19937& random, int64_t rows, int64_t columns, int64_t stride, float size) {
  std::normal_distribution<float> normal(0, size);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to.set(r * stride + c, std::clamp(normal(random), -127.0f, 127.0f));
}

template <class T, class B>
void check_numbers(std::mt19937& random, DiabloType type, DiabloType block_type, DiabloShape s) {
  s.type = type, s.block_type = block_type;
  const size_t skip = upto(random, 4) == 1 ? static_cast<size_t>(upto(random, 8)) : 0;
  Placed x(type, (s.rows - 1) * s.x_stride + s.in_features, skip), y(type, (s.rows - 1) * s.y_stride + s.out_features, skip),
      blocks(block_type, s.num_blocks * s.block_size_in * s.block_size_out, skip);
  x.poison(), y.poison(), blocks.poison();
  fill(x, random, s.rows, s.in_features, s.x_stride, 1);
  fill(y, random, s.rows, s.out_features, s.y_stride, 1);
  for (int64_t b = 0; b < s.num_blocks; ++b)
    for (int64_t k = 0; k < s.block_size_in && b * s.block_size_in + k < s.in_features; ++k)
      for (int64_t n = 0; n < s.block_size_out && b * s.block_size_out + n < s.out_features; ++n)
        blocks.set((b * s.block_size_in + k) * s.block_size_out + n,
                   block_type == DIABLO_I8 ? static_cast<float>(upto(random, 255) - 128)
                                           : std::normal_distribution<float>()(random));
  std::vector<float> scales(static_cast<size_t>(s.num_blocks));
  for (float& scale : scales) scale = static_cast<float>(upto(random, 9)) / 256;
  Placed wanted = y, apart = y;
  SUCCEEDS(diablo_block_diag_reference(&s, x.data(), blocks.data(), scales.data(), y.data(), wanted.data()));

  const bool in_place = random() % 2;
  apart.poison();
  Placed& got = in_place ? y : apart;
  const Aligned pointers{starts_whole(x.data(), 16), starts_whole(blocks.data(), 8 * std::min<size_t>(sizeof(B), 2)),
                         starts_whole(y.data(), 16) && starts_whole(got.data(), 16)};
  Job<T, B> job{s,
                launch_of(s, pointers),
                aligned_rows(s, pointers),
                static_cast<const T*>(x.data()),
                static_cast<const B*>(blocks.data()),
                block_type == DIABLO_I8 ? scales.data() : nullptr,
                static_cast<const T*>(y.data()),
                static_cast<T*>(got.data())};
  if (job.launch.grid_y > 2) job.launch.grid_y = 2;  // then each thread block takes several tiles, as in huge grids
  run_grid(job, random);

  const double bit = type == DIABLO_F32 ? 0x1p-22 : type == DIABLO_F16 ? 0x1p-10 : 0x1p-7;  // one rounding to y's type
  for (int64_t i = 0; i < (s.rows - 1) * s.y_stride + s.out_features; ++i) {
    const double a = wanted.get(i), b = got.get(i);
    if (i % s.y_stride >= s.out_features) {
      CHECK(std::isnan(b), "between rows y[%lld] became %g", (long long)i, b);
      continue;
    }
    // Sums of up to 400 products near 1 (near 4 in int8) in float32
    CHECK(std::fabs(a - b) <= std::fabs(a) * bit + 4e-4,
          "%s %s M %lld blocks %lld x %lld x %lld of %lld x %lld, from %zu: y[%lld] %g, not %g", name_of(type),
          name_of(block_type), (long long)s.rows, (long long)s.num_blocks, (long long)s.block_size_in,
          (long long)s.block_size_out, (long long)s.in_features, (long long)s.out_features, skip, (long long)i, b, a);
  }
}

void check_types(std::mt19937& random, const DiabloShape& s, unsigned which) {
  switch (which % 8) {
    case 0:
      return check_numbers<float, float>(random, DIABLO_F32, DIABLO_F32, s);
    case 1:
      return check_numbers<Half, Half>(random, DIABLO_F16, DIABLO_F16, s);
    case 2:
      return check_numbers<Brain, Brain>(random, DIABLO_BF16, DIABLO_BF16, s);
    case 3:
      return check_numbers<Half, int8_t>(random, DIABLO_F16, DIABLO_I8, s);
    case 4:
      return check_numbers<Brain, int8_t>(random, DIABLO_BF16, DIABLO_I8, s);
    case 5:
      return check_numbers<float, Half>(random, DIABLO_F32, DIABLO_F16, s);
    case 6:
      return check_numbers<Brain, Half>(random, DIABLO_BF16, DIABLO_F16, s);
    default:
      return check_numbers<float, int8_t>(random, DIABLO_F32, DIABLO_I8, s);
  }
}

// Block sizes of real models at 64 blocks and those around the kernels' own, a third of any size; cropped or not.
DiabloShape random_shape(std::mt19937& random) {
  static const int real[] = {1, 2, 7, 14, 16, 32, 43, 64, 76, 86, 96, 172, 224, 344};
  const auto size = [&] { return random() % 3 ? real[random() % (sizeof real / sizeof *real)] : upto(random, 150); };
  const int rows = random() % 3 ? upto(random, 20) : upto(random, 150);
  DiabloShape s{rows, 0, 0, upto(random, 3), size(), size(), 0, 0, DIABLO_F32, DIABLO_F32};
  s.in_features = s.num_blocks * s.block_size_in, s.out_features = s.num_blocks * s.block_size_out;
  if (random() % 3 == 0) s.in_features = upto(random, static_cast<int>(s.in_features));
  if (random() % 3 == 0) s.out_features = upto(random, static_cast<int>(s.out_features));
  s.x_stride = s.in_features + (random() % 3 ? 0 : upto(random, 9));
  s.y_stride = s.out_features + (random() % 3 ? 0 : upto(random, 9));
  return s;
}

void test_numbers(int calls, unsigned seed) {
  std::mt19937 random(seed);
  for (int i = 0; i < calls; ++i) check_types(random, random_shape(random), static_cast<unsigned>(i));
}

// Loads that end in the row below, where that row is cropped away: 14 x 76 and 32 x 86, read as one run.
void test_cropped_runs() {
  std::mt19937 random(6);
  for (unsigned i = 0; i < 48; ++i) {
    DiabloShape s{1 + i % 4, 27, 152, 2, 14, 76, 27, 152, DIABLO_F32, DIABLO_F32};
    if (i % 2) s = {1 + i % 4, 61, 170, 2, 32, 86, 61, 170, DIABLO_F32, DIABLO_F32};
    check_types(random, s, i / 2);
  }
}

// Blocks of whole rows of x, and of y, that begin between whole loads: 12 x 16 and 16 x 12.
void test_blocks_between_loads() {
  std::mt19937 random(7);
  for (unsigned i = 0; i < 32; ++i) {
    DiabloShape s{5 + i, 24, 32, 2, 12, 16, 24, 32, DIABLO_F32, DIABLO_F32};
    if (i % 2) s = {5 + i, 32, 24, 2, 16, 12, 32, 24, DIABLO_F32, DIABLO_F32};
    check_types(random, s, 1 + i / 2 % 4);
  }
}

// An int4 layer with its branch: what the device reads, and how it is right.
struct Int4Case {
  DiabloShape s;
  int64_t size, groups;
  bool symmetric;
  Placed scales, blocks, y;
  std::vector<uint8_t> codes, zeros;

  Int4Case(std::mt19937& random, DiabloShape shape, int64_t group_size, bool branch)
      : s(without(shape, !branch)),
        size(group_size),
        groups(divide_up(s.in_features, size)),
        symmetric(random() % 2),
        scales(s.type, s.out_features * groups, 0),
        blocks(s.type, s.num_blocks * s.block_size_in * s.block_size_out, 0),
        y(s.type, (s.rows - 1) * s.y_stride + s.out_features, 0),
        codes(static_cast<size_t>(s.out_features * groups * size / 2)),
        zeros(static_cast<size_t>(s.out_features * ((groups + 1) / 2))) {
    y.poison();
    fill(blocks, random, 1, static_cast<int64_t>(blocks.all.size()), 0, 1);
    fill(scales, random, 1, s.out_features * groups, 0, 0.1f);
    for (uint8_t& pair : codes) pair = static_cast<uint8_t>(random());
    for (uint8_t& pair : zeros) pair = static_cast<uint8_t>(random());
  }
  static DiabloShape without(DiabloShape s, bool empty) {
    if (empty) s.num_blocks = s.block_size_in = s.block_size_out = 0;
    return s;
  }
  DiabloInt4Layer layer() {
    return {s, {size, codes.data(), scales.data(), symmetric ? nullptr : zeros.data()}, blocks.data(), y.data()};
  }
  float weight(int64_t n, int64_t k) const {  // not rounded to T
    const int64_t group = k / size, at = (n * groups * size + k) / 2;
    const int code = codes[static_cast<size_t>(at)] >> (k % 2 * 4) & 15;
    const int zero = symmetric ? 8 : zeros[static_cast<size_t>(n * ((groups + 1) / 2) + group / 2)] >> (group % 2 * 4) & 15;
    return static_cast<float>(code - zero) * scales.get(n * groups + group);
  }
  float branch(int64_t n, int64_t k) const {
    if (s.num_blocks == 0 || k / s.block_size_in != n / s.block_size_out) return 0;
    return blocks.get(k * s.block_size_out + n % s.block_size_out);
  }
};

// y against both in double, from the weights as they round to T.
template <class T>
void check_int4_numbers(const Int4Case& one, const Placed& x) {
  const DiabloShape& s = one.s;
  for (int64_t r = 0; r < s.rows; ++r)
    for (int64_t n = 0; n < s.out_features; ++n) {
      double wanted = 0, all = 0;  // `all` without signs: what errors are measured against
      for (int64_t k = 0; k < s.in_features; ++k) {
        T rounded;
        from_float(one.weight(n, k), rounded);
        const double weight = static_cast<double>(to_float(rounded)) + one.branch(n, k);
        wanted += x.get(r * s.x_stride + k) * weight;
        all += std::fabs(x.get(r * s.x_stride + k) * weight);
      }
      const double got = one.y.get(r * s.y_stride + n), bit = s.type == DIABLO_F16 ? 0x1p-11 : 0x1p-8;
      // One rounding to y's type, and float32 sums
      CHECK(std::fabs(got - wanted) <= std::fabs(wanted) * bit + all * 1e-6 + 1e-6,
            "int4 %s M %lld %lld x %lld, groups of %lld, blocks %lld x %lld: y[%lld][%lld] %g, not %g", name_of(s.type),
            (long long)s.rows, (long long)s.in_features, (long long)s.out_features, (long long)one.size,
            (long long)s.block_size_in, (long long)s.block_size_out, (long long)r, (long long)n, got, wanted);
    }
  for (int64_t i = 0; i < (s.rows - 1) * s.y_stride + s.out_features; ++i)
    CHECK(i % s.y_stride < s.out_features || std::isnan(one.y.get(i)), "between rows y[%lld] was written", (long long)i);
}

// One to three layers of the same x, of other outputs, blocks and zero points each.
template <class T>
void check_int4(std::mt19937& random, DiabloType type) {
  const int64_t size = 32 << random() % 3;
  DiabloShape first = random_shape(random);
  first.rows = upto(random, 20), first.type = first.block_type = type;
  if (random() % 2) {  // whole passes
    const int64_t passes = random() % 4 ? divide_up(first.in_features, kInt4Pass) : upto(random, 48);
    static const int gaps[] = {0, 8, 4};  // by the last one rows begin between whole loads
    first.in_features = passes * kInt4Pass, first.x_stride = first.in_features + gaps[random() % 3];
    first.block_size_in = divide_up(first.in_features, first.num_blocks);
  }
  std::vector<std::unique_ptr<Int4Case>> cases;
  std::vector<DiabloInt4Layer> layers;
  for (int i = upto(random, DIABLO_INT4_LAYERS); i > 0; --i) {
    DiabloShape s = first;
    if (i > 1) {
      s.num_blocks = upto(random, 5), s.block_size_out = upto(random, 50);
      s.block_size_in = divide_up(s.in_features, s.num_blocks);
      s.out_features = upto(random, static_cast<int>(s.num_blocks * s.block_size_out));
      s.y_stride = s.out_features + random() % 3;
    }
    cases.push_back(std::make_unique<Int4Case>(random, s, size, random() % 8 != 0));
    layers.push_back(cases.back()->layer());
  }
  Placed x(type, (first.rows - 1) * first.x_stride + first.in_features, upto(random, 3) == 1 ? 1 : 0);
  x.poison();
  fill(x, random, first.rows, first.in_features, first.x_stride, 1);

  const int tiles = static_cast<int>(divide_up(first.rows, kInt4Rows));
  const auto run = random() % 2 ? run_int4<T, kInt4Warps> : run_int4<T, kInt4WarpsOfMany>;
  run(layers.data(), static_cast<int>(layers.size()), x.data(), random, random() % 2 ? tiles : 1);
  for (const auto& one : cases) check_int4_numbers<T>(*one, x);
}

// The weight written out, blocks and all, is the sum rounded once.
template <class T>
void check_dense(std::mt19937& random, DiabloType type) {
  DiabloShape s = random_shape(random);
  s.type = s.block_type = type, s.rows = 1, s.x_stride = s.in_features, s.y_stride = s.out_features;
  Int4Case one(random, s, 32 << random() % 3, random() % 8 != 0);
  Placed dense(type, s.out_features * s.in_features, random() % 4 == 0);
  dense.poison();
  run_dense<T>(one.layer(), dense.data(), random);
  for (int64_t n = 0; n < s.out_features; ++n)
    for (int64_t k = 0; k < s.in_features; ++k) {
      T wanted;
      from_float(one.weight(n, k) + one.branch(n, k), wanted);
      const float got = dense.get(n * s.in_features + k);
      CHECK(got == to_float(wanted), "dense %s %lld x %lld, groups of %lld: [%lld][%lld] %g, not %g", name_of(type),
            (long long)s.in_features, (long long)s.out_features, (long long)one.size, (long long)n, (long long)k, got,
            to_float(wanted));
    }
}

void test_int4(int calls, unsigned seed) {
  std::mt19937 random(seed);
  for (int i = 0; i < calls; ++i) i % 2 ? check_int4<Half>(random, DIABLO_F16) : check_int4<Brain>(random, DIABLO_BF16);
  for (int i = 0; i < calls; ++i) i % 2 ? check_dense<Half>(random, DIABLO_F16) : check_dense<Brain>(random, DIABLO_BF16);
}

// Every element of every tile is read by one thread: the sums say so for one shape, this for many.
void test_few_rows_read_each_element_once() {
  std::mt19937 random(5);
  for (int i = 0; i < 2000; ++i) {
    DiabloShape s = random_shape(random);
    s.rows = upto(random, 4), s.block_type = i % 2 ? DIABLO_F16 : DIABLO_F32;
    const Launch launch = launch_of(s, {true, random() % 4 != 0, true});
    CHECK(launch.slots * launch.vector == launch.period * launch.columns_per_tile, "slots %d", launch.slots);
    CHECK(launch.groups >= 1 && launch.groups * launch.slots <= kFewThreads, "groups %d", launch.groups);
    CHECK(launch.period == 1 || launch.columns_per_tile == s.block_size_out, "period %d", launch.period);
    CHECK(launch.columns_per_tile * launch.parts <= kFewThreads && 32 % launch.parts == 0, "%d threads for each output",
          launch.parts);
    if (launch.vector > 1) CHECK(launch.period * s.block_size_out % launch.vector == 0, "period %d", launch.period);
  }
}

// What device.cuh takes for granted of numbers whose lower bits are a code or a zero point.
void test_bits_of_codes() {
  const auto half = [](int bits) { return to_float(Half{static_cast<uint16_t>(bits)}); };
  for (int q = 0; q < 16; ++q) {
    const float code = static_cast<float>(q);
    CHECK(half(0x6400 | q) == 1024 + code && half(0x6400 | q << 4) / 16 == 64 + code, "float16, code %d", q);
    CHECK(half(0xd400 | q << 4) == -64 - code, "float16, zero point %d", q);
    CHECK(to_float(Brain{static_cast<uint16_t>(0x4300 | q)}) == 128 + code, "bfloat16, code %d", q);
  }
}

// Also where sizes are far too large to compute.
void test_each_output_is_covered_once() {
  std::mt19937 random(4);
  const auto any = [&](int64_t most) { return std::uniform_int_distribution<int64_t>(1, most)(random); };
  for (int i = 0; i < 4000; ++i) {
    DiabloShape s{any(i % 10 ? 300 : 6'000'000), 0, 0, any(40), any(200), any(200), 0, 0, DIABLO_F32, DIABLO_F32};
    if (i % 2) s.type = s.block_type = DIABLO_F16;
    s.in_features = s.num_blocks * s.block_size_in - (any(4) == 1 ? any(s.num_blocks * s.block_size_in) - 1 : 0);
    s.out_features = s.num_blocks * s.block_size_out - (any(4) == 1 ? any(s.num_blocks * s.block_size_out) - 1 : 0);
    const Launch launch = launch_of(s, {true, i % 3 == 0, true});
    std::vector<int> seen(static_cast<size_t>(s.out_features));
    for (int64_t x = 0; x < launch.grid_x; ++x) {
      const Area area = area_of(s, launch, x);
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

int main(int count, char** arguments) {
  const int calls = count > 1 ? std::atoi(arguments[1]) : 300;
  const unsigned seed = count > 2 ? static_cast<unsigned>(std::atoi(arguments[2])) : 3;
  test_bits_of_codes();
  test_each_output_is_covered_once();
  test_few_rows_read_each_element_once();
  test_cropped_runs();
  test_blocks_between_loads();
  test_numbers(calls, seed);
  test_int4(calls / 4, seed);
  std::printf("the CUDA kernels agree with the reference in %d random calls\n", calls);
}
