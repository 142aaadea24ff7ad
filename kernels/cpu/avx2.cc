// AVX2 with FMA and F16C: every x86-64 processor since 2013 or so.
#include <immintrin.h>

#include "kernel.h"

namespace {

struct Avx2 {
  using Vector = __m256;
  struct Lanes {
    __m256i mask;
    int count;
  };
  static constexpr int width = 8;
  static constexpr int sums = 12;         // of 16 registers; the rest hold two vectors of a block and an input
  static constexpr int tile_vectors = 2;  // 6 rows × 16 columns: 12 products for 8 loads, so loads never limit

  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector broadcast(const float* at) { return _mm256_broadcast_ss(at); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(Vector value) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  // Each of a few inputs, Times over.
  template <int Times>
  static Vector repeat(const float* at) {
    if (Times == 1) return load(at);
    const __m128i pair = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
    const __m128 few = Times == 2 ? _mm_loadu_ps(at) : _mm_castsi128_ps(pair);
    const __m256i two = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3), four = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(few), Times == 2 ? two : four);
  }
  // The sums of every Count-th lane.
  template <int Count>
  static void fold(Vector value, float* to) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    if (Count == 4) return _mm_storeu_ps(to, four);
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    if (Count == 2) return _mm_storel_pi(reinterpret_cast<__m64*>(to), two);
    _mm_store_ss(to, _mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static Vector keep(Vector value, Lanes lanes) { return _mm256_and_ps(value, _mm256_castsi256_ps(lanes.mask)); }

  static Lanes lanes(int count) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_cmpgt_epi32(_mm256_set1_epi32(count), index), count};
  }

  static Vector load(const float* at) { return _mm256_loadu_ps(at); }
  static Vector load(const float* at, Lanes lanes) { return _mm256_maskload_ps(at, lanes.mask); }
  static void store(float* at, Vector value) { _mm256_storeu_ps(at, value); }

  // Not a masked store: that is a dozen cycles of microcode on AMD's Zen.
  static void store(float* at, Vector value, Lanes lanes) {
    __m128 rest = _mm256_castps256_ps128(value);
    if (lanes.count & 8) return store(at, value);
    if (lanes.count & 4) {
      _mm_storeu_ps(at, rest);
      rest = _mm256_extractf128_ps(value, 1);
      at += 4;
    }
    if (lanes.count & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(at), rest);
      rest = _mm_movehl_ps(rest, rest);
      at += 2;
    }
    if (lanes.count & 1) _mm_store_ss(at, rest);
  }

  static __m128i load16(const void* at) { return _mm_loadu_si128(static_cast<const __m128i*>(at)); }
  static Vector widen(const float* at) { return load(at); }
  static Vector widen(const Half* at) { return _mm256_cvtph_ps(load16(at)); }
  static Vector widen(const Brain* at) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(at)), 16));
  }
  static Vector widen(const int8_t* at) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }

  static void narrow(Vector value, Half* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static void narrow(Vector value, Brain* to) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i even = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(even, quiet, nan), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
  }
};

}  // namespace

void diablo::avx2_kernel(const Job& job, const Piece& piece) { run_any_piece<Avx2>(job, piece); }
