// What the kernels ask of the device beyond C++: wide loads and tensor cores. cuda_test.cc has the same for the CPU,
// written from the fragment layouts in the PTX manual.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "diablo/block_diag.h"

namespace {

constexpr DiabloType type_of(float) { return DIABLO_F32; }
constexpr DiabloType type_of(__half) { return DIABLO_F16; }
constexpr DiabloType type_of(__nv_bfloat16) { return DIABLO_BF16; }
constexpr DiabloType type_of(int8_t) { return DIABLO_I8; }

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(int8_t value) { return static_cast<float>(value); }

__device__ inline void from_float(float value, float& to) { to = value; }
__device__ inline void from_float(float value, __half& to) { to = __float2half_rn(value); }
__device__ inline void from_float(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }

// `Bytes` from an address that is a multiple of them, as one access.
template <int Bytes>
__device__ inline void load_whole(const void* from, void* to) {
  static_assert(Bytes == 16 || Bytes == 8, "what one access takes");
  if (Bytes == 16)
    *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
  else
    *static_cast<uint2*>(to) = *static_cast<const uint2*>(from);
}

template <int Bytes>
__device__ inline void store_whole(void* to, const void* from) {
  load_whole<Bytes>(from, to);
}

// Sixteen bytes that nobody reads again: past the first cache, which keeps what is shared, and more of the same row at once.
__device__ inline void load_once(const void* from, uint32_t (&to)[4]) {
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
      : "l"(from));
}

// The pointer, as a number that the compiler keeps and does not compute again at each use.
template <class T>
__device__ inline T* kept(T* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

// One number that no kernel writes; its address is known to be global memory, whatever became of the pointer.
__device__ inline __half load_constant(const __half* from) { return __ldg(from); }
__device__ inline __nv_bfloat16 load_constant(const __nv_bfloat16* from) { return __ldg(from); }

__device__ inline uint32_t load_word(const void* from) { return __ldg(static_cast<const unsigned*>(from)); }

__device__ inline uint32_t load_pair(const void* from) { return *static_cast<const uint32_t*>(from); }

// codes & Mask | Bits, as the one instruction that it is
template <uint32_t Mask, uint32_t Bits>
__device__ inline uint32_t masked_with(uint32_t codes) {
  uint32_t both;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(both) : "r"(codes), "n"(Mask), "n"(Bits));
  return both;
}

// Two 16-bit halves, from the lower halves of two pairs or from the upper ones.
__device__ inline uint32_t lower_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ inline uint32_t upper_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// (code - zero) * scale for codes in the lower 4 bits of each half, and a zero point in both: behind the bits of 1024, or
// 128, either is that number plus itself, and the difference is exact.
__device__ inline uint32_t dequantize_low(uint32_t codes, uint32_t zeros, __half scale) {
  const uint32_t bits = masked_with<0x000f000f, 0x64006400>(codes), offset = zeros | 0x64006400u;
  const __half2 value = __hmul2(__hsub2(*reinterpret_cast<const __half2*>(&bits), *reinterpret_cast<const __half2*>(&offset)),
                                __half2half2(scale));
  return *reinterpret_cast<const uint32_t*>(&value);
}

__device__ inline uint32_t dequantize_low(uint32_t codes, uint32_t zeros, __nv_bfloat16 scale) {
  using Pair = __nv_bfloat162;
  const uint32_t bits = masked_with<0x000f000f, 0x43004300>(codes), offset = zeros | 0x43004300u;
  const Pair value = __hmul2(__hsub2(*reinterpret_cast<const Pair*>(&bits), *reinterpret_cast<const Pair*>(&offset)),
                             __bfloat162bfloat162(scale));
  return *reinterpret_cast<const uint32_t*>(&value);
}

// The same for the 4 bits above them. In float16 they are 16 times the code behind 1024: a sixteenth of that is 64 plus
// the code, so no shift is needed.
__device__ inline uint32_t dequantize_high(uint32_t codes, uint32_t zeros, __half scale) {
  const uint32_t bits = masked_with<0x00f000f0, 0x64006400>(codes), offset = zeros << 4 | 0xd400d400u;  // -64 - zero
  const __half2 code = __hfma2(*reinterpret_cast<const __half2*>(&bits), __float2half2_rn(0.0625f),
                               *reinterpret_cast<const __half2*>(&offset));
  const __half2 value = __hmul2(code, __half2half2(scale));
  return *reinterpret_cast<const uint32_t*>(&value);
}

__device__ inline uint32_t dequantize_high(uint32_t codes, uint32_t zeros, __nv_bfloat16 scale) {
  return dequantize_low(codes >> 4, zeros, scale);
}

__device__ inline void multiply_tile(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void multiply_tile(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory, transposed; each lane names one row of them.
__device__ inline void load_transposed(uint32_t (&to)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

}  // namespace
