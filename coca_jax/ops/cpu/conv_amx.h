// The convolutions' products on tiles, where a processor has them: the second form of those in
// conv_kernels.cc.
#pragma once

#include "amx.h"
#include "conv.h"
#include "matrix.h"

#ifdef COCA_JAX_TILES

namespace {

constexpr int64_t kMostPieces = 9;
constexpr int64_t kBand = 2 * kSide;  // features whose gradient one part of the work sums

// What a pixel of a phase is multiplied with: pieces of `depth` words of the input, at offsets from
// the pixel's own, each with its rows of a panel. Taps that lie side by side are one piece.
struct Pieces {
  int64_t count = 0, depth = 0, words = 0;  // words: of a tile
  int64_t offset[kMostPieces], row[kMostPieces];

  Pieces(const Product& p, const Phase& phase) {
    const int64_t line = (p.width + 2) * p.depth;
    const bool whole = phase.count == 9;
    for (int64_t i = 0; i < phase.count; ++i) {
      const Tap& tap = phase.taps[i];
      const bool follows = whole && i % 3 && tap.column == phase.taps[i - 1].column + 1;
      if (follows) continue;
      offset[count] = tap.row * line + tap.column * p.depth;
      row[count++] = tap.weight * p.depth;
    }
    depth = phase.count / count * p.depth;
    words = TileWords(depth);
  }
  int64_t Steps() const { return count * (depth / words); }
};

// All weights as tiles of 16 columns, one step's after the other: for each phase its columns.
inline void PackWeights(Member& member, const Product& p, float* packed) {
  const int64_t columns = p.features / kSide;
  member.Each(columns, [&](int64_t column, int64_t) {
    const int64_t at = column * kSide, first = at / kPanel * kPanel;
    const int64_t width = std::min(kPanel, p.features - first);
    const float* panel = p.panels + first * 9 * p.depth + (at - first);
    int64_t before = 0;  // rows of earlier phases
    for (int64_t i = 0; i < p.phases; ++i) {
      const Pieces pieces(p, p.phase[i]);
      const int64_t rows = pieces.count * pieces.depth;
      float* to = packed + before * p.features + column * rows * kSide;
      for (int64_t n = 0; n < pieces.count; ++n)
        for (int64_t k = 0; k < pieces.depth; ++k, to += kSide)
          std::memcpy(to, panel + (pieces.row[n] + k) * width, 4 * kSide);
      before += rows;
    }
  });
}

// One phase of an image's result; `weights` are those of the phase.
inline void MultiplyPhase(const Product& p, const Phase& phase, const Pieces& pieces,
                          const float* padded, const float* weights, float* out) {
  const int64_t splits = (p.columns + kSide - 1) / kSide, few = (p.columns + splits - 1) / splits;
  const int64_t line = (p.width + 2) * p.depth, blocks = p.rows * splits, steps = pieces.Steps();
  std::vector<int64_t> offsets;
  for (int64_t n = 0; n < pieces.count; ++n)
    for (int64_t k = 0; k < pieces.depth; k += pieces.words)
      offsets.push_back(pieces.offset[n] + k);
  TileProduct product{};
  product.x_row = p.step * p.depth, product.out_row = p.spacing * p.features;
  product.offsets = offsets.data(), product.steps = steps;
  product.w_row = kSide, product.w_step = pieces.words * kSide;
  product.w_column = steps * product.w_step;
  const Tiles tiles(few, pieces.words);
  for (int64_t f = 0; f < p.features; f += 2 * kSide) {
    product.w = weights + f * steps * pieces.words;
    product.start[0] = product.start[1] = p.start + f;
    for (int64_t b = 0; b < blocks; b += 2) {
      for (int64_t m = 0; m < 2; ++m) {
        // The last block of a row may begin within the one before, whose pixels are made again.
        const int64_t y = (b + m) / splits, x = std::min((b + m) % splits * few, p.columns - few);
        product.x[m] = padded + y * p.step * line + x * product.x_row;
        product.out[m] = out + ((phase.row + y * p.spacing) * p.result_width + phase.column +
                                x * p.spacing) * p.features + f;
      }
      MultiplyTiles(product, b + 1 < blocks, f + kSide < p.features);
    }
  }
}

// As `Multiply`; packed: room for 9 * depth * features words that all members share.
inline void MultiplyOnTiles(Member& member, const Product& p, float* packed) {
  PackWeights(member, p, packed);
  member.Each(p.images, [&](int64_t image, int64_t) {
    const float* padded = Padded(p, image);
    const int64_t size = p.result_height * p.result_width * p.features;
    const float* weights = packed;
    for (int64_t i = 0; i < p.phases; ++i) {
      const Pieces pieces(p, p.phase[i]);
      MultiplyPhase(p, p.phase[i], pieces, padded, weights, p.out + image * size);
      weights += pieces.count * pieces.depth * p.features;
    }
    Mask(p, image);
  });
}

// The input's rows that row `a` of the kernel sees in a pair of images, with zeros at both ends:
// [rows, pitch * stride, channels] in words of one number of either.
inline void PackSeen(const KernelGradient& k, int64_t a, int64_t first, int64_t pitch, float* to) {
  const int64_t size = k.height * k.width * k.depth, inside = k.width * k.depth;
  const int64_t line = pitch * k.stride * k.depth;
  const float* image = k.x + first * size;
  for (int64_t i = 0; i < k.rows; ++i, to += line) {
    const int64_t y = i * k.stride + a - 1;
    if (y < 0 || y >= k.height) {
      std::fill_n(to, line, 0.0f);
      continue;
    }
    const float* row = image + y * inside;
    std::fill_n(to, k.depth, 0.0f);
    Copy(row, first + 1 < k.images ? row + size : nullptr, inside, k.rectify, to + k.depth);
    std::fill(to + k.depth + inside, to + line, 0.0f);
  }
}

// The gradient of `columns` features from f on, of a pair of images: [rows, pitch, columns] in words
// of one number of either, zeros where a row has no pixel.
inline void PackMet(const KernelGradient& k, int64_t f, int64_t columns, int64_t first,
                    int64_t pitch, float* to) {
  const int64_t size = k.rows * k.columns * k.features;
  const float* from = k.g + first * size + f;
  for (int64_t i = 0; i < k.rows; ++i) {
    for (int64_t j = 0; j < k.columns; ++j, from += k.features, to += columns)
      Copy(from, first + 1 < k.images ? from + size : nullptr, columns, false, to);
    std::fill_n(to, (pitch - k.columns) * columns, 0.0f);
    to += (pitch - k.columns) * columns;
  }
}

// The gradient of row `a` of the kernel for `columns` features from f on, over all images: a product
// of the result's gradient, turned, with the pixels seen, in which the three taps of a row are the
// next three pixels. Pixels are numbered through images with zeros at a row's end, where g is 0, so
// that a tap's pixel lies at the same distance from g's everywhere.
inline void SumKernelRow(const KernelGradient& k, int64_t a, int64_t f, int64_t columns) {
  const int64_t pitch = (k.width + 2) / k.stride, pixels = k.rows * pitch, width = 3 * k.depth;
  const int64_t group = std::max<int64_t>(1, kPixels / (k.rows * k.columns));
  const int64_t most = Whole(group * pixels), turned_row = most + kLine;
  const int64_t sums_row = Whole(width), seen_row = k.stride * k.depth;
  // What lies behind the last pixel is multiplied by 0, or is no sum that is used.
  float* seen = Scratch<0>(most * seen_row + sums_row);
  float* met = Scratch<1>(most * columns);
  float* turned = Scratch<2>(columns * turned_row);
  float* sums = Scratch<3>(columns * sums_row);
  std::vector<int64_t> offsets;
  for (int64_t at = 0; at < most; at += kSide) offsets.push_back(at);
  const Tiles tiles(kSide, kSide);
  for (int64_t first = 0; first < k.images; first += group * kPair) {
    const int64_t pairs = std::min(group, WordsOf(k.images - first)), depth = Whole(pairs * pixels);
    for (int64_t n = 0; n < pairs; ++n) {
      PackSeen(k, a, first + n * kPair, pitch, seen + n * pixels * seen_row);
      PackMet(k, f, columns, first + n * kPair, pitch, met + n * pixels * columns);
    }
    std::fill(seen + pairs * pixels * seen_row, seen + depth * seen_row + sums_row, 0.0f);
    CopyTurned({met, columns}, pairs * pixels, columns, {turned, turned_row});
    TileProduct product{};
    product.x[0] = turned, product.x[1] = turned + kSide * turned_row;
    product.x_row = turned_row, product.offsets = offsets.data(), product.steps = depth / kSide;
    product.w_row = seen_row, product.w_step = kSide * seen_row, product.w_column = kSide;
    product.start_row = product.out_row = sums_row;
    for (int64_t n = 0; n < sums_row; n += 2 * kSide) {
      product.w = seen + n;
      for (int64_t m = 0; m < 2; ++m) {
        product.out[m] = sums + m * kSide * sums_row + n;
        product.start[m] = first ? product.out[m] : nullptr;
      }
      MultiplyTiles(product, columns > kSide, n + kSide < sums_row);
    }
  }
  float* kernel = k.kernel + a * width * k.features + f;
  for (int64_t n = 0; n < width; ++n)
    for (int64_t c = 0; c < columns; ++c) kernel[n * k.features + c] = sums[c * sums_row + n];
}

}  // namespace

#endif
