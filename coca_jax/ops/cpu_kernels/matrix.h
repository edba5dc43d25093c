// Matrices in memory, and rows and columns exchanged.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__SSE__)
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

// Side of a square that is turned at once.
#if defined(__AVX512F__)
constexpr int64_t kSquare = 16;

// Copies sixteen rows of sixteen, exchanged: pairs, then fours, then the fours' places.
inline void TurnSquare(const float* from, int64_t row, float* to, int64_t to_row) {
  __m512 x[16], y[16];
  for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_ps(from + i * row);
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)  // x[i + c]: of rows i to i + 3 the columns c, 4 + c, 8 + c, 12 + c
    for (int c = 0; c < 4; ++c) {
      const __m512d a = (__m512d)y[i + c / 2], b = (__m512d)y[i + c / 2 + 2];
      x[i + c] = (__m512)(c % 2 ? _mm512_unpackhi_pd(a, b) : _mm512_unpacklo_pd(a, b));
    }
  for (int i = 0; i < 16; i += 8)  // y[i + c]: the columns c and 8 + c of rows i to i + 7
    for (int c = 0; c < 4; ++c) {
      y[i + c] = _mm512_shuffle_f32x4(x[i + c], x[i + c + 4], 0x88);
      y[i + c + 4] = _mm512_shuffle_f32x4(x[i + c], x[i + c + 4], 0xdd);
    }
  for (int c = 0; c < 8; ++c) {
    _mm512_storeu_ps(to + c * to_row, _mm512_shuffle_f32x4(y[c], y[c + 8], 0x88));
    _mm512_storeu_ps(to + (c + 8) * to_row, _mm512_shuffle_f32x4(y[c], y[c + 8], 0xdd));
  }
}
#else
constexpr int64_t kSquare = 4;

inline void TurnSquare(const float* from, int64_t row, float* to, int64_t to_row) {
  TurnFour(from, row, to, to_row);
}
#endif

// Copies x [rows, columns] to rows and columns exchanged, zeros behind.
inline void CopyTurned(Matrix x, int64_t rows, int64_t columns, Block to) {
  const int64_t fours = rows / 4 * 4, wide = columns / 4 * 4;
  const int64_t high = rows / kSquare * kSquare, broad = columns / kSquare * kSquare;
  for (int64_t c = 0; c < columns; ++c) {
    float* out = to.data + c * to.row;
    std::fill(out + fours, out + to.row, 0.0f);
    for (int64_t r = c < wide ? fours : 0; r < rows; ++r) out[r] = x.data[r * x.row + c];
  }
  for (int64_t r = 0; r < high; r += kSquare)
    for (int64_t c = 0; c < broad; c += kSquare)
      TurnSquare(x.data + r * x.row + c, x.row, to.data + c * to.row + r, to.row);
  for (int64_t r = 0; r < fours; r += 4)
    for (int64_t c = r < high ? broad : 0; c < wide; c += 4)
      TurnFour(x.data + r * x.row + c, x.row, to.data + c * to.row + r, to.row);
}

}  // namespace
