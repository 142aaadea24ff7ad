// What the tests share: random cases, the types as stored, a pool of threads, and checks that print what they saw.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../cpu/number.h"
#include "diablo/block_diag.h"

#define CHECK(condition, ...)                                            \
  do {                                                                   \
    if (!(condition)) {                                                  \
      std::fprintf(stderr, "%s:%d: %s\n  ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                 \
      std::fprintf(stderr, "\n");                                        \
      std::exit(1);                                                      \
    }                                                                    \
  } while (0)

#define SUCCEEDS(call)                                                     \
  do {                                                                     \
    const DiabloError code_ = (call);                                      \
    CHECK(code_ == DIABLO_OK, "%s", diablo_error_text(code_));             \
  } while (0)

inline size_t size_of(DiabloType type) { return type == DIABLO_F32 ? 4 : type == DIABLO_I8 ? 1 : 2; }

inline const char* name_of(DiabloType type) {
  static const char* const names[] = {"float32", "float16", "bfloat16", "int8"};
  return names[type];
}

inline const char* name_of(DiabloIsa isa) {
  static const char* const names[] = {"auto", "portable", "avx2", "avx512", "neon"};
  return names[isa];
}

inline std::vector<DiabloIsa> isas() {
  std::vector<DiabloIsa> found;
  for (DiabloIsa isa : {DIABLO_PORTABLE, DIABLO_AVX2, DIABLO_AVX512, DIABLO_NEON})
    if (diablo_has(isa)) found.push_back(isa);
  return found;
}

// Numbers of one type in memory of exactly their size, so that a sanitizer sees every byte read beyond them.
struct Numbers {
  DiabloType type;
  std::vector<unsigned char> bytes;

  Numbers(DiabloType t, size_t count) : type(t), bytes(count * size_of(t)) {}
  size_t size() const { return bytes.size() / size_of(type); }
  void* data() { return bytes.data(); }

  float get(size_t i) const {
    switch (type) {
      case DIABLO_F16:
        return read<Half>(i);
      case DIABLO_BF16:
        return read<Brain>(i);
      case DIABLO_I8:
        return read<int8_t>(i);
      default:
        return read<float>(i);
    }
  }
  void set(size_t i, float value) {
    switch (type) {
      case DIABLO_F16:
        return write<Half>(i, value);
      case DIABLO_BF16:
        return write<Brain>(i, value);
      case DIABLO_I8:
        bytes[i] = static_cast<unsigned char>(static_cast<int8_t>(std::lrint(value)));
        return;
      default:
        return write<float>(i, value);
    }
  }
  void fill(std::mt19937& random, float size) {
    std::normal_distribution<float> normal(0, size);
    for (size_t i = 0; i < this->size(); ++i) set(i, std::clamp(normal(random), -127.0f, 127.0f));
  }

 private:
  template <class T>
  float read(size_t i) const {
    T value;
    std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
    return to_float(value);
  }
  template <class T>
  void write(size_t i, float number) {
    T value;
    from_float(number, value);
    std::memcpy(bytes.data() + i * sizeof(T), &value, sizeof(T));
  }
};

// Threads that live for one call: slow, but every race that a real pool could meet is there for a sanitizer to see.
inline void run_on_threads(void* threads, void (*task)(void*, size_t), void* data, size_t count) {
  std::atomic<size_t> next{0};
  std::vector<std::thread> all;
  for (int t = 0; t < *static_cast<int*>(threads); ++t)
    all.emplace_back([&] {
      for (size_t i; (i = next.fetch_add(1)) < count;) task(data, i);
    });
  for (std::thread& thread : all) thread.join();
}
