// Random calls against the reference: every type, instruction set and odd size, in place or not, on one to four
// threads; and calls whose sizes do not fit, each with the error that names what is wrong.
//
// usage: numbers_test [calls] [seed]
#include "fixture.h"

namespace {

int64_t between(std::mt19937& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

// Small sizes where tails are, around a multiple of every vector width; now and then large enough for several panels.
int64_t odd_size(std::mt19937& random) {
  switch (between(random, 0, 9)) {
    case 0:
      return 1;
    case 1:
      return between(random, 255, 300);
    case 2:
      return between(random, 60, 70);
    default:
      return between(random, 2, 40);
  }
}

// So few products that ten thousand calls end soon under a sanitizer, too; one call in 25 is large.
void limit_products(std::mt19937& random, DiabloShape& s) {
  const int64_t most = between(random, 0, 24) == 0 ? 3000000 : 50000;
  while (s.rows * s.num_blocks * s.block_size_in * s.block_size_out > most && s.rows + s.num_blocks > 2) {
    int64_t& larger = s.rows > s.num_blocks ? s.rows : s.num_blocks;
    larger -= larger / 3 + 1;
  }
}

DiabloShape random_shape(std::mt19937& random) {
  DiabloShape s{};
  s.rows = between(random, 0, 30) == 0 ? between(random, 90, 220) : between(random, 0, 27);
  s.num_blocks = between(random, 1, 9);
  s.block_size_in = odd_size(random);
  s.block_size_out = odd_size(random);
  if (between(random, 0, 60) == 0) s.block_size_out += between(random, 0, 2) == 0 ? 4060 : 1000;  // beyond long panels
  if (between(random, 0, 4) == 0) {  // what kernels read as one stream, vectors reaching from block to block
    s.rows = between(random, 1, 4), s.num_blocks = between(random, 1, 30);
    if (between(random, 0, 1)) s.block_size_out = between(random, 1, 5);
  }
  limit_products(random, s);
  // Cropped at its tail by up to two blocks: then the last ones are all padding, or meet no input.
  const auto crop = [&](int64_t size) {
    const int64_t whole = s.num_blocks * size;
    return between(random, 0, 2) == 0 ? whole - between(random, 0, std::min<int64_t>(whole, 2 * size)) : whole;
  };
  s.in_features = crop(s.block_size_in);
  s.out_features = crop(s.block_size_out);
  if (between(random, 0, 30) == 0) {
    int64_t* const sizes[] = {&s.num_blocks, &s.block_size_in, &s.block_size_out, &s.in_features, &s.out_features};
    *sizes[between(random, 0, 4)] = 0;
  }
  s.x_stride = s.in_features + (between(random, 0, 3) == 0 ? between(random, 1, 5) : 0);
  s.y_stride = s.out_features + (between(random, 0, 3) == 0 ? between(random, 1, 5) : 0);
  s.type = static_cast<DiabloType>(between(random, DIABLO_F32, DIABLO_BF16));
  s.block_type = between(random, 0, 1) ? s.type : static_cast<DiabloType>(between(random, DIABLO_F32, DIABLO_I8));
  return s;
}

// The reference sums in double and rounds once. A sum in float32 of `terms` products is off by at most terms · 2⁻²⁴ of
// the sum of their sizes; the last rounding, to 24, 11 or 8 bits, may then fall to the other side.
float tolerance(const DiabloShape& s, float value, float sizes) {
  const float last_bit = s.type == DIABLO_F16 ? 0x1p-10f : s.type == DIABLO_BF16 ? 0x1p-7f : 0x1p-23f;
  const float smallest = s.type == DIABLO_F16 ? 0x1p-24f : 0.0f;
  return std::fabs(value) * last_bit + smallest + static_cast<float>(s.block_size_in + 1) * 0x1p-24f * sizes;
}

void compare(const DiabloShape& s, const Numbers& x, const Numbers& blocks, const Numbers& wanted, const Numbers& got,
             const char* isa, bool in_place) {
  float largest_x = 0, largest_d = 0;
  for (size_t i = 0; i < x.size(); ++i) largest_x = std::max(largest_x, std::fabs(x.get(i)));
  for (size_t i = 0; i < blocks.size(); ++i) largest_d = std::max(largest_d, std::fabs(blocks.get(i)));
  if (s.block_type == DIABLO_I8) largest_d /= 64;
  const float sizes = static_cast<float>(s.block_size_in) * largest_x * largest_d + 8;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const float a = wanted.get(i), b = got.get(i);
    CHECK(std::fabs(a - b) <= tolerance(s, a, sizes),
          "%s%s: y[%zu] is %.9g, the reference says %.9g; M %lld K %lld N %lld blocks %lld x %lld x %lld of %s, y %s",
          isa, in_place ? " in place" : "", i, b, a, (long long)s.rows, (long long)s.in_features,
          (long long)s.out_features, (long long)s.num_blocks, (long long)s.block_size_in,
          (long long)s.block_size_out, name_of(s.block_type), name_of(s.type));
  }
}

void check_call(std::mt19937& random) {
  const DiabloShape s = random_shape(random);
  // One row more than strides need would hide what is read or written behind the last one.
  const auto elements = [&](int64_t stride, int64_t columns) {
    return static_cast<size_t>(s.rows == 0 || columns == 0 ? 0 : (s.rows - 1) * stride + columns);
  };
  Numbers x(s.type, elements(s.x_stride, s.in_features)), y0(s.type, elements(s.y_stride, s.out_features));
  Numbers blocks(s.block_type, static_cast<size_t>(s.num_blocks * s.block_size_in * s.block_size_out));
  std::vector<float> scales;
  for (int64_t i = 0; i < s.num_blocks; ++i) scales.push_back(1.0f / static_cast<float>(between(random, 64, 512)));
  x.fill(random, 1), y0.fill(random, 1), blocks.fill(random, s.block_type == DIABLO_I8 ? 40 : 1);

  Numbers wanted = y0;
  const DiabloError error =
      diablo_block_diag_reference(&s, x.data(), blocks.data(), scales.data(), y0.data(), wanted.data());
  CHECK(error == DIABLO_OK, "%s", diablo_error_text(error));
  for (DiabloIsa isa : isas()) {
    const bool in_place = between(random, 0, 1) != 0;
    int threads = static_cast<int>(between(random, 1, 4));
    const DiabloParallelFor pool{run_on_threads, &threads};
    Numbers got = y0, from = y0;
    if (!in_place)  // garbage that must not show, except in the gaps between rows, which must stay
      for (int64_t i = 0; i < s.rows * s.out_features; ++i)
        got.set(static_cast<size_t>(i / s.out_features * s.y_stride + i % s.out_features), NAN);
    const DiabloError code =
        diablo_block_diag_cpu(&s, x.data(), blocks.data(), scales.data(), in_place ? got.data() : from.data(),
                              got.data(), between(random, 0, 3) == 0 ? &pool : nullptr, isa);
    CHECK(code == DIABLO_OK, "%s: %s", name_of(isa), diablo_error_text(code));
    compare(s, x, blocks, wanted, got, name_of(isa), in_place);
  }
}

// One thing about a good shape is made wrong; nothing may be read or written, so all pointers are null.
void check_refusal(std::mt19937& random) {
  DiabloShape s = random_shape(random);
  s.rows = between(random, 2, 9), s.num_blocks = between(random, 1, 9);
  s.block_size_in = odd_size(random), s.block_size_out = odd_size(random);
  s.in_features = s.x_stride = s.num_blocks * s.block_size_in;
  s.out_features = s.y_stride = s.num_blocks * s.block_size_out;
  int64_t* const sizes[] = {&s.rows,       &s.in_features,   &s.out_features,
                            &s.num_blocks, &s.block_size_in, &s.block_size_out};
  DiabloError wanted = DIABLO_OK;
  switch (between(random, 0, 5)) {
    case 0:
      *sizes[between(random, 0, 5)] = -between(random, 1, INT64_MAX), wanted = DIABLO_NEGATIVE_SIZE;
      break;
    case 1:
      s.in_features += between(random, 1, 1000), s.x_stride = s.in_features, wanted = DIABLO_INPUTS_NOT_COVERED;
      break;
    case 2:
      s.out_features += between(random, 1, 1000), s.y_stride = s.out_features, wanted = DIABLO_OUTPUTS_NOT_COVERED;
      break;
    case 3:
      (between(random, 0, 1) ? s.x_stride : s.y_stride) -= 1, wanted = DIABLO_ROWS_OVERLAP;
      break;
    case 4:
      s.type = DIABLO_I8, wanted = DIABLO_UNKNOWN_TYPE;
      break;
    default:
      s.block_type = DIABLO_I8, wanted = DIABLO_NO_SCALES;
  }
  for (DiabloIsa isa : isas()) {
    const DiabloError got = diablo_block_diag_cpu(&s, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, isa);
    CHECK(got == wanted, "%s: %s instead of: %s", name_of(isa), diablo_error_text(got), diablo_error_text(wanted));
  }
  const DiabloError got = diablo_block_diag_reference(&s, nullptr, nullptr, nullptr, nullptr, nullptr);
  CHECK(got == wanted, "reference: %s instead of: %s", diablo_error_text(got), diablo_error_text(wanted));
}

}  // namespace

int main(int count, char** arguments) {
  const long calls = count > 1 ? std::atol(arguments[1]) : 10000;
  std::mt19937 random(count > 2 ? static_cast<unsigned>(std::atol(arguments[2])) : 1u);
  for (long i = 0; i < calls; ++i) i % 10 == 9 ? check_refusal(random) : check_call(random);
  std::printf("%ld random calls agree with the reference on:", calls);
  for (DiabloIsa isa : isas()) std::printf(" %s", name_of(isa));
  std::printf("\n");
}
