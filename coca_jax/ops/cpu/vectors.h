// A vector register, and sums and exponentials of what is in it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kLine = 16;  // floats of a line of the cache

// Floats of a vector register.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));

inline Vector Load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

inline void Store(float* to, Vector v) { std::memcpy(to, &v, sizeof(v)); }

inline float Sum(Vector v) {
  float part[kLanes];
  std::memcpy(part, &v, sizeof(part));
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

inline int32_t Truncated(float x) { return static_cast<int32_t>(x); }
inline Integers Truncated(Vector x) { return __builtin_convertvector(x, Integers); }
inline float Exact(int32_t x) { return static_cast<float>(x); }
inline Vector Exact(Integers x) { return __builtin_convertvector(x, Vector); }

// A value that the compiler, which may regroup sums, takes as it is. Loops over numbers stay loops
// that it can do in vectors, in which without products and sums in one it regroups all the same.
inline float AsWritten(float x) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_assoc_barrier)
  return __builtin_assoc_barrier(x);
#endif
#endif
  return x;
}

inline Vector AsWritten(Vector x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// exp(x) for x <= 88, a number or a vector of them, to a few units in the last place; below -87, 0:
// a product with a number too small for its exponent takes a hundred times as long.
template <typename T>
inline T Exp(T given) {
  const T x = given < -87.0f ? T{} - 87.0f : given;
  const T turns = x * 1.44269504f + (x < 0.0f ? T{} - 0.5f : T{} + 0.5f);
  const auto nearest = Truncated(turns);
  const T n = Exact(nearest);
  // ln 2 in two parts, the first of few bits, so that n times it is exact.
  const T r = AsWritten(x - n * 0.693359375f) + n * 2.12194440e-4f;
  T series = T{} + 1.0f / 5040.0f;
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    series = series * r + c;
  const auto bits = (nearest + 127) << 23;
  T power;
  std::memcpy(&power, &bits, sizeof(power));
  return given < -87.0f ? T{} : series * power;
}

}  // namespace
