// Products whose sums stay in registers: how many rows and columns are multiplied together.
#pragma once

#include <utility>

#include "matrix.h"
#include "numbers.h"

namespace {

// Vectors of columns, and sums at most, that stay in registers.
#if defined(__AVX512F__)
constexpr int kVectors = 4, kSums = 24;
#else
constexpr int kVectors = 2, kSums = 12;
#endif
// Rows multiplied together with so many vectors; eight sums keep the units busy.
constexpr int Most(int vectors) { return vectors == 1 ? 8 : kSums / vectors; }

// The entry for a number of rows and vectors in a table of instances of Form<rows, vectors>.
template <template <int, int> class Form, int V, int... R>
auto Instance(std::integer_sequence<int, R...>, int64_t rows) {
  static constexpr decltype(&Form<1, 1>::Run) runs[] = {&Form<R + 1, V>::Run...};
  return runs[rows - 1];
}

template <template <int, int> class Form, int V = kVectors>
auto Instance(int64_t rows, int64_t vectors) {
  if constexpr (V > 1)
    if (vectors < V) return Instance<Form, V - 1>(rows, vectors);
  return Instance<Form, V>(std::make_integer_sequence<int, Most(V)>(), rows);
}

// The vectors multiplied together from a column on, of the whole ones that are left.
inline int64_t VectorsAt(int64_t column, int64_t columns) {
  return std::min<int64_t>(kVectors, (columns - column) / kLanes);
}

// finish(row + r, column + v * kLanes, the sum over k of x[r * x_row + k * x_step] * w[k, v]) for R
// rows and V vectors of columns; x and w are words.
template <typename Finish>
struct Sums {
  template <int R, int V>
  struct Of {
    static void Run(const float* x, int64_t x_row, int64_t x_step, const float* w, int64_t w_row,
                    int64_t depth, int64_t row, int64_t column, const Finish& finish) {
      Vector sum[R][V] = {};
      for (int64_t k = 0; k < depth; ++k, x += x_step, w += w_row) {
        Vector weight[V];
        for (int v = 0; v < V; ++v) weight[v] = Load(w + v * kLanes);
        for (int r = 0; r < R; ++r) {
          const Vector factor = Broadcast(x + r * x_row);
          for (int v = 0; v < V; ++v) sum[r][v] = AddProduct(sum[r][v], weight[v], factor);
        }
      }
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) finish(row + r, column + v * kLanes, sum[r][v]);
    }
  };
};

// x [rows, depth] @ w [depth, columns], whole vectors of them, each to finish(row, column, vector).
template <typename Finish>
void MultiplyRows(Matrix x, Block w, int64_t rows, int64_t depth, int64_t columns,
                  const Finish& finish) {
  for (int64_t c = 0, vectors; c < columns; c += vectors * kLanes) {
    vectors = VectorsAt(c, columns);
    const int64_t most = Most(vectors), splits = (rows + most - 1) / most;
    for (int64_t s = 0; s < splits; ++s) {
      const int64_t r = s * rows / splits, few = (s + 1) * rows / splits - r;
      Instance<Sums<Finish>::template Of>(few, vectors)(
          x.data + r * x.row, x.row, x.step, w.data + c, w.row, depth, r, c, finish);
    }
  }
}

}  // namespace
