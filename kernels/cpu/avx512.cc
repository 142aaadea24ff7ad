// AVX-512 Foundation alone, which every processor with any AVX-512 has.
#include <immintrin.h>

#include "kernel.h"

namespace {

struct Avx512 {
  using Vector = __m512;
  using Lanes = __mmask16;
  static constexpr int width = 16;
  static constexpr int sums = 24;         // of 32 registers
  static constexpr int tile_vectors = 2;  // 12 rows × 32 columns

  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector broadcast(const float* at) { return _mm512_set1_ps(*at); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(Vector value) { return _mm512_reduce_add_ps(value); }

  template <int Times>
  static Vector repeat(const float* at) {
    if (Times == 1) return load(at);
    const __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 few =
        Times == 2 ? _mm512_castps256_ps512(_mm256_loadu_ps(at)) : _mm512_castps128_ps512(_mm_loadu_ps(at));
    return _mm512_permutexvar_ps(_mm512_srli_epi32(index, Times / 2), few);
  }
  template <int Count>
  static void fold(Vector value, float* to) {
    float lane[width];
    store(lane, value);
    for (int c = 0; c < Count; ++c) {
      to[c] = 0;
      for (int i = c; i < width; i += Count) to[c] += lane[i];
    }
  }
  static Vector keep(Vector value, Lanes lanes) { return _mm512_maskz_mov_ps(lanes, value); }

  static Lanes lanes(int count) { return static_cast<Lanes>((1u << count) - 1u); }
  static Vector load(const float* at) { return _mm512_loadu_ps(at); }
  static Vector load(const float* at, Lanes lanes) { return _mm512_maskz_loadu_ps(lanes, at); }
  static void store(float* at, Vector value) { _mm512_storeu_ps(at, value); }
  static void store(float* at, Vector value, Lanes lanes) { _mm512_mask_storeu_ps(at, lanes, value); }

  static __m256i load32(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
  static Vector widen(const float* at) { return load(at); }
  static Vector widen(const Half* at) { return _mm512_cvtph_ps(load32(at)); }
  static Vector widen(const Brain* at) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load32(at)), 16));
  }
  static Vector widen(const int8_t* at) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  }

  static void narrow(Vector value, Half* to) {
    const __m256i half = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
  }
  static void narrow(Vector value, Brain* to) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i all = _mm512_mask_or_epi32(even, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(all, 16)));
  }
};

}  // namespace

void diablo::avx512_kernel(const Job& job, const Piece& piece) { run_any_piece<Avx512>(job, piece); }
