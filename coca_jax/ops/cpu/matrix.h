// Matrices in memory, and rows and columns exchanged.
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "vectors.h"

namespace {

// A matrix [rows, columns] in memory: x[r * row + c * step].
struct Matrix {
  const float* data;
  int64_t row, step = 1;
  Matrix Turned() const { return {data, step, row}; }
};

// Rows of whole lines, a matrix of its own.
struct Block {
  float* data;
  int64_t row;
  operator Matrix() const { return {data, row}; }
};

constexpr int64_t Whole(int64_t columns) { return (columns + kLine - 1) / kLine * kLine; }

// Copies four rows of four, exchanged.
inline void TurnFour(const float* from, int64_t row, float* to, int64_t to_row) {
#if defined(__SSE__)
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + row);
  __m128 c = _mm_loadu_ps(from + 2 * row), d = _mm_loadu_ps(from + 3 * row);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a), _mm_storeu_ps(to + to_row, b);
  _mm_storeu_ps(to + 2 * to_row, c), _mm_storeu_ps(to + 3 * to_row, d);
#else
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 4; ++c) to[c * to_row + r] = from[r * row + c];
#endif
}

// Copies x [rows, columns] to rows and columns exchanged, zeros behind.
inline void CopyTurned(Matrix x, int64_t rows, int64_t columns, Block to) {
  const int64_t fours = rows / 4 * 4, wide = columns / 4 * 4;
  for (int64_t c = 0; c < columns; ++c) {
    float* out = to.data + c * to.row;
    std::fill(out + fours, out + to.row, 0.0f);
    for (int64_t r = c < wide ? fours : 0; r < rows; ++r) out[r] = x.data[r * x.row + c];
  }
  for (int64_t r = 0; r < fours; r += 4)
    for (int64_t c = 0; c < wide; c += 4)
      TurnFour(x.data + r * x.row + c, x.row, to.data + c * to.row + r, to.row);
}

}  // namespace
