// Attention of a step: one query over a cache, and many over the tokens of an image.
#pragma once

#include "products.h"

namespace {

// One query [16 C] over the keys and values [.., 16 C] of the slots that `mask` shows (null: all).
// Asks for the same slots at `ahead` floats from there on its way.
template <int C>
void Attend(const float* query, const float* keys, const float* values, const bool* mask,
            int64_t slots, int64_t ahead, float* scores, float* out) {
  constexpr int kWidth = C * kLine, kVectors = kWidth / kLanes;
  Vector q[kVectors], sum[kVectors] = {};
  for (int v = 0; v < kVectors; ++v) q[v] = Load(query + v * kLanes);
  float highest = -INFINITY, total = 0.0f;
  for (int64_t m = 0; m < slots; ++m) {
    scores[m] = -INFINITY;
    if (mask && !mask[m]) continue;
    const float* key = keys + m * kWidth;
    for (int c = 0; c < C; ++c) __builtin_prefetch(key + ahead + c * kLine, 0, 2);
    Vector dot = {};
    for (int v = 0; v < kVectors; ++v) dot += q[v] * Load(key + v * kLanes);
    scores[m] = Sum(dot);
    highest = std::max(highest, scores[m]);
  }
  Map(scores, slots, [=](Vector score) { return Exp(score - highest); });
  for (int64_t m = 0; m < slots; ++m) {
    if (mask && !mask[m]) continue;
    total += scores[m];
    const float* value = values + m * kWidth;
    for (int c = 0; c < C; ++c) __builtin_prefetch(value + ahead + c * kLine, 0, 2);
    for (int v = 0; v < kVectors; ++v) sum[v] += scores[m] * Load(value + v * kLanes);
  }
  // A row that sees nothing (padding before a prompt) gets 0: what others hide of it must be finite.
  for (int v = 0; v < kVectors; ++v)
    Store(out + v * kLanes, total == 0.0f ? Vector{} : sum[v] / total);
}

using AttendOf = void (*)(const float*, const float*, const float*, const bool*, int64_t, int64_t,
                          float*, float*);
constexpr AttendOf kAttend[] = {Attend<1>, Attend<2>, Attend<3>, Attend<4>,
                                Attend<5>, Attend<6>, Attend<7>, Attend<8>};
constexpr int kWidest = 8 * kLine;  // of a head

constexpr int kQueries = 8;  // rows that look at an image's tokens together
constexpr int kTokens = 8;   // image tokens whose scores stay in registers

template <int T>
void Scores(const Number* turned, const Number* tokens, int64_t width, float* scores,
            const Number* ahead);

// The `Scores` of all `count` tokens.
inline void AllScores(const Number* turned, const Number* tokens, int64_t count, int64_t width,
                      float* scores, const Number* ahead) {
  int64_t m = 0;
  for (; m + kTokens <= count; m += kTokens)
    Scores<kTokens>(turned, tokens + m * width, width, scores + m * kQueries,
                    ahead + m / 2 * width);
  for (; m < count; ++m)
    Scores<1>(turned, tokens + m * width, width, scores + m * kQueries, ahead);
}

constexpr int kRound = std::max(kQueries, kLanes);  // scores of whole tokens in whole vectors

// Replaces scores [count, 8] by their exponentials, the highest of each query's being 1; factors
// [8] make the sum of a query's 1. Scores behind them, of one token, are overwritten.
inline void Soften(float* scores, int64_t count, float* factors) {
  constexpr int kParts = kRound / kLanes;
  const int64_t all = (count * kQueries + kRound - 1) / kRound * kRound;
  std::fill(scores + count * kQueries, scores + all, -INFINITY);
  Vector most[kParts], total[kParts] = {};
  std::memcpy(most, scores, sizeof(most));
  for (int64_t i = kRound; i < all; i += kRound)
    for (int p = 0; p < kParts; ++p) most[p] = Larger(most[p], Load(scores + i + p * kLanes));
  float parts[kRound];
  std::memcpy(parts, most, sizeof(parts));
  for (int r = 0; r < kQueries; ++r) {
    for (int i = r; i < kRound; i += kQueries) parts[r] = std::max(parts[r], parts[i]);
    for (int i = r; i < kRound; i += kQueries) parts[i] = parts[r];
  }
  std::memcpy(most, parts, sizeof(parts));
  for (int64_t i = 0; i < all; i += kRound)
    for (int p = 0; p < kParts; ++p) {
      float* at = scores + i + p * kLanes;
      const Vector weights = Exp(Load(at) - most[p]);
      Store(at, weights);
      total[p] += weights;
    }
  std::memcpy(parts, total, sizeof(parts));
  for (int r = 0; r < kQueries; ++r) {
    float sum = 0.0f;
    for (int i = r; i < kRound; i += kQueries) sum += parts[i];
    factors[r] = 1.0f / sum;
  }
}

#ifdef COCA_JAX_BFLOAT16
// scores [T, 8] of the queries turned [width / 4, 8, 4] and tokens [T, width]; 16 numbers beyond
// them are overwritten. Asks for half as many numbers at `ahead` on its way.
template <int T>
void Scores(const Number* turned, const Number* tokens, int64_t width, float* scores,
            const Number* ahead) {
  Vector sum[T] = {};  // of each query two: of the first two and of the last two of four numbers
  for (int64_t k = 0; k < width; k += 4) {
    if (k % kPanel == 0)
      for (int t = 0; t < T / 2; ++t) __builtin_prefetch(ahead + t * width + k, 0, 2);
    const Vector query = Load(Words(turned + k * kQueries));
    for (int t = 0; t < T; ++t) {
      int64_t four;
      std::memcpy(&four, tokens + t * width + k, sizeof(four));
      sum[t] = AddProduct(sum[t], query, (Vector)_mm512_set1_epi64(four));
    }
  }
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  for (int t = 0; t < T; t += 2) {
    const __m512 one = (__m512)sum[t], two = (__m512)sum[std::min(t + 1, T - 1)];
    Store(scores + t * kQueries, (Vector)_mm512_permutex2var_ps(one, even, two) +
                                     (Vector)_mm512_permutex2var_ps(one, odd, two));
  }
}

// out [R, 32] = weights [count / 2, 8, 2] turned @ tokens [count, 32], rows of which are `width`
// apart, each row times its factor. Asks for the lines at `ahead`.
template <int R>
void Weighted(const float* weights, const float* factors, const Number* tokens, int64_t count,
              int64_t width, Number* out, int64_t stride, const Number* ahead) {
  // Two rows of tokens are put together in pairs where they are: `low` has the columns 0 to 3 of
  // each 8, `high` the others.
  Vector low[R] = {}, high[R] = {};
  for (int64_t m = 0; m < count; m += 2) {
    __builtin_prefetch(ahead + m / 2 * kPanel, 0, 2);
    const __m512i first = _mm512_loadu_si512(tokens + m * width);
    const __m512i second =
        m + 1 < count ? _mm512_loadu_si512(tokens + (m + 1) * width) : _mm512_setzero_si512();
    const Vector lows = (Vector)_mm512_unpacklo_epi16(first, second);
    const Vector highs = (Vector)_mm512_unpackhi_epi16(first, second);
    for (int r = 0; r < R; ++r) {
      const Vector weight = Broadcast(weights + m / 2 * kQueries + r);
      low[r] = AddProduct(low[r], lows, weight);
      high[r] = AddProduct(high[r], highs, weight);
    }
  }
  const __m512i left = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i right = _mm512_or_si512(left, _mm512_set1_epi32(8));
  for (int r = 0; r < R; ++r) {
    const __m512 some = (__m512)low[r], others = (__m512)high[r];
    Number* to = out + r * stride;
    Store(to, (Vector)_mm512_permutex2var_ps(some, left, others) * factors[r]);
    Store(to + kLanes, (Vector)_mm512_permutex2var_ps(some, right, others) * factors[r]);
  }
}

template <int... R>
constexpr auto WeightedOf(std::integer_sequence<int, R...>) {
  return std::array{Weighted<R + 1>...};
}

// As below.
void AttendTokens(const Number* tokens, int64_t count, int64_t width, Operands queries, int few,
                  const Number* ahead) {
  auto* turned = reinterpret_cast<Number*>(Scratch<3>(width / kPair * kQueries));
  float* scores = Scratch<4>((count + 2) * kQueries);
  float* weights = Scratch<5>((count + 1) / 2 * kQueries);
  std::memset(turned, 0, width * kQueries * sizeof(Number));
  for (int r = 0; r < few; ++r)
    for (int64_t k = 0; k < width; k += 4)
      std::memcpy(turned + k * kQueries + 4 * r, queries[r] + k, 4 * sizeof(Number));
  AllScores(turned, tokens, count, width, scores, ahead);
  float factors[kQueries];
  Soften(scores, count, factors);  // of an odd count the last row has a partner without weight
  const __m512i paired = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
  for (int64_t m = 0; m < count; m += 2) {
    const __m512 two = (__m512)Load(scores + m * kQueries);
    const Vector pairs = (Vector)_mm512_permutexvar_ps(paired, two);
    Store(reinterpret_cast<Number*>(weights + m / 2 * kQueries), pairs);
  }
  static constexpr auto weighted = WeightedOf(std::make_integer_sequence<int, kQueries>());
  for (int64_t k = 0; k < width; k += kPanel)
    weighted[few - 1](weights, factors, tokens + k, count, width, queries[0] + k, queries.stride,
                      ahead + (count * width + k * count) / 2);
}
#else
// scores [T, 8] of the queries turned [width, 8] and tokens [T, width]. Asks for half as many
// numbers at `ahead` on its way.
template <int T>
void Scores(const float* turned, const float* tokens, int64_t width, float* scores,
            const float* ahead) {
  constexpr int kFew = std::min(kQueries, kLanes), kVectors = kQueries / kFew;
  typedef float Few __attribute__((vector_size(4 * kFew)));
  Few sum[T][kVectors] = {};
  for (int64_t k = 0; k < width; ++k) {
    if (k % kLine == 0)
      for (int t = 0; t < T / 2; ++t) __builtin_prefetch(ahead + t * width + k, 0, 2);
    Few query[kVectors];
    std::memcpy(query, turned + k * kQueries, sizeof(query));
    for (int t = 0; t < T; ++t)
      for (int v = 0; v < kVectors; ++v) sum[t][v] += query[v] * tokens[t * width + k];
  }
  std::memcpy(scores, sum, sizeof(sum));
}

// `few` <= 8 queries over tokens [count, width] as keys and values; the result takes their place.
// Asks for as many numbers at `ahead` on its way.
void AttendTokens(const float* tokens, int64_t count, int64_t width, Operands queries, int few,
                  const float* ahead) {
  const int64_t padded = Stride(count);
  float* turned = Scratch<3>(width * kQueries);
  float* scores = Scratch<4>((count + 1) * kQueries);
  float* weights = Scratch<5>(kQueries * padded);
  std::fill_n(turned, width * kQueries, 0.0f);
  for (int r = 0; r < few; ++r)
    for (int64_t k = 0; k < width; ++k) turned[k * kQueries + r] = queries[r][k];
  AllScores(turned, tokens, count, width, scores, ahead);
  float factors[kQueries];
  Soften(scores, count, factors);
  for (int r = 0; r < few; ++r)
    for (int64_t m = 0; m < count; ++m)
      weights[r * padded + m] = scores[m * kQueries + r] * factors[r];
  for (int r = 0; r < few; ++r) std::fill_n(queries[r], width, 0.0f);
  for (int64_t m = 0; m < count; m += kDepth) {
    const int64_t depth = std::min<int64_t>(kDepth, count - m);
    for (int64_t k = 0; k < width; k += kPanel) {
      const int64_t done = count * width + m * width + k * depth;  // of twice as many
      MultiplyRows(kCounts, few, tokens + m * width + k, width, weights + m, padded, depth,
                   queries[0] + k, queries.stride, ahead + done / 2);
    }
  }
}
#endif

}  // namespace
