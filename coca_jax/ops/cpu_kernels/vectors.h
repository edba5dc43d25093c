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

// The next floats, of which `left` are there; `rest` in place of others.
inline Vector Load(const float* from, int64_t left, float rest) {
  if (left >= kLanes) return Load(from);
  Vector v = rest - Vector{};
  std::memcpy(&v, from, left * sizeof(float));
  return v;
}

inline Vector Larger(Vector a, Vector b) { return a < b ? b : a; }

// The float that `pair` makes of all those of a vector, two at a time.
template <typename Pair>
float Fold(Vector v, const Pair& pair) {
  float part[kLanes];
  std::memcpy(part, &v, sizeof(part));
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] = pair(part[i], part[i + half]);
  return part[0];
}

inline float Sum(Vector v) {
  return Fold(v, [](float a, float b) { return a + b; });
}

inline float Largest(Vector v) {
  return Fold(v, [](float a, float b) { return std::max(a, b); });
}

// A value that the compiler, which may regroup sums, takes as it is.
inline Vector AsWritten(Vector x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// exp(x) for x <= 88, to a few units in the last place; below -87, 0: a product with a number too
// small for its exponent takes a hundred times as long. Of vectors alone: a loop over numbers is one
// that a compiler may leave as it is, and then takes several times as long.
inline Vector Exp(Vector given) {
  const Vector x = given < -87.0f ? Vector{} - 87.0f : given;
  const Vector turns = x * 1.44269504f + (x < 0.0f ? Vector{} - 0.5f : Vector{} + 0.5f);
  const Integers nearest = __builtin_convertvector(turns, Integers);
  const Vector n = __builtin_convertvector(nearest, Vector);
  // ln 2 in two parts, the first of few bits, so that n times it is exact.
  const Vector r = AsWritten(x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector series = Vector{} + 1.0f / 5040.0f;
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    series = series * r + c;
  const Integers bits = (nearest + 127) << 23;
  Vector power;
  std::memcpy(&power, &bits, sizeof(power));
  return given < -87.0f ? Vector{} : series * power;
}

// Replaces `count` floats by function(vector) of them, the last vector filled up with zeros.
template <typename Function>
void Map(float* values, int64_t count, const Function& function) {
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) Store(values + i, function(Load(values + i)));
  if (whole == count) return;
  const Vector made = function(Load(values + whole, count - whole, 0.0f));
  std::memcpy(values + whole, &made, (count - whole) * sizeof(float));
}

}  // namespace
