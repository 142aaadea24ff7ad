// NEON, which every 64-bit ARM processor has.
#include <arm_neon.h>

#include "kernel.h"

namespace {

struct Neon {
  using Vector = float32x4_t;
  using Lanes = int;
  static constexpr int width = 4;
  static constexpr int sums = 24;         // of 32 registers
  static constexpr int tile_vectors = 4;  // 6 rows × 16 columns

  static Vector zero() { return vdupq_n_f32(0); }
  static Vector broadcast(const float* at) { return vld1q_dup_f32(at); }
  static Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }
  static Vector mul(Vector a, Vector b) { return vmulq_f32(a, b); }
  static Vector fma(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
  static float sum(Vector value) { return vaddvq_f32(value); }

  template <int Times>
  static Vector repeat(const float* at) {
    if (Times == 1) return load(at);
    if (Times == 4) return broadcast(at);
    return vcombine_f32(vdup_n_f32(at[0]), vdup_n_f32(at[1]));
  }
  template <int Count>
  static void fold(Vector value, float* to) {
    if (Count == 1) *to = sum(value);
    if (Count == 2) vst1_f32(to, vadd_f32(vget_low_f32(value), vget_high_f32(value)));
    if (Count == 4) store(to, value);
  }
  static Vector keep(Vector value, Lanes count) {
    const uint32_t index[] = {0, 1, 2, 3};
    const uint32x4_t kept = vcltq_u32(vld1q_u32(index), vdupq_n_u32(static_cast<uint32_t>(count)));
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(value), kept));
  }

  static Lanes lanes(int count) { return count; }
  static Vector load(const float* at) { return vld1q_f32(at); }
  static Vector load(const float* at, Lanes count) {
    if (count == 4) return load(at);
    if (count == 1) return vld1q_lane_f32(at, zero(), 0);
    const Vector two = vcombine_f32(vld1_f32(at), vdup_n_f32(0));
    return count == 2 ? two : vld1q_lane_f32(at + 2, two, 2);
  }
  static void store(float* at, Vector value) { vst1q_f32(at, value); }
  static void store(float* at, Vector value, Lanes count) {
    if (count == 4) return store(at, value);
    if (count & 2) vst1_f32(at, vget_low_f32(value));
    if (count == 1) vst1q_lane_f32(at, value, 0);
    if (count == 3) vst1q_lane_f32(at + 2, value, 2);
  }

  static Vector widen(const float* at) { return load(at); }
  static Vector widen(const Half* at) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(at))));
  }
  static Vector widen(const Brain* at) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(at)), 16));
  }
  static Vector widen(const int8_t* at) {  // four bytes through a word: a vector load would read eight
    int32_t four;
    memcpy(&four, at, sizeof four);
    const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(four));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
  }

  static void narrow(Vector value, Half* to) {
    vst1_u16(reinterpret_cast<uint16_t*>(to), vreinterpret_u16_f16(vcvt_f16_f32(value)));
  }
  static void narrow(Vector value, Brain* to) {
    const uint32x4_t bits = vreinterpretq_u32_f32(value);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t even = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    const uint32x4_t number = vceqq_f32(value, value);
    vst1_u16(reinterpret_cast<uint16_t*>(to), vshrn_n_u32(vbslq_u32(number, even, quiet), 16));
  }
};

}  // namespace

void diablo::neon_kernel(const Job& job, const Piece& piece) { run_any_piece<Neon>(job, piece); }
