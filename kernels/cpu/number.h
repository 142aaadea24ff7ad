// The 16-bit float types as stored, and their scalar conversions. Round to nearest, ties to even, as the hardware does.
//
// Everything here and in the other headers of this folder lies in an unnamed namespace, and none of it calls the
// standard library: each instruction set compiles its own copy. An inline function shared between those files could be
// emitted with AVX-512 in it and then be picked by the linker for all of them.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct Half {
  uint16_t bits;
};

struct Brain {  // bfloat16: the upper half of a float
  uint16_t bits;
};

inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(float value) { return value; }

inline float to_float(int8_t value) { return value; }

inline float to_float(Brain value) { return as_float(uint32_t{value.bits} << 16); }

inline float to_float(Half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  // Moved to float's place the exponent is 112 too small; the product mends that and normalises subnormals.
  const float scaled = as_float((value.bits & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = scaled >= 65536.0f ? 0x7f800000u : 0u;  // infinity and NaN keep their mantissa
  return as_float(sign | special | as_bits(scaled));
}

inline void from_float(float value, float& to) { to = value; }

inline void from_float(float value, Brain& to) {
  const uint32_t bits = as_bits(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = nan ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  to.bits = static_cast<uint16_t>(rounded >> 16);
}

inline void from_float(float value, Half& to) {
  const uint32_t bits = as_bits(value), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  uint32_t half;
  if (size > 0x7f800000u) {
    half = 0x7e00u | ((size >> 13) & 0x3ffu);
  } else if (size >= 0x47800000u) {  // 65536 and above
    half = 0x7c00u;
  } else if (size < 0x38800000u) {  // subnormal in half: next to 0.5 a float's last bit is worth just that of a half
    half = as_bits(as_float(size) + 0.5f) - as_bits(0.5f);
  } else {  // exponent bias 127 → 15, then round on the 13 bits that go; a carry into the exponent is right
    half = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
  }
  to.bits = static_cast<uint16_t>(sign | half);
}

}  // namespace
