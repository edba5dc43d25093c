// The kernels of a decoding step on a CPU, float32; see cpu_kernels.py.
//
// A step has a few rows and hundreds of megabytes of weights and keys, so what counts is to read
// those once, in order, while computing. Vectors are of 16 floats whatever the processor has; the
// compiler splits them.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;

namespace {

constexpr int kLanes = 16;
typedef float Vector __attribute__((vector_size(4 * kLanes)));

// Rows whose sums stay in registers.
#ifdef __AVX512F__
constexpr int kRows = 16;
#else
constexpr int kRows = 6;
#endif

// Vectors ahead of use that are asked for: memory's latency at its full rate, several times over.
constexpr int kAhead = 256;

inline Vector Load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

// Calls work(0) ... work(count - 1), each once, on this thread and on idle ones of the pool. Parts
// are claimed one by one and this thread claims too, so a pool that is busy (with callers of this
// function, even) costs speed but cannot block.
template <typename Work>
void Parallel(ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  // A helper that starts late finds no part left, and must touch nothing but `shared`.
  auto claim = [shared, count, &work] {
    for (int64_t part; (part = shared->next.fetch_add(1)) < count;) {
      work(part);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    auto helper = claim;
    pool.Schedule(std::move(helper));
  }
  claim();
  while (shared->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

// Rows x [R, depth], `stride` apart, as [depth, R].
template <int R>
void Transpose(const float* x, int64_t stride, int64_t depth, float* out) {
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    float tile[R][kLanes];  // rows lie 2^n apart, in the same lines of the cache: copy them first
    for (int r = 0; r < R; ++r) std::memcpy(tile[r], x + r * stride + k, sizeof(tile[r]));
    for (int j = 0; j < kLanes; ++j)
      for (int r = 0; r < R; ++r) out[(k + j) * R + r] = tile[r][j];
  }
  for (; k < depth; ++k)
    for (int r = 0; r < R; ++r) out[k * R + r] = x[r * stride + k];
}

// y [R, columns <= 16], rows `stride` apart = x [depth, R]^T @ panel [depth, 16].
template <int R>
void Panel(const float* panel, const float* x, int64_t depth, float* y, int64_t stride,
           int64_t columns) {
  Vector sum[R] = {};
  for (int64_t k = 0; k < depth; ++k) {
    __builtin_prefetch(panel + (k + kAhead) * kLanes, 0, 2);
    const Vector weights = Load(panel + k * kLanes);
    for (int r = 0; r < R; ++r) sum[r] += weights * x[k * R + r];
  }
  for (int r = 0; r < R; ++r) std::memcpy(y + r * stride, &sum[r], 4 * columns);
}

// Both for 1 to kRows rows.
template <int... R>
void Transpose(int rows, std::integer_sequence<int, R...>, const float* x, int64_t stride,
               int64_t depth, float* out) {
  using Of = void (*)(const float*, int64_t, int64_t, float*);
  static constexpr Of all[] = {Transpose<R + 1>...};
  all[rows - 1](x, stride, depth, out);
}

template <int... R>
void Panel(int rows, std::integer_sequence<int, R...>, const float* panel, const float* x,
           int64_t depth, float* y, int64_t stride, int64_t columns) {
  using Of = void (*)(const float*, const float*, int64_t, float*, int64_t, int64_t);
  static constexpr Of all[] = {Panel<R + 1>...};
  all[rows - 1](panel, x, depth, y, stride, columns);
}

constexpr auto kCounts = std::make_integer_sequence<int, kRows>();

// At least `size` floats of this thread's own, one buffer for each `use`.
template <int use>
float* Scratch(int64_t size) {
  static thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

// x [rows, G, depth], panels [G, ceil(width / 16), depth, 16] -> y [rows, G, width].
ffi::Error Product(ffi::ThreadPool pool, Floats x, Floats panels, ffi::Result<Floats> y) {
  const int64_t rows = x.dimensions()[0], groups = x.dimensions()[1], depth = x.dimensions()[2];
  const int64_t count = panels.dimensions()[1], width = y->dimensions()[2];
  if (panels.dimensions()[0] != groups || panels.dimensions()[2] != depth ||
      count != (width + kLanes - 1) / kLanes)
    return ffi::Error::InvalidArgument("product: x and panels do not fit");
  const float* from = x.typed_data();
  const float* weights = panels.typed_data();
  float* turned = Scratch<0>(rows * groups * depth);
  float* out = y->typed_data();
  const auto few = [rows](int64_t first) {
    return static_cast<int>(std::min<int64_t>(kRows, rows - first));
  };
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t r = 0; r < rows; r += kRows)
      Transpose(few(r), kCounts, from + (r * groups + g) * depth, groups * depth, depth,
                turned + (g * rows + r) * depth);
  const int64_t all = groups * count, parts = std::min<int64_t>(all, 4 * pool.num_threads());
  Parallel(pool, parts, [&](int64_t part) {
    for (int64_t i = part * all / parts; i < (part + 1) * all / parts; ++i) {
      const int64_t g = i / count, p = i % count;
      for (int64_t r = 0; r < rows; r += kRows)
        Panel(few(r), kCounts, weights + i * depth * kLanes, turned + (g * rows + r) * depth,
              depth, out + (r * groups + g) * width + p * kLanes, groups * width,
              std::min<int64_t>(kLanes, width - p * kLanes));
    }
  });
  return ffi::Error::Success();
}

// exp(x) for x <= 0 to a few units in the last place; below -87, exp(-87).
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

inline float Sum(Vector v) {
  float part[kLanes];
  std::memcpy(part, &v, sizeof(part));
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

// One query [16 C] over the keys and values [.., 16 C] of the slots that `mask` shows.
template <int C>
void Attend(const float* query, const float* keys, const float* values, const bool* mask,
            int64_t slots, float* scores, float* out) {
  constexpr int kWidth = C * kLanes;
  Vector q[C], sum[C] = {};
  for (int c = 0; c < C; ++c) q[c] = Load(query + c * kLanes);
  float highest = -INFINITY, total = 0.0f;
  for (int64_t m = 0; m < slots; ++m) {
    scores[m] = -INFINITY;
    if (!mask[m]) continue;
    const float* key = keys + m * kWidth;
    Vector dot = {};
    for (int c = 0; c < C; ++c) {
      __builtin_prefetch(key + 8 * kWidth + c * kLanes, 0, 2);
      dot += q[c] * Load(key + c * kLanes);
    }
    scores[m] = Sum(dot);
    highest = std::max(highest, scores[m]);
  }
  for (int64_t m = 0; m < slots; ++m) scores[m] = Exp(scores[m] - highest);
  for (int64_t m = 0; m < slots; ++m) {
    if (!mask[m]) continue;
    total += scores[m];
    const float* value = values + m * kWidth;
    for (int c = 0; c < C; ++c) {
      __builtin_prefetch(value + 8 * kWidth + c * kLanes, 0, 2);
      sum[c] += scores[m] * Load(value + c * kLanes);
    }
  }
  for (int c = 0; c < C; ++c) {
    sum[c] /= total;
    std::memcpy(out + c * kLanes, &sum[c], sizeof(sum[c]));
  }
}

// Rows [N, D] of queries over image tokens that all heads and layers share.
// query [B, N, D], tokens [B, ceil(Q / 16), D, 16], channels [B, ceil(D / 16), Q, 16] -> [B, N, D].
ffi::Error ImageAttention(ffi::ThreadPool pool, Floats query, Floats tokens, Floats channels,
                          ffi::Result<Floats> out) {
  const int64_t batch = query.dimensions()[0], rows = query.dimensions()[1];
  const int64_t width = query.dimensions()[2], count = channels.dimensions()[2];
  const int64_t token_panels = tokens.dimensions()[1], channel_panels = channels.dimensions()[1];
  if (tokens.dimensions()[2] != width || token_panels != (count + kLanes - 1) / kLanes ||
      channel_panels != (width + kLanes - 1) / kLanes)
    return ffi::Error::InvalidArgument("image attention: query and tokens do not fit");
  // An image's rows stay together, to share its tokens, unless there are more threads than images.
  const int64_t splits = std::max((rows + kRows - 1) / kRows,
                                  std::min((pool.num_threads() + batch - 1) / batch, rows));
  const float* q = query.typed_data();
  const float* by_token = tokens.typed_data();
  const float* by_channel = channels.typed_data();
  float* to = out->typed_data();
  Parallel(pool, batch * splits, [&](int64_t part) {
    const int64_t b = part / splits, split = part % splits;
    const int64_t first = split * rows / splits;
    const int few = static_cast<int>((split + 1) * rows / splits - first);
    const int64_t padded = token_panels * kLanes, row = (b * rows + first) * width;
    float* turned = Scratch<1>(few * std::max(width, count));
    float* scores = Scratch<2>(few * padded);
    Transpose(few, kCounts, q + row, width, width, turned);
    for (int64_t p = 0; p < token_panels; ++p)
      Panel(few, kCounts, by_token + (b * token_panels + p) * width * kLanes, turned, width,
            scores + p * kLanes, padded, kLanes);
    for (int r = 0; r < few; ++r) {
      float* score = scores + r * padded;
      const float highest = *std::max_element(score, score + count);
      float total = 0.0f;
      for (int64_t m = 0; m < count; ++m) score[m] = Exp(score[m] - highest);
      for (int64_t m = 0; m < count; ++m) total += score[m];
      for (int64_t m = 0; m < count; ++m) score[m] /= total;
    }
    Transpose(few, kCounts, scores, padded, count, turned);
    for (int64_t p = 0; p < channel_panels; ++p)
      Panel(few, kCounts, by_channel + (b * channel_panels + p) * count * kLanes, turned, count,
            to + row + p * kLanes, width, std::min<int64_t>(kLanes, width - p * kLanes));
  });
  return ffi::Error::Success();
}

using AttendOf = void (*)(const float*, const float*, const float*, const bool*, int64_t, float*,
                          float*);
constexpr AttendOf kAttend[] = {Attend<1>, Attend<2>, Attend<3>, Attend<4>,
                                Attend<5>, Attend<6>, Attend<7>, Attend<8>};

// query [B, H, N, K], key and value [B, H, M, K], mask [B, N, M] -> [B, N, H, K].
ffi::Error Attention(ffi::ThreadPool pool, Floats query, Floats key, Floats value,
                     ffi::Buffer<ffi::PRED> mask, ffi::Result<Floats> out) {
  const auto dims = query.dimensions();
  const int64_t batch = dims[0], heads = dims[1], queries = dims[2], width = dims[3];
  const int64_t slots = key.dimensions()[2];
  if (width % kLanes || width / kLanes > static_cast<int64_t>(std::size(kAttend)))
    return ffi::Error::InvalidArgument("attention: head width");
  const AttendOf attend = kAttend[width / kLanes - 1];
  const float *q = query.typed_data(), *k = key.typed_data(), *v = value.typed_data();
  const bool* shown = mask.typed_data();
  float* to = out->typed_data();
  Parallel(pool, batch * heads, [&](int64_t part) {
    float* scores = Scratch<2>(slots);
    const int64_t b = part / heads, h = part % heads;
    for (int64_t n = 0; n < queries; ++n)
      attend(q + (part * queries + n) * width, k + part * slots * width, v + part * slots * width,
             shown + (b * queries + n) * slots, slots, scores,
             to + ((b * queries + n) * heads + h) * width);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(coca_jax_product, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(coca_jax_attention, Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(coca_jax_image_attention, ImageAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>());
