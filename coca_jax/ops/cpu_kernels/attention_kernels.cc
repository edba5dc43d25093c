// Softmax attention for training on a CPU, forward and backward, float32; see attention_kernels.py.
//
// One head of one example at a time, and some queries of it together, a vector of them side by side:
// scores and weights, a row for each key, stay in the first two levels of cache, and heads are read
// and written where they lie, side by side in a row. The backward pass weighs anew, which costs less
// than to keep the weights.

#include <limits>

#include "registers.h"

namespace {

constexpr int64_t kQueries = 64;  // whose weights exist at a time
constexpr float kLowest = std::numeric_limits<float>::lowest();

template <int use>
Block ScratchBlock(int64_t rows, int64_t columns) {
  return {Scratch<use>(rows * Whole(columns)), Whole(columns)};
}

// out [rows, whole lines] = (fresh: 0, or its own) + x [rows, depth] @ w [depth, whole lines].
void Multiply(Matrix x, Block w, int64_t rows, int64_t depth, bool fresh, Block out) {
  MultiplyRows(x, w, rows, depth, out.row, [=](int64_t r, int64_t c, Vector sum) {
    float* to = out.data + r * out.row + c;
    Store(to, fresh ? sum : Load(to) + sum);
  });
}

// Copies x [rows, columns] to rows of whole lines, zeros behind.
void Copy(Matrix x, int64_t rows, int64_t columns, Block to) {
  const int64_t vectors = columns / kLanes * kLanes;
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = x.data + r * x.row;
    float* out = to.data + r * to.row;
    for (int64_t i = 0; i < vectors; i += kLanes) Store(out + i, Load(from + i));
    for (int64_t i = vectors; i < to.row; ++i) out[i] = i < columns ? from[i] : 0.0f;
  }
}

// Rows of whole lines back to where heads lie side by side.
void CopyBack(Block from, int64_t rows, int64_t columns, float* to, int64_t row) {
  const int64_t vectors = columns / kLanes * kLanes;
  for (int64_t r = 0; r < rows; ++r) {
    const float* x = from.data + r * from.row;
    float* out = to + r * row;
    for (int64_t i = 0; i < vectors; i += kLanes) Store(out + i, Load(x + i));
    for (int64_t i = vectors; i < columns; ++i) out[i] = x[i];
  }
}

struct Attention {
  const float *query, *key, *value;  // [B, N, D], [B, M, D], [B, M, D]
  const bool* mask;                  // [B or 1, 1, N or 1, M or 1]; null: all are shown
  int64_t batch, queries, keys, width, heads, head;
  int64_t mask_batch, mask_query, mask_key;  // from one to the next; 0: the same for all
  float scale;

  Attention(Floats& q, Floats& k, Floats& v, ffi::Buffer<ffi::PRED>& m, int64_t heads)
      : query(q.typed_data()), key(k.typed_data()), value(v.typed_data()), mask(m.typed_data()),
        batch(q.dimensions()[0]), queries(q.dimensions()[1]), keys(k.dimensions()[1]),
        width(q.dimensions()[2]), heads(heads), head(width / heads) {
    const auto shape = m.dimensions();
    mask_batch = shape[0] == 1 ? 0 : shape[2] * shape[3];
    mask_query = shape[2] == 1 ? 0 : shape[3];
    mask_key = shape[3] == 1 ? 0 : 1;
    if (m.element_count() == 1 && *mask) mask = nullptr;
    scale = 1.0f / std::sqrt(static_cast<float>(head));
  }

  // Writes `value` over what the mask hides, in rows of queries from `first` on.
  void Hide(int64_t b, int64_t first, int64_t count, float value, Block rows) const {
    if (!mask) return;
    const bool* shown = mask + b * mask_batch + first * mask_query;
    for (int64_t m = 0; m < keys; ++m, shown += mask_key) {
      float* row = rows.data + m * rows.row;
      if (!mask_query) {
        if (!*shown) std::fill_n(row, count, value);
        continue;
      }
      int32_t line[kQueries];  // side by side, so that they are used as vectors
      for (int64_t n = 0; n < count; ++n) line[n] = shown[n * mask_query];
      for (int64_t n = 0; n < count; ++n) row[n] = line[n] ? row[n] : value;
    }
  }
  int64_t Queries(int64_t b, int64_t h) const { return b * queries * width + h * head; }
  int64_t Keys(int64_t b, int64_t h) const { return b * keys * width + h * head; }
};

// The weights [M, count] of some queries from `first` on, which are given turned, [head, count]: of
// each query the sum is 1. What is hidden has the lowest score there is, not none: where all is,
// weights are equal.
void Weigh(const Attention& a, int64_t b, int64_t first, int64_t count, Matrix keys, Block queries,
           Block weights) {
  Multiply(keys, queries, a.keys, a.head, true, weights);
  for (int64_t i = 0; i < a.keys * weights.row; i += kLanes)
    Store(weights.data + i, Load(weights.data + i) * a.scale);
  a.Hide(b, first, count, kLowest, weights);
  for (int64_t n = 0; n < weights.row; n += kLanes) {
    float* column = weights.data + n;
    Vector highest = Load(column), total = {};
    for (int64_t m = 1; m < a.keys; ++m) {
      const Vector next = Load(column + m * weights.row);
      highest = next > highest ? next : highest;
    }
    for (int64_t m = 0; m < a.keys; ++m) {
      const Vector weight = Exp(Load(column + m * weights.row) - highest);
      Store(column + m * weights.row, weight);
      total += weight;
    }
    const Vector share = 1.0f / total;
    for (int64_t m = 0; m < a.keys; ++m)
      Store(column + m * weights.row, Load(column + m * weights.row) * share);
  }
}

// From gradients of weights [M, count] to those of scores, in place.
void ToScores(const Attention& a, Block weights, Block gradients) {
  for (int64_t n = 0; n < weights.row; n += kLanes) {
    Vector sum = {};
    for (int64_t m = 0; m < a.keys; ++m)
      sum += Load(weights.data + m * weights.row + n) * Load(gradients.data + m * weights.row + n);
    for (int64_t m = 0; m < a.keys; ++m) {
      const Vector weight = Load(weights.data + m * weights.row + n) * a.scale;
      float* gradient = gradients.data + m * weights.row + n;
      Store(gradient, weight * (Load(gradient) - sum));
    }
  }
}

// The result of a head of an example: weights @ values.
void Forward(const Attention& a, int64_t b, int64_t h, float* out) {
  const Matrix key{a.key + a.Keys(b, h), a.width}, value{a.value + a.Keys(b, h), a.width};
  const Block values = ScratchBlock<0>(a.keys, a.head);
  Copy(value, a.keys, a.head, values);
  for (int64_t n = 0; n < a.queries; n += kQueries) {
    const int64_t count = std::min(kQueries, a.queries - n), at = a.Queries(b, h) + n * a.width;
    const Block queries = ScratchBlock<1>(a.head, count), weights = ScratchBlock<2>(a.keys, count);
    const Block some = ScratchBlock<3>(count, a.head);
    CopyTurned({a.query + at, a.width}, count, a.head, queries);
    Weigh(a, b, n, count, key, queries, weights);
    Multiply(Matrix(weights).Turned(), values, count, a.keys, true, some);
    CopyBack(some, count, a.head, out + at, a.width);
  }
}

// The gradients of a head of an example. With weights P, result O = P V and scores S:
// dV = P^T dO, dP = dO V^T, dS = P (dP - the query's sum of P dP), dQ = dS K, dK = dS^T Q.
void Backward(const Attention& a, int64_t b, int64_t h, const float* g, float* dq, float* dk,
              float* dv) {
  const Matrix key{a.key + a.Keys(b, h), a.width}, value{a.value + a.Keys(b, h), a.width};
  const Block keys = ScratchBlock<0>(a.keys, a.head);
  const Block of_keys = ScratchBlock<1>(a.keys, a.head), of_values = ScratchBlock<2>(a.keys, a.head);
  Copy(key, a.keys, a.head, keys);
  for (int64_t n = 0; n < a.queries; n += kQueries) {
    const int64_t count = std::min(kQueries, a.queries - n), at = a.Queries(b, h) + n * a.width;
    const Matrix query{a.query + at, a.width}, from{g + at, a.width};
    const Block queries = ScratchBlock<3>(count, a.head), given = ScratchBlock<4>(count, a.head);
    const Block turned = ScratchBlock<5>(a.head, count);
    const Block weights = ScratchBlock<6>(a.keys, count), scores = ScratchBlock<7>(a.keys, count);
    const Block some = ScratchBlock<8>(count, a.head);
    Copy(query, count, a.head, queries);
    Copy(from, count, a.head, given);
    CopyTurned(query, count, a.head, turned);
    Weigh(a, b, n, count, key, turned, weights);
    Multiply(weights, given, a.keys, count, n == 0, of_values);
    CopyTurned(from, count, a.head, turned);
    Multiply(value, turned, a.keys, a.head, true, scores);
    ToScores(a, weights, scores);
    a.Hide(b, n, count, 0.0f, scores);
    Multiply(Matrix(scores).Turned(), keys, count, a.keys, true, some);
    CopyBack(some, count, a.head, dq + at, a.width);
    Multiply(scores, queries, a.keys, count, n == 0, of_keys);
  }
  CopyBack(of_keys, a.keys, a.head, dk + a.Keys(b, h), a.width);
  CopyBack(of_values, a.keys, a.head, dv + a.Keys(b, h), a.width);
}

// Calls work(b, h) for each head of each example, on the threads of the pool.
template <typename Work>
void EachHead(ffi::ThreadPool& pool, const Attention& a, const Work& work) {
  const int64_t parts = a.batch * a.heads, heads = a.heads;
  Together(pool, parts, [=](Member& member) {
    member.Each(parts, [&](int64_t part, int64_t) { work(part / heads, part % heads); });
  });
}

ffi::Error Result(ffi::ThreadPool pool, Floats query, Floats key, Floats value,
                  ffi::Buffer<ffi::PRED> mask, int64_t heads, ffi::Result<Floats> out) {
  const Attention a(query, key, value, mask, heads);
  EachHead(pool, a, [a, to = out->typed_data()](int64_t b, int64_t h) { Forward(a, b, h, to); });
  return ffi::Error::Success();
}

ffi::Error Gradients(ffi::ThreadPool pool, Floats query, Floats key, Floats value,
                     ffi::Buffer<ffi::PRED> mask, Floats g, int64_t heads, ffi::Result<Floats> dq,
                     ffi::Result<Floats> dk, ffi::Result<Floats> dv) {
  const Attention a(query, key, value, mask, heads);
  EachHead(pool, a,
           [a, from = g.typed_data(), dq = dq->typed_data(), dk = dk->typed_data(),
            dv = dv->typed_data()](int64_t b, int64_t h) { Backward(a, b, h, from, dq, dk, dv); });
  return ffi::Error::Success();
}

constexpr char kHeads[] = "heads";

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(coca_jax_attention, Result,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Attr<int64_t>(kHeads)
                                  .Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(coca_jax_attention_gradients, Gradients,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<Floats>()
                                  .Attr<int64_t>(kHeads)
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>());
