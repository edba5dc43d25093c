// The two kernels of a decoding step on a CPU, float32; see cpu_kernels.py.
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

// Rows x [R, depth] as [depth, R].
template <int R>
void Transpose(const float* x, int64_t depth, float* out) {
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    float tile[R][kLanes];  // rows lie 2^n apart, in the same lines of the cache: copy them first
    for (int r = 0; r < R; ++r) std::memcpy(tile[r], x + r * depth + k, sizeof(tile[r]));
    for (int j = 0; j < kLanes; ++j)
      for (int r = 0; r < R; ++r) out[(k + j) * R + r] = tile[r][j];
  }
  for (; k < depth; ++k)
    for (int r = 0; r < R; ++r) out[k * R + r] = x[r * depth + k];
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

using PanelOf = void (*)(const float*, const float*, int64_t, float*, int64_t, int64_t);
using TransposeOf = void (*)(const float*, int64_t, float*);

template <int... R>
PanelOf PanelFor(int rows, std::integer_sequence<int, R...>) {
  static constexpr PanelOf all[] = {Panel<R + 1>...};
  return all[rows - 1];
}

template <int... R>
TransposeOf TransposeFor(int rows, std::integer_sequence<int, R...>) {
  static constexpr TransposeOf all[] = {Transpose<R + 1>...};
  return all[rows - 1];
}

// x [rows, depth], panels [ceil(width / 16), depth, 16] -> y [rows, width].
ffi::Error Product(ffi::ThreadPool pool, Floats x, Floats panels, ffi::Result<Floats> y) {
  constexpr auto counts = std::make_integer_sequence<int, kRows>();
  const int64_t rows = x.dimensions()[0], depth = x.dimensions()[1];
  const int64_t count = panels.dimensions()[0], width = y->dimensions()[1];
  if (panels.dimensions()[1] != depth || panels.dimensions()[2] != kLanes ||
      count != (width + kLanes - 1) / kLanes)
    return ffi::Error::InvalidArgument("product: x and panels do not fit");
  static thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < rows * depth) buffer.resize(rows * depth);
  const float* from = x.typed_data();
  const float* weights = panels.typed_data();
  float* turned = buffer.data();
  float* out = y->typed_data();
  const auto group = [rows](int64_t first) {
    return static_cast<int>(std::min<int64_t>(kRows, rows - first));
  };
  for (int64_t r = 0; r < rows; r += kRows)
    TransposeFor(group(r), counts)(from + r * depth, depth, turned + r * depth);
  const int64_t parts = std::min<int64_t>(count, 4 * pool.num_threads());
  Parallel(pool, parts, [&](int64_t part) {
    for (int64_t p = part * count / parts; p < (part + 1) * count / parts; ++p)
      for (int64_t r = 0; r < rows; r += kRows)
        PanelFor(group(r), counts)(weights + p * depth * kLanes, turned + r * depth, depth,
                                   out + r * width + p * kLanes, width,
                                   std::min<int64_t>(kLanes, width - p * kLanes));
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
    static thread_local std::vector<float> scores;
    if (static_cast<int64_t>(scores.size()) < slots) scores.resize(slots);
    const int64_t b = part / heads, h = part % heads;
    for (int64_t n = 0; n < queries; ++n)
      attend(q + (part * queries + n) * width, k + part * slots * width, v + part * slots * width,
             shown + (b * queries + n) * slots, slots, scores.data(),
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
