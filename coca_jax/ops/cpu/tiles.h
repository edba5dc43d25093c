// Products whose sums stay in registers: how many rows and columns are multiplied together.
#pragma once

#include <utility>

#include "vectors.h"

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

}  // namespace
