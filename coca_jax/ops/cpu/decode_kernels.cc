// The kernels of a decoding step on a CPU; see decode_kernels.py.
//
// All is float32; with COCA_JAX_BFLOAT16 the operands of products with weights and with image
// tokens are bfloat16, in pairs that one instruction multiplies, and their sums float32.
//
// A step has a few rows and hundreds of megabytes of weights, so what counts is to read those once,
// in order, while computing. Each kernel is a residual part of a decoder block: one call from XLA,
// inside which threads go through its phases together.

#include <array>
#include <cmath>
#include <string_view>
#include <utility>

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

constexpr int kPanel = 32;   // columns of a panel
constexpr int kDepth = 128;  // words of a panel, multiplied at a time: 16 KiB
constexpr int kTile = 32;    // rows for which a panel's sums are kept
constexpr float kNormEpsilon = 1e-5f;  // ops.reference.NORM_EPSILON

// Rows and columns whose sums stay in registers.
#if defined(__AVX512F__)
constexpr int kRows = 8, kColumns = 32;
#else
constexpr int kRows = 6, kColumns = 16;
#endif

// Rows of floats. Scratch has them an odd number of lines apart: rows 2^n apart fall into the same
// sets of the cache.
template <typename T>
struct RowsOf {
  T* data;
  int64_t stride;
  T* operator[](int64_t row) const { return data + row * stride; }
};
using Rows = RowsOf<float>;
using Operands = RowsOf<Number>;

constexpr int64_t Panels(int64_t width) { return (width + kPanel - 1) / kPanel; }
constexpr int64_t Stride(int64_t width) { return Panels(width) * kPanel + kLine; }

// Scratch of the calling thread for all that take part.
template <int use>
Rows ScratchRows(int64_t rows, int64_t width) {
  return {Scratch<use>(rows * Stride(width)), Stride(width)};
}

template <int use>
Operands ScratchOperands(int64_t rows, int64_t width) {
  const Rows words = ScratchRows<use>(rows, width / kPair);
  return {reinterpret_cast<Number*>(words.data), words.stride * kPair};
}

// sums [R, kColumns] += x [R, depth] @ weights [depth, kColumns]; words, rows `stride`, `x_stride`
// and `step` apart. Asks for the 128 bytes (both) or 64 bytes at ahead + 32 k for each k on its way.
template <int R, bool both>
void Multiply(const float* weights, int64_t step, const float* x, int64_t x_stride, int64_t depth,
              float* sums, int64_t stride, const float* ahead) {
  constexpr int kVectors = kColumns / kLanes;
  Vector sum[R][kVectors];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Load(sums + r * stride + v * kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(ahead + k * kPanel, 0, 2);
    if (both) __builtin_prefetch(ahead + k * kPanel + kLine, 0, 2);
    Vector weight[kVectors];
    for (int v = 0; v < kVectors; ++v) weight[v] = Load(weights + k * step + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const Vector factor = Broadcast(x + r * x_stride + k);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = AddProduct(sum[r][v], weight[v], factor);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVectors; ++v) Store(sums + r * stride + v * kLanes, sum[r][v]);
}

// The same for any number of rows and a whole panel, in passes.
template <int... R>
void MultiplyRows(std::integer_sequence<int, R...>, int64_t rows, const float* weights,
                  int64_t step, const float* x, int64_t x_stride, int64_t depth, float* sums,
                  int64_t stride, const float* ahead) {
  using Of = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t,
                      const float*);
  static constexpr Of once[] = {Multiply<R + 1, true>...}, again[] = {Multiply<R + 1, false>...};
  const int64_t splits = (rows + kRows - 1) / kRows, passes = splits * (kPanel / kColumns);
  for (int64_t p = 0; p < passes; ++p) {
    const int64_t split = p % splits, column = p / splits * kColumns;
    const int64_t first = split * rows / splits, few = (split + 1) * rows / splits - first;
    // Half of the lines ahead in one pass and half in the next.
    (passes == 1 ? once : again)[few - 1](weights + column, step, x + first * x_stride, x_stride,
                                          depth, sums + first * stride + column, stride,
                                          ahead + (p % 2) * kLine);
  }
}

constexpr auto kCounts = std::make_integer_sequence<int, kRows>();

// A product of a phase: x [rows, depth] @ panels [ceil(width / 32), depth, 32], for each group.
struct Product {
  Operands x;
  int64_t rows, depth, width;
  const float* panels;  // words
  int64_t groups = 1, group_offset = 0;  // of x, from group to group
};

// One phase: finish(row, group, column, sums, columns) gets up to 32 columns of a row at a time.
template <typename Finish>
void Multiply(Member& member, const Product& product, const Finish& finish) {
  const int64_t count = Panels(product.width), depth = product.depth / kPair;
  const int64_t size = depth * kPanel, x_stride = product.x.stride / kPair;
  const int64_t all = product.groups * count;
  // Panels claimed at once: 64 KiB of them.
  const int64_t chunk = std::max<int64_t>(1, 4 * kDepth / depth);
  member.Each((all + chunk - 1) / chunk, [&](int64_t part, int64_t following) {
    float* sums = Scratch<0>(kTile * kPanel);
    const int64_t end = std::min(all, (part + 1) * chunk);
    for (int64_t i = part * chunk; i < end; ++i) {
      const int64_t group = i / count, column = i % count * kPanel;
      const int64_t next = std::min(i + 1 < end ? i + 1 : following * chunk, all - 1);
      const float* panel = product.panels + i * size;
      const float* x = Words(product.x.data + group * product.group_offset);
      const int64_t columns = std::min<int64_t>(kPanel, product.width - column);
      for (int64_t first = 0; first < product.rows; first += kTile) {
        const int64_t rows = std::min<int64_t>(kTile, product.rows - first);
        std::fill_n(sums, rows * kPanel, 0.0f);
        for (int64_t k = 0; k < depth; k += kDepth)
          MultiplyRows(kCounts, rows, panel + k * kPanel, kPanel, x + first * x_stride + k,
                       x_stride, std::min<int64_t>(kDepth, depth - k), sums, kPanel,
                       k + kDepth < depth ? panel + (k + kDepth) * kPanel
                                          : product.panels + next * size);
        for (int64_t r = 0; r < rows; ++r)
          finish(first + r, group, column, sums + r * kPanel, columns);
      }
    }
  });
}

inline float Sum(Vector v) {
  float part[kLanes];
  std::memcpy(part, &v, sizeof(part));
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

// Sum of term(0) ... term(count - 1), vectors, in four sums that need not wait for each other.
template <typename Term>
float Total(int64_t count, const Term& term) {
  Vector sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    for (int s = 0; s < 4; ++s) sums[s] += term(i + s);
  for (; i < count; ++i) sums[0] += term(i);
  return Sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// One phase: rows x [rows, width], standardised, times `scale` plus `shift`; whole vectors.
void Norm(Member& member, const float* x, int64_t rows, int64_t width, const float* scale,
          const float* shift, Operands out) {
  constexpr int64_t kTogether = 16;
  member.Each((rows + kTogether - 1) / kTogether, [&](int64_t part, int64_t) {
    for (int64_t r = part * kTogether; r < std::min(rows, (part + 1) * kTogether); ++r) {
      const auto at = [from = x + r * width](int64_t i) { return Load(from + i * kLanes); };
      const int64_t count = width / kLanes;
      const float mean = Total(count, at) / width;
      const float squares =
          Total(count, [&](int64_t i) { return (at(i) - mean) * (at(i) - mean); });
      const float factor = 1.0f / std::sqrt(squares / width + kNormEpsilon);
      for (int64_t i = 0; i < count; ++i)
        Store(out[r] + i * kLanes, (at(i) - mean) * factor * Load(scale + i * kLanes) +
                                       Load(shift + i * kLanes));
    }
  });
}

// exp(x) for x <= 88, to a few units in the last place; below -87, exp(-87).
inline float Exp(float x) {
  x = std::max(x, -87.0f);
  const float n = std::floor(x * 1.44269504f + 0.5f);
  // ln 2 in two parts, the first of few bits, so that n times it is exact.
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float series = 1.0f / 5040.0f;
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    series = series * r + c;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return series * power;
}

// ops.reference.ACTIVATIONS, by name.
enum class Activation { kGelu, kGeluExact, kRelu, kQuickGelu };

inline float Sigmoid(float x) { return 1.0f / (1.0f + Exp(std::min(-x, 80.0f))); }

// Half of erfc(x / sqrt 2) for x >= 0, to 8e-8: Abramowitz and Stegun 7.1.26.
inline float UpperTail(float x) {
  const float z = x * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
  float series = 1.061405429f;
  for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
    series = series * t + c;
  return 0.5f * t * series * Exp(-z * z);
}

template <Activation kind>
inline float Activate(float x) {
  if (kind == Activation::kRelu) return std::max(x, 0.0f);
  if (kind == Activation::kQuickGelu) return x * Sigmoid(1.702f * x);
  // (1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
  if (kind == Activation::kGelu) return x * Sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
  const float tail = UpperTail(std::fabs(x));
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

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
  for (int64_t m = 0; m < slots; ++m) scores[m] = Exp(scores[m] - highest);
  for (int64_t m = 0; m < slots; ++m) {
    if (mask && !mask[m]) continue;
    total += scores[m];
    const float* value = values + m * kWidth;
    for (int c = 0; c < C; ++c) __builtin_prefetch(value + ahead + c * kLine, 0, 2);
    for (int v = 0; v < kVectors; ++v) sum[v] += scores[m] * Load(value + v * kLanes);
  }
  for (int v = 0; v < kVectors; ++v) Store(out + v * kLanes, sum[v] / total);
}

using AttendOf = void (*)(const float*, const float*, const float*, const bool*, int64_t, int64_t,
                          float*, float*);
constexpr AttendOf kAttend[] = {Attend<1>, Attend<2>, Attend<3>, Attend<4>,
                                Attend<5>, Attend<6>, Attend<7>, Attend<8>};
constexpr int kWidest = 8 * kLine;  // of a head

// x [B, N, D] and what all kernels do with it at first.
struct Input {
  const float *x, *scale, *shift;
  int64_t batch, queries, rows, width;
  Input(Floats& x, Floats& scale, Floats& shift)
      : x(x.typed_data()), scale(scale.typed_data()), shift(shift.typed_data()) {
    const auto dims = x.dimensions();
    batch = dims[0], queries = dims[1], width = dims[2], rows = batch * queries;
  }
};

// Writes sums + bias to rows.
template <typename T>
auto Biased(RowsOf<T> out, const float* bias) {
  return [=](int64_t row, int64_t, int64_t column, const float* sums, int64_t columns) {
    float part[kPanel];
    for (int64_t i = 0; i < columns; ++i) part[i] = sums[i] + bias[column + i];
    Put(out[row] + column, part, columns);
  };
}

// Writes x + sums + bias to y, both [rows, width].
auto Residual(const Input& in, const float* bias, float* y) {
  return [x = in.x, width = in.width, bias, y](int64_t row, int64_t, int64_t column,
                                               const float* sums, int64_t columns) {
    const int64_t at = row * width + column;
    for (int64_t i = 0; i < columns; ++i) y[at + i] = x[at + i] + (sums[i] + bias[column + i]);
  };
}

// Whether panels are of a kernel [depth, width]: [.., width / 32, depth / kPair, 32], and pairs.
bool Fits(Numbers& panels, int64_t depth, int64_t width) {
  const auto dims = panels.dimensions();
  const auto n = dims.size() - (kPair - 1);
  return dims[n - 3] == Panels(width) && dims[n - 2] * kPair == depth && dims[n - 1] == kPanel &&
         (kPair == 1 || dims[n] == kPair);
}

// x + attention over the past. N new tokens an image, whose keys and values go to slots slot ...
// slot + N - 1. key, value [B, H, M, K], in place; mask [B, N, M].
ffi::Error SelfAttention(ffi::ThreadPool pool, Floats x, Floats scale, Floats shift, Numbers qkv,
                         Floats qkv_bias, Numbers out, Floats out_bias,
                         ffi::Buffer<ffi::PRED> mask, ffi::Buffer<ffi::S32> slot, Floats key,
                         Floats value, ffi::Result<Floats> y, ffi::Result<Floats> new_key,
                         ffi::Result<Floats> new_value) {
  const Input in(x, scale, shift);
  const int64_t heads = key.dimensions()[1], slots = key.dimensions()[2];
  const int64_t width = key.dimensions()[3], first = slot.typed_data()[0];
  if (width % kLine || width / kLine > static_cast<int64_t>(std::size(kAttend)) ||
      heads * width != in.width || !Fits(qkv, in.width, 3 * in.width) ||
      !Fits(out, in.width, in.width))
    return ffi::Error::InvalidArgument("self attention: shapes do not fit");
  if (new_key->typed_data() != key.typed_data() || new_value->typed_data() != value.typed_data())
    return ffi::Error::InvalidArgument("self attention: the caches must be in place");
  if (first < 0 || first + in.queries > slots)
    return ffi::Error::InvalidArgument("self attention: no such slot");
  const AttendOf attend = kAttend[width / kLine - 1];
  const Operands normed = ScratchOperands<1>(in.rows, in.width);
  const Rows joint = ScratchRows<2>(in.rows, 3 * in.width);
  float *keys = key.typed_data(), *values = value.typed_data(), *to = y->typed_data();
  const bool* shown = mask.typed_data();
  const float *qkv_panels = Words(Data(qkv)), *qkv_shift = qkv_bias.typed_data();
  const float *out_panels = Words(Data(out)), *out_shift = out_bias.typed_data();
  Together(pool, Panels(in.width), [=](Member& member) {
    Norm(member, in.x, in.rows, in.width, in.scale, in.shift, normed);
    Multiply(member, {normed, in.rows, in.width, 3 * in.width, qkv_panels},
             Biased(joint, qkv_shift));
    member.Each(in.batch * heads, [&](int64_t part, int64_t following) {
      const int64_t b = part / heads, h = part % heads, cache = part * slots * width;
      const int64_t next = std::min(following, in.batch * heads - 1);
      const int64_t ahead = (next - part) * slots * width;
      float* scores = Scratch<0>(slots);
      // Half of it lies in other threads' caches.
      const float* soon = joint[next / heads * in.queries] + next % heads * width;
      for (int64_t i = 0; i < 3 * in.width; i += in.width)
        for (int64_t k = 0; k < width; k += kLine) __builtin_prefetch(soon + i + k, 0, 3);
      for (int64_t n = 0; n < in.queries; ++n) {
        const float* row = joint[b * in.queries + n] + h * width;
        const int64_t at = cache + (first + n) * width;
        std::copy_n(row + in.width, width, keys + at);
        std::copy_n(row + 2 * in.width, width, values + at);
      }
      for (int64_t n = 0; n < in.queries; ++n) {
        const int64_t row = b * in.queries + n;
        float found[kWidest];
        attend(joint[row] + h * width, keys + cache, values + cache, shown + row * slots, slots,
               ahead, scores, found);
        Put(normed[row] + h * width, found, width);
      }
    });
    Multiply(member, {normed, in.rows, in.width, in.width, out_panels},
             Residual(in, out_shift, to));
  });
  return ffi::Error::Success();
}

// x + attention over keys and values [B, H, M, K] of images.
ffi::Error CachedImageAttention(ffi::ThreadPool pool, Floats x, Floats scale, Floats shift,
                                Numbers query, Floats query_bias, Numbers out, Floats out_bias,
                                Floats key, Floats value, ffi::Result<Floats> y) {
  const Input in(x, scale, shift);
  const int64_t heads = key.dimensions()[1], slots = key.dimensions()[2];
  const int64_t width = key.dimensions()[3];
  if (width % kLine || width / kLine > static_cast<int64_t>(std::size(kAttend)) ||
      heads * width != in.width || !Fits(query, in.width, in.width) ||
      !Fits(out, in.width, in.width))
    return ffi::Error::InvalidArgument("cached image attention: shapes do not fit");
  const AttendOf attend = kAttend[width / kLine - 1];
  const Operands normed = ScratchOperands<1>(in.rows, in.width);
  const Rows asked = ScratchRows<2>(in.rows, in.width);
  const float *keys = key.typed_data(), *values = value.typed_data();
  const float *query_panels = Words(Data(query)), *query_shift = query_bias.typed_data();
  const float *out_panels = Words(Data(out)), *out_shift = out_bias.typed_data();
  float* to = y->typed_data();
  Together(pool, Panels(in.width), [=](Member& member) {
    Norm(member, in.x, in.rows, in.width, in.scale, in.shift, normed);
    Multiply(member, {normed, in.rows, in.width, in.width, query_panels},
             Biased(asked, query_shift));
    member.Each(in.batch * heads, [&](int64_t part, int64_t following) {
      const int64_t b = part / heads, h = part % heads, cache = part * slots * width;
      const int64_t ahead = (std::min(following, in.batch * heads - 1) - part) * slots * width;
      for (int64_t n = 0; n < in.queries; ++n) {
        const int64_t row = b * in.queries + n;
        float found[kWidest];
        attend(asked[row] + h * width, keys + cache, values + cache, nullptr, slots, ahead,
               Scratch<0>(slots), found);
        Put(normed[row] + h * width, found, width);
      }
    });
    Multiply(member, {normed, in.rows, in.width, in.width, out_panels},
             Residual(in, out_shift, to));
  });
  return ffi::Error::Success();
}

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
  // Of an odd count the last row has a partner without weight.
  std::fill_n(scores + count * kQueries, kQueries, -INFINITY);
  float highest[2 * kQueries], total[2 * kQueries] = {}, factors[kQueries];
  std::fill_n(highest, 2 * kQueries, -INFINITY);
  for (int64_t m = 0; m < count; m += 2)
    for (int i = 0; i < 2 * kQueries; ++i)
      highest[i] = std::max(highest[i], scores[m * kQueries + i]);
  for (int r = 0; r < kQueries; ++r)
    highest[r] = highest[r + kQueries] = std::max(highest[r], highest[r + kQueries]);
  const __m512i paired = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
  for (int64_t m = 0; m < count; m += 2) {
    float* two = scores + m * kQueries;
    for (int i = 0; i < 2 * kQueries; ++i) {
      two[i] = Exp(two[i] - highest[i]);
      total[i] += two[i];
    }
    const Vector pairs = (Vector)_mm512_permutexvar_ps(paired, (__m512)Load(two));
    Store(reinterpret_cast<Number*>(weights + m / 2 * kQueries), pairs);
  }
  for (int r = 0; r < kQueries; ++r) factors[r] = 1.0f / (total[r] + total[r + kQueries]);
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
  float* scores = Scratch<4>(count * kQueries);
  float* weights = Scratch<5>(kQueries * padded);
  std::fill_n(turned, width * kQueries, 0.0f);
  for (int r = 0; r < few; ++r)
    for (int64_t k = 0; k < width; ++k) turned[k * kQueries + r] = queries[r][k];
  AllScores(turned, tokens, count, width, scores, ahead);
  float highest[kQueries], total[kQueries] = {};
  std::fill_n(highest, kQueries, -INFINITY);
  for (int64_t m = 0; m < count; ++m)
    for (int r = 0; r < kQueries; ++r)
      highest[r] = std::max(highest[r], scores[m * kQueries + r]);
  for (int64_t m = 0; m < count; ++m)
    for (int r = 0; r < kQueries; ++r) {
      float& score = scores[m * kQueries + r];
      score = Exp(score - highest[r]);
      total[r] += score;
    }
  for (int r = 0; r < few; ++r)
    for (int64_t m = 0; m < count; ++m) weights[r * padded + m] = scores[m * kQueries + r] / total[r];
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

// x + attention over image tokens [B, Q, D'] that all heads and layers share, D' = D in whole
// panels. in_keys [H, D' / 32, K, 32] takes a query to the tokens' space, from_values
// [H, ceil(K / 32), D', 32] takes what it finds back.
ffi::Error ImageAttention(ffi::ThreadPool pool, Floats x, Floats scale, Floats shift, Numbers query,
                          Floats query_bias, Numbers out, Floats out_bias, Numbers in_keys,
                          Numbers from_values, Floats value_bias, Numbers tokens,
                          ffi::Result<Floats> y) {
  const Input in(x, scale, shift);
  const int64_t heads = in_keys.dimensions()[0], width = in.width / heads;
  const int64_t count = tokens.dimensions()[1], wide = tokens.dimensions()[2];
  if (wide != Panels(in.width) * kPanel || !Fits(query, in.width, in.width) ||
      !Fits(in_keys, width, wide) || !Fits(from_values, wide, width) ||
      !Fits(out, in.width, in.width))
    return ffi::Error::InvalidArgument("image attention: shapes do not fit");
  const Operands normed = ScratchOperands<1>(in.rows, in.width);
  const Operands asked = ScratchOperands<2>(in.rows, in.width);
  const Operands looking = ScratchOperands<6>(in.rows * heads, wide);
  const float *query_panels = Words(Data(query)), *query_shift = query_bias.typed_data();
  const float *key_panels = Words(Data(in_keys)), *value_panels = Words(Data(from_values));
  const float *out_panels = Words(Data(out)), *out_shift = out_bias.typed_data();
  const Number *image = Data(tokens), *after = Data(from_values);
  const float* value_shift = value_bias.typed_data();
  float* to = y->typed_data();
  // An image's rows stay together, to share its tokens, unless there are more threads than images.
  const int64_t each = in.queries * heads;
  const int64_t splits = std::max((each + kQueries - 1) / kQueries,
                                  std::min((pool.num_threads() + in.batch - 1) / in.batch, each));
  Together(pool, Panels(in.width), [=](Member& member) {
    Norm(member, in.x, in.rows, in.width, in.scale, in.shift, normed);
    Multiply(member, {normed, in.rows, in.width, in.width, query_panels},
             Biased(asked, query_shift));
    Multiply(member, {asked, in.rows, width, wide, key_panels, heads, width},
             [&](int64_t row, int64_t head, int64_t column, const float* sums, int64_t columns) {
               Put(looking[row * heads + head] + column, sums, columns);
             });
    member.Each(in.batch * splits, [&](int64_t part, int64_t following) {
      const int64_t b = part / splits, split = part % splits, first = split * each / splits;
      const int64_t next = following / splits;
      AttendTokens(image + b * count * wide, count, wide,
                   {looking[b * each + first], looking.stride},
                   static_cast<int>((split + 1) * each / splits - first),
                   next < in.batch ? image + next * count * wide : after);
    });
    const Operands found{looking.data, heads * looking.stride};
    Multiply(member, {found, in.rows, wide, width, value_panels, heads, looking.stride},
             [&](int64_t row, int64_t head, int64_t column, const float* sums, int64_t columns) {
               const int64_t at = head * width + column;
               float part[kPanel];
               for (int64_t i = 0; i < columns; ++i) part[i] = sums[i] + value_shift[at + i];
               Put(asked[row] + at, part, columns);
             });
    Multiply(member, {asked, in.rows, in.width, in.width, out_panels},
             Residual(in, out_shift, to));
  });
  return ffi::Error::Success();
}

template <Activation kind>
void Mlp(ffi::ThreadPool& pool, const Input& in, int64_t hidden, const float* up,
         const float* up_bias, const float* down, const float* down_bias, float* y) {
  const Operands normed = ScratchOperands<1>(in.rows, in.width);
  const Operands inner = ScratchOperands<2>(in.rows, hidden);
  Together(pool, Panels(in.width), [=](Member& member) {
    Norm(member, in.x, in.rows, in.width, in.scale, in.shift, normed);
    Multiply(member, {normed, in.rows, in.width, hidden, up},
             [&](int64_t row, int64_t, int64_t column, const float* sums, int64_t columns) {
               float part[kPanel];
               for (int64_t i = 0; i < columns; ++i)
                 part[i] = Activate<kind>(sums[i] + up_bias[column + i]);
               Put(inner[row] + column, part, columns);
             });
    Multiply(member, {inner, in.rows, hidden, in.width, down}, Residual(in, down_bias, y));
  });
}

constexpr char kActivation[] = "activation";

// x + the MLP of width up_bias.size.
ffi::Error ResidualMlp(ffi::ThreadPool pool, Floats x, Floats scale, Floats shift, Numbers up,
                       Floats up_bias, Numbers down, Floats down_bias, ffi::Result<Floats> y,
                       ffi::Attr<std::string_view, kActivation> activation) {
  const Input in(x, scale, shift);
  const int64_t hidden = up_bias.dimensions()[0];
  if (!Fits(up, in.width, hidden) || !Fits(down, hidden, in.width))
    return ffi::Error::InvalidArgument("mlp: shapes do not fit");
  const auto run = [&](auto kind) {
    Mlp<kind()>(pool, in, hidden, Words(Data(up)), up_bias.typed_data(), Words(Data(down)),
                down_bias.typed_data(), y->typed_data());
    return ffi::Error::Success();
  };
  if (*activation == "gelu") return run(std::integral_constant<Activation, Activation::kGelu>());
  if (*activation == "gelu_exact")
    return run(std::integral_constant<Activation, Activation::kGeluExact>());
  if (*activation == "relu") return run(std::integral_constant<Activation, Activation::kRelu>());
  if (*activation == "quick_gelu")
    return run(std::integral_constant<Activation, Activation::kQuickGelu>());
  return ffi::Error::InvalidArgument("mlp: no such activation");
}

// Logits [B, N, V] of states x before the last norm, and their log-sum-exp [B, N].
ffi::Error Logits(ffi::ThreadPool pool, Floats x, Floats scale, Floats shift, Numbers panels,
                  Floats bias, ffi::Result<Floats> y, ffi::Result<Floats> log_sum_exp) {
  const Input in(x, scale, shift);
  const int64_t vocabulary = bias.dimensions()[0];
  if (!Fits(panels, in.width, vocabulary))
    return ffi::Error::InvalidArgument("logits: shapes do not fit");
  const Operands normed = ScratchOperands<1>(in.rows, in.width);
  const Rows out{y->typed_data(), vocabulary};
  const float *weights = Words(Data(panels)), *add = bias.typed_data();
  float* sums = log_sum_exp->typed_data();
  Together(pool, Panels(vocabulary), [=](Member& member) {
    Norm(member, in.x, in.rows, in.width, in.scale, in.shift, normed);
    Multiply(member, {normed, in.rows, in.width, vocabulary, weights}, Biased(out, add));
    member.Each(in.rows, [&](int64_t row, int64_t) {
      const float* logits = out[row];
      float highest = -INFINITY, total = 0.0f;
      for (int64_t i = 0; i < vocabulary; ++i) highest = std::max(highest, logits[i]);
      for (int64_t i = 0; i < vocabulary; ++i) total += Exp(logits[i] - highest);
      sums[row] = highest + std::log(total);
    });
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SYMBOL(self_attention), SelfAttention);
XLA_FFI_DEFINE_HANDLER_SYMBOL(SYMBOL(image_attention), ImageAttention);
XLA_FFI_DEFINE_HANDLER_SYMBOL(SYMBOL(cached_image_attention), CachedImageAttention);
XLA_FFI_DEFINE_HANDLER_SYMBOL(SYMBOL(mlp), ResidualMlp);
XLA_FFI_DEFINE_HANDLER_SYMBOL(SYMBOL(logits), Logits);
