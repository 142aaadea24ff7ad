// What avx512.cc asks of AVX-512, lane by lane, for processors without it: SIMDe, and the nine functions that its
// version 0.7.4 lacks. emulate_avx512.sh puts it in the place of immintrin.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "simde/x86/avx512.h"

template <class To, class From>
To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bytes as another type");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T, int Count>
struct Emulated {
  T lane[Count];
};
using Floats = Emulated<float, 16>;
using Ints = Emulated<int32_t, 16>;

struct Halves {
  __m256 low, high;
};

template <class Narrow, class From>
simde__m512i widened(const From& from) {
  const Emulated<Narrow, 16> narrow = same_bits<Emulated<Narrow, 16>>(from);
  Ints wide;
  for (int i = 0; i < 16; ++i) wide.lane[i] = narrow.lane[i];
  return same_bits<simde__m512i>(wide);
}

inline simde__m512i simde_mm512_cvtepu16_epi32(__m256i from) { return widened<uint16_t>(from); }
inline simde__m512i simde_mm512_cvtepi8_epi32(__m128i from) { return widened<int8_t>(from); }

inline float simde_mm512_reduce_add_ps(simde__m512 value) {
  Floats all = same_bits<Floats>(value);
  for (int count = 8; count > 0; count /= 2)
    for (int i = 0; i < count; ++i) all.lane[i] += all.lane[i + count];
  return all.lane[0];
}

inline simde__m512 simde_mm512_maskz_loadu_ps(simde__mmask16 mask, const float* at) {
  Floats all = {};
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) all.lane[i] = at[i];
  return same_bits<simde__m512>(all);
}

inline void simde_mm512_mask_storeu_ps(float* at, simde__mmask16 mask, simde__m512 value) {
  const Floats all = same_bits<Floats>(value);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) at[i] = all.lane[i];
}

inline simde__m512 simde_mm512_cvtepi32_ps(simde__m512i value) {
  const Ints from = same_bits<Ints>(value);
  Floats to;
  for (int i = 0; i < 16; ++i) to.lane[i] = static_cast<float>(from.lane[i]);
  return same_bits<simde__m512>(to);
}

inline __m256i simde_mm512_cvtepi32_epi16(simde__m512i value) {
  const Ints from = same_bits<Ints>(value);
  Emulated<uint16_t, 16> to;
  for (int i = 0; i < 16; ++i) to.lane[i] = static_cast<uint16_t>(from.lane[i]);
  return same_bits<__m256i>(to);
}

inline simde__m512 simde_mm512_cvtph_ps(__m256i from) {
  const __m128i low = _mm256_castsi256_si128(from), high = _mm256_extracti128_si256(from, 1);
  return same_bits<simde__m512>(Halves{_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)});
}

inline __m256i simde_mm512_cvtps_ph(simde__m512 value, int) {  // avx512.cc rounds to nearest and nothing else
  const Halves from = same_bits<Halves>(value);
  return _mm256_set_m128i(_mm256_cvtps_ph(from.high, _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(from.low, _MM_FROUND_TO_NEAREST_INT));
}
