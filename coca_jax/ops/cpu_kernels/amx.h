// A processor's tiles (AMX): one instruction multiplies 16 rows of 16 words with 16 columns.
#pragma once

#include "numbers.h"

#if defined(COCA_JAX_BFLOAT16) && defined(__AMX_BF16__) && defined(__linux__)
#define COCA_JAX_TILES
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t kSide = 16;  // rows, words and columns of a tile at most

// Whether the system lets this process use tiles; it keeps no room for them before it is asked.
inline bool TilesAllowed() {
  constexpr long kAskFor = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
  return allowed;
}

// The words of `depth` that are multiplied at a time: all of equal length, and none read beyond it.
inline int64_t TileWords(int64_t depth) {
  int64_t words = std::min(depth, kSide);
  while (depth % words) --words;
  return words;
}

// This thread's tiles while it lives: 0 to 3 are sums, 4 and 5 left operands, 6 and 7 right ones.
class Tiles {
 public:
  Tiles(int64_t rows, int64_t words) {
    struct alignas(64) {
      uint8_t palette = 1, rest[15] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int i = 0; i < 8; ++i) {
      shapes.bytes[i] = 4 * (i == 4 || i == 5 ? words : kSide);
      shapes.rows[i] = i < 6 ? rows : words;
    }
    asm volatile("" ::"r"(&shapes) : "memory");  // of which compilers see the first word read
    _tile_loadconfig(&shapes);
  }
  Tiles(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
};

// M x N tiles of sums: out = start (null: 0) + x @ w. Block m of rows of x begins at x[m], and those
// of start and out likewise; column n of tiles is 16 floats on in `start` and `out`. Each of
// `steps` multiplies the words from x[m] + step.x on with those from w + step.w + n * w_column on.
struct TileStep {
  int64_t x, w;
};

struct TileProduct {
  const float* x[2];
  int64_t x_row;
  const float* w;
  int64_t w_row, w_column;
  const std::vector<TileStep>* steps;
  const float* start[2];
  int64_t start_row;  // 0: the same for all rows
  float* out[2];
  int64_t out_row;
};

template <int M, int N>
void MultiplyTiles(const TileProduct& p) {
  asm volatile("" ::: "memory");  // compilers do not see what a tile reads
  const int64_t x_row = 4 * p.x_row, w_row = 4 * p.w_row;
  const int64_t start_row = 4 * p.start_row, out_row = 4 * p.out_row;
  if (p.start[0]) {
    _tile_loadd(0, p.start[0], start_row);
    if (N > 1) _tile_loadd(1, p.start[0] + kSide, start_row);
    if (M > 1) _tile_loadd(2, p.start[1], start_row);
    if (M > 1 && N > 1) _tile_loadd(3, p.start[1] + kSide, start_row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (const TileStep& step : *p.steps) {
    const float* w = p.w + step.w;
    _tile_loadd(4, p.x[0] + step.x, x_row);
    _tile_loadd(6, w, w_row);
    if (M > 1) _tile_loadd(5, p.x[1] + step.x, x_row);
    if (N > 1) _tile_loadd(7, w + p.w_column, w_row);
    _tile_dpbf16ps(0, 4, 6);
    if (N > 1) _tile_dpbf16ps(1, 4, 7);
    if (M > 1) _tile_dpbf16ps(2, 5, 6);
    if (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, p.out[0], out_row);
  if (N > 1) _tile_stored(1, p.out[0] + kSide, out_row);
  if (M > 1) _tile_stored(2, p.out[1], out_row);
  if (M > 1 && N > 1) _tile_stored(3, p.out[1] + kSide, out_row);
  asm volatile("" ::: "memory");
}

// The same for one or two blocks of rows and columns of tiles.
inline void MultiplyTiles(const TileProduct& p, bool two_rows, bool two_columns) {
  if (two_rows)
    two_columns ? MultiplyTiles<2, 2>(p) : MultiplyTiles<2, 1>(p);
  else
    two_columns ? MultiplyTiles<1, 2>(p) : MultiplyTiles<1, 1>(p);
}

}  // namespace

#endif
