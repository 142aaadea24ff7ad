// Any processor: plain loops over four floats, which compilers turn into whatever vectors the target has.
#include "kernel.h"

namespace {

struct Portable {
  static constexpr int width = 4;
  static constexpr int sums = 8;  // SSE2 has 16 registers, and needs one of its own for every product
  static constexpr int tile_vectors = 2;
  using Lanes = int;
  struct Vector {
    float lane[width];
  };

  template <class Make>
  static Vector each(Make make) {
    Vector made;
    for (int i = 0; i < width; ++i) made.lane[i] = make(i);
    return made;
  }

  static Vector zero() {
    return each([](int) { return 0.0f; });
  }
  static Vector broadcast(const float* at) {
    return each([at](int) { return *at; });
  }
  static Vector add(Vector a, Vector b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Vector mul(Vector a, Vector b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Vector fma(Vector a, Vector b, Vector c) {
    return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static float sum(Vector a) { return (a.lane[0] + a.lane[1]) + (a.lane[2] + a.lane[3]); }

  template <int Times>
  static Vector repeat(const float* at) {
    return each([at](int i) { return at[i / Times]; });
  }
  template <int Count>
  static void fold(Vector value, float* to) {
    for (int c = 0; c < Count; ++c) {
      to[c] = 0;
      for (int i = c; i < width; i += Count) to[c] += value.lane[i];
    }
  }
  static Vector keep(Vector value, Lanes count) {
    return each([&](int i) { return i < count ? value.lane[i] : 0.0f; });
  }

  static Lanes lanes(int count) { return count; }
  static Vector load(const float* at) {
    return each([at](int i) { return at[i]; });
  }
  static Vector load(const float* at, Lanes count) {
    return each([at, count](int i) { return i < count ? at[i] : 0.0f; });
  }
  static void store(float* at, Vector value) { memcpy(at, value.lane, sizeof value.lane); }
  static void store(float* at, Vector value, Lanes count) {
    for (int i = 0; i < count; ++i) at[i] = value.lane[i];
  }

  template <class From>
  static Vector widen(const From* at) {
    return each([at](int i) { return to_float(at[i]); });
  }
  template <class To>
  static void narrow(Vector value, To* to) {
    for (int i = 0; i < width; ++i) from_float(value.lane[i], to[i]);
  }
};

}  // namespace

void diablo::portable_kernel(const Job& job, const Piece& piece) { run_any_piece<Portable>(job, piece); }
