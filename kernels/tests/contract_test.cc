// What the header promises beside the numbers of numbers_test: errors, the reference itself, conversions, threads.
#include "fixture.h"

namespace {

const DiabloShape kGood{2, 6, 4, 2, 3, 2, 6, 4, DIABLO_F32, DIABLO_F32};

template <class Change>
void refused(DiabloError wanted, Change change) {
  DiabloShape shape = kGood;
  change(shape);
  float x[12] = {}, d[12] = {}, y[8] = {};
  const DiabloError got = diablo_block_diag_cpu(&shape, x, d, nullptr, y, y, nullptr, DIABLO_AUTO);
  CHECK(got == wanted, "%s instead of: %s", diablo_error_text(got), diablo_error_text(wanted));
}

void test_sizes_that_do_not_fit() {
  refused(DIABLO_OK, [](DiabloShape&) {});
  refused(DIABLO_NEGATIVE_SIZE, [](DiabloShape& s) { s.rows = -1; });
  refused(DIABLO_INPUTS_NOT_COVERED, [](DiabloShape& s) { s.block_size_in = 2; });
  refused(DIABLO_OUTPUTS_NOT_COVERED, [](DiabloShape& s) { s.block_size_out = 1; });
  refused(DIABLO_ROWS_OVERLAP, [](DiabloShape& s) { s.y_stride = 3; });
  refused(DIABLO_UNKNOWN_TYPE, [](DiabloShape& s) { s.type = DIABLO_I8; });
  refused(DIABLO_NO_SCALES, [](DiabloShape& s) { s.block_type = DIABLO_I8; });
  refused(DIABLO_OK, [](DiabloShape& s) { s.num_blocks = INT64_MAX, s.rows = 0; });  // no product may overflow
}

void test_an_instruction_set_that_is_not_there() {
  float x[12] = {}, d[12] = {}, y[8] = {};
  const DiabloIsa absent = diablo_has(DIABLO_NEON) ? DIABLO_AVX2 : DIABLO_NEON;
  const DiabloError got = diablo_block_diag_cpu(&kGood, x, d, nullptr, y, y, nullptr, absent);
  CHECK(got == DIABLO_NO_SUCH_ISA, "%s", diablo_error_text(got));
  CHECK(diablo_has(DIABLO_AUTO) && diablo_has(DIABLO_PORTABLE), "these two are everywhere");
}

void test_the_reference_by_hand() {
  // K 3 and N 3 cropped from two blocks of 2 x 2
  const DiabloShape shape{1, 3, 3, 2, 2, 2, 3, 3, DIABLO_F32, DIABLO_F32};
  const float x[] = {1, 2, 3}, d[] = {1, 2, 3, 4, 5, 6, 7, 8}, y0[] = {100, 200, 300}, wanted[] = {107, 210, 315};
  float y[3];
  CHECK(diablo_block_diag_reference(&shape, x, d, nullptr, y0, y) == DIABLO_OK, "refused");
  for (int i = 0; i < 3; ++i) CHECK(y[i] == wanted[i], "y[%d] is %g, not %g", i, y[i], wanted[i]);
}

void test_an_empty_adapter_keeps_every_bit() {
  for (DiabloType type : {DIABLO_F32, DIABLO_F16, DIABLO_BF16}) {
    const DiabloShape shape{2, 3, 5, 0, 0, 0, 3, 5, type, type};
    std::mt19937 random(1);
    Numbers x(type, 6), y0(type, 10), y(type, 10);
    y0.fill(random, 1), y0.set(3, NAN), y0.set(4, INFINITY);
    SUCCEEDS(diablo_block_diag_cpu(&shape, x.data(), nullptr, nullptr, y0.data(), y.data(), nullptr, DIABLO_AUTO));
    CHECK(y.bytes == y0.bytes, "%s", name_of(type));
  }
}

// Every one of the 65,536 bit patterns comes back, in scalar code and through each instruction set's vectors.
void test_16_bit_floats_round_trip() {
  for (DiabloType type : {DIABLO_F16, DIABLO_BF16}) {
    Numbers all(type, 65536);
    for (uint32_t bits = 0; bits < 65536; ++bits) {
      const uint16_t pattern = static_cast<uint16_t>(bits);
      std::memcpy(all.bytes.data() + 2 * bits, &pattern, 2);
    }
    const DiabloShape wide{8, 1, 8192, 1, 1, 8192, 1, 8192, type, type};  // long rows: whole vectors are converted
    Numbers x(type, 8), zeros(type, 8192);
    for (DiabloIsa isa : isas()) {
      Numbers y(type, 65536);
      SUCCEEDS(diablo_block_diag_cpu(&wide, x.data(), zeros.data(), nullptr, all.data(), y.data(), nullptr, isa));
      for (size_t i = 0; i < 65536; ++i) {
        const float before = all.get(i), after = y.get(i);
        CHECK(before == after || (std::isnan(before) && std::isnan(after)), "%s %s: pattern %zx is %g, comes back as %g",
              name_of(type), name_of(isa), i, before, after);
      }
    }
  }
}

// Values halfway between two neighbours, just above and just below: to the even one, up, and down.
void test_rounding() {
  for (DiabloIsa isa : isas()) {
    for (DiabloType type : {DIABLO_F16, DIABLO_BF16}) {
      const float bit = type == DIABLO_F16 ? 0x1p-10f : 0x1p-7f;
      const float sums[] = {1 + bit / 2, 1 + bit * 1.5f, 1 + bit * 0.5f * (1 + 0x1p-8f), 1 + bit * 0.5f * (1 - 0x1p-8f)};
      const float wanted[] = {1, 1 + 2 * bit, 1 + bit, 1};
      const DiabloShape shape{1, 1, 32, 1, 1, 32, 1, 32, type, DIABLO_F32};
      Numbers x(type, 1), y(type, 32);
      x.set(0, 1);
      float d[32];
      for (int i = 0; i < 32; ++i) d[i] = sums[i % 4];
      SUCCEEDS(diablo_block_diag_cpu(&shape, x.data(), d, nullptr, y.data(), y.data(), nullptr, isa));
      for (size_t i = 0; i < 32; ++i)
        CHECK(y.get(i) == wanted[i % 4], "%s %s: %.9g became %.9g", name_of(isa), name_of(type), d[i], y.get(i));
    }
  }
}

// One job large enough to be cut both by blocks and by rows.
void test_many_pieces_on_many_threads() {
  const DiabloShape shape{600, 256, 200, 4, 64, 50, 256, 200, DIABLO_F32, DIABLO_F32};
  std::mt19937 random(2);
  Numbers x(DIABLO_F32, 600 * 256), d(DIABLO_F32, 4 * 64 * 50), alone(DIABLO_F32, 600 * 200);
  x.fill(random, 1), d.fill(random, 1), alone.fill(random, 1);
  Numbers together = alone;
  int threads = 8;
  const DiabloParallelFor pool{run_on_threads, &threads};
  SUCCEEDS(diablo_block_diag_cpu(&shape, x.data(), d.data(), nullptr, alone.data(), alone.data(), nullptr, DIABLO_AUTO));
  SUCCEEDS(diablo_block_diag_cpu(&shape, x.data(), d.data(), nullptr, together.data(), together.data(), &pool, DIABLO_AUTO));
  CHECK(alone.bytes == together.bytes, "threads must not change a bit");
}

}  // namespace

int main() {
  test_sizes_that_do_not_fit();
  test_an_instruction_set_that_is_not_there();
  test_the_reference_by_hand();
  test_an_empty_adapter_keeps_every_bit();
  test_16_bit_floats_round_trip();
  test_rounding();
  test_many_pieces_on_many_threads();
  std::puts("the contract holds");
}
