// Products of the few rows of a step with weights in panels, and what stands around them: norms,
// sums, biases.
#pragma once

#include <array>
#include <cmath>
#include <utility>

#include "amx.h"

namespace {

constexpr int kPanel = 32;   // columns of a panel
constexpr int kDepth = 128;  // words of a panel, multiplied at a time: 16 KiB
constexpr int kTile = 32;    // rows for which a panel's sums are kept
constexpr int kFewest = 6;   // rows for which tiles are quicker than a pass that asks ahead
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

#ifdef COCA_JAX_TILES
// As `Multiply` below, on tiles.
template <typename Finish>
void MultiplyOnTiles(Member& member, const Product& product, int64_t chunk, const Finish& finish) {
  const int64_t count = Panels(product.width), depth = product.depth / kPair;
  const int64_t words = TileWords(depth), rows = product.rows, all = product.groups * count;
  // Blocks of equally many rows; the last one may begin within the one before.
  const int64_t blocks = (rows + kSide - 1) / kSide, few = (rows + blocks - 1) / blocks;
  std::vector<TileStep> steps;
  for (int64_t at = 0; at < depth; at += words) steps.push_back({at, at * kPanel});
  member.Each((all + chunk - 1) / chunk, [&](int64_t part, int64_t) {
    const Tiles tiles(few, words);
    float sums[2 * kSide * kPanel];
    TileProduct tile{};
    tile.x_row = product.x.stride / kPair, tile.steps = &steps;
    tile.w_row = kPanel, tile.w_column = kSide, tile.out_row = kPanel;
    for (int64_t i = part * chunk; i < std::min(all, (part + 1) * chunk); ++i) {
      const int64_t group = i / count, column = i % count * kPanel;
      const int64_t columns = std::min<int64_t>(kPanel, product.width - column);
      const float* x = Words(product.x.data + group * product.group_offset);
      tile.w = product.panels + i * depth * kPanel;
      for (int64_t b = 0; b < blocks; b += 2) {
        int64_t first[2];
        for (int64_t m = 0; m < 2; ++m) {
          first[m] = std::min((b + m) * few, rows - few);
          tile.x[m] = x + first[m] * tile.x_row, tile.out[m] = sums + m * kSide * kPanel;
        }
        MultiplyTiles(tile, b + 1 < blocks, true);
        for (int64_t m = 0; m < 2; ++m)
          for (int64_t r = (b + m) * few; r < std::min(rows, (b + m + 1) * few); ++r)
            finish(r, group, column, tile.out[m] + (r - first[m]) * kPanel, columns);
      }
    }
  });
}
#endif

// One phase: finish(row, group, column, sums, columns) gets up to 32 columns of a row at a time.
template <typename Finish>
void Multiply(Member& member, const Product& product, const Finish& finish) {
  const int64_t count = Panels(product.width), depth = product.depth / kPair;
  const int64_t size = depth * kPanel, x_stride = product.x.stride / kPair;
  const int64_t all = product.groups * count;
  // Panels claimed at once: 64 KiB of them.
  const int64_t chunk = std::max<int64_t>(1, 4 * kDepth / depth);
#ifdef COCA_JAX_TILES
  if (product.rows >= kFewest && TilesAllowed())
    return MultiplyOnTiles(member, product, chunk, finish);
#endif
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

}  // namespace
