// Runs of numbers from their stored type to float32 and back.
#pragma once

#include <cstdint>

#include "number.h"

namespace {

// to = scale · from. The last vector overlaps the one before it rather than being ragged.
template <class Simd, class From>
void widen(const From* from, int64_t count, float scale, float* to) {
  const typename Simd::Vector factor = Simd::broadcast(&scale);
  if (count < Simd::width) {
    for (int64_t i = 0; i < count; ++i) to[i] = scale * to_float(from[i]);
    return;
  }
  for (int64_t i = 0;; i = i + 2 * Simd::width <= count ? i + Simd::width : count - Simd::width) {
    Simd::store(to + i, Simd::mul(factor, Simd::widen(from + i)));
    if (i + Simd::width == count) return;
  }
}

template <class Simd, class To>
void narrow(const float* from, int64_t count, To* to) {
  int64_t i = 0;
  for (; i + Simd::width <= count; i += Simd::width) Simd::narrow(Simd::load(from + i), to + i);
  for (; i < count; ++i) from_float(from[i], to[i]);
}

}  // namespace
