// What a number that is multiplied is, float32 or bfloat16, for the kernels that are compiled for
// either.
#pragma once

#include "team.h"

#ifdef COCA_JAX_BFLOAT16
#ifndef __AVX512BF16__
#error "bfloat16 kernels are for a processor, and a compiler, with AVX512_BF16"
#endif
#include <immintrin.h>
#define SYMBOL(name) coca_jax_bfloat16_##name
#else
#define SYMBOL(name) coca_jax_##name
#endif

namespace {

// Number: of an operand of a product; a word of 32 bits holds kPair of them. Below, panels and the
// rows that they multiply are words, passed as floats whatever is in them.
#ifdef COCA_JAX_BFLOAT16
constexpr int kPair = 2;
struct __attribute__((may_alias)) Number {
  uint16_t bits;
};
using Numbers = ffi::Buffer<ffi::BF16>;

inline Vector AddProduct(Vector sum, Vector a, Vector b) {
  return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

inline Vector Broadcast(const float* word) {
  int32_t bits;
  std::memcpy(&bits, word, sizeof(bits));
  return (Vector)_mm512_set1_epi32(bits);
}

inline void Store(Number* to, Vector v) {
  const auto rounded = (__m256i)_mm512_cvtneps_pbh((__m512)v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
}

// The first `count` of `from`, whole vectors.
inline void Put(Number* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const auto rounded = (__m256i)_mm512_cvtneps_pbh((__m512)Load(from + i));
    const int64_t few = std::min<int64_t>(kLanes, count - i);
    _mm256_mask_storeu_epi16(to + i, static_cast<__mmask16>((1u << few) - 1), rounded);
  }
}
#else
constexpr int kPair = 1;
using Number = float;
using Numbers = Floats;

inline Vector AddProduct(Vector sum, Vector a, Vector b) { return sum + a * b; }

inline Vector Broadcast(const float* word) { return *word - Vector{}; }

#endif

inline void Put(float* to, const float* from, int64_t count) { std::copy_n(from, count, to); }

inline const float* Words(const Number* numbers) { return reinterpret_cast<const float*>(numbers); }

inline const Number* Data(Numbers& buffer) {
  return reinterpret_cast<const Number*>(buffer.typed_data());
}

inline float Rectified(float x) { return x < 0 ? 0 : x; }  // of NaN it is NaN

// Words that hold so many numbers one after the other.
constexpr int64_t WordsOf(int64_t numbers) { return (numbers + kPair - 1) / kPair; }

#ifdef COCA_JAX_BFLOAT16
// The first `few` of 16 floats, negative ones as 0 if asked to, then zeros.
inline __m512 Few(const float* from, int64_t few, bool rectify) {
  const __m512 x = few < kLanes ? _mm512_maskz_loadu_ps((1u << few) - 1, from) : (__m512)Load(from);
  if (!rectify) return x;
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), x,
                              _mm512_setzero_ps());
}

// Writes the words of `count` floats, negative ones as 0 if asked to; an odd one's last ends in 0.
inline void Copy(const float* from, int64_t count, bool rectify, float* to) {
  if (count <= 4) {  // a pixel of an image, of which there are many
    __m128 x = _mm_maskz_loadu_ps((1u << count) - 1, from);
    if (rectify) x = _mm_mask_blend_ps(_mm_cmp_ps_mask(x, _mm_setzero_ps(), _CMP_LT_OQ), x,
                                       _mm_setzero_ps());
    return _mm_mask_storeu_epi32(to, (1u << WordsOf(count)) - 1, (__m128i)_mm_cvtneps_pbh(x));
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t few = std::min<int64_t>(kLanes, count - i);
    const auto words = (__m256)_mm512_cvtneps_pbh(Few(from + i, few, rectify));
    _mm256_mask_storeu_ps(to + i / kPair, (1u << WordsOf(few)) - 1, words);
  }
}

// Writes words of one number of either image each; `other` null: zeros.
inline void Copy(const float* from, const float* other, int64_t count, bool rectify, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t few = std::min<int64_t>(kLanes, count - i);
    const auto half = [&](const float* x) {
      return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(Few(x + i, few, rectify)));
    };
    auto words = half(from);
    if (other) words = _mm512_or_si512(words, _mm512_slli_epi32(half(other), 16));
    _mm512_mask_storeu_epi32(to + i, few < kLanes ? (1u << few) - 1 : 0xffff, words);
  }
}
#else
// Copies `count` floats, negative ones as 0 if asked to.
inline void Copy(const float* from, int64_t count, bool rectify, float* to) {
  if (rectify)
    for (int64_t i = 0; i < count; ++i) to[i] = Rectified(from[i]);
  else
    std::memcpy(to, from, 4 * count);
}

inline void Copy(const float* from, const float*, int64_t count, bool rectify, float* to) {
  Copy(from, count, rectify, to);
}
#endif

}  // namespace
