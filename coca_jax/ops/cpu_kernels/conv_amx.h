// The convolutions' products on tiles, where a processor has them: the second form of those in
// conv_kernels.cc.
#pragma once

#include "amx.h"
#include "conv.h"
#include "matrix.h"

#ifdef COCA_JAX_TILES

namespace {

constexpr int64_t kMostPieces = 9;
constexpr int64_t kBand = 2 * kSide;    // features whose gradient one part of the work sums
constexpr int64_t kChunks = 8;          // of images at most, which are summed apart
constexpr int64_t kMostSums = 1 << 20;  // numbers of such sums

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
  const int64_t line = (p.width + 2) * p.depth, blocks = p.rows * splits;
  std::vector<TileStep> steps;
  for (int64_t n = 0; n < pieces.count; ++n)
    for (int64_t k = 0; k < pieces.depth; k += pieces.words)
      steps.push_back({pieces.offset[n] + k, (n * pieces.depth + k) * kSide});
  TileProduct product{};
  product.x_row = p.step * p.depth, product.out_row = p.spacing * p.features;
  product.w_row = kSide, product.w_column = pieces.count * pieces.depth * kSide;
  product.steps = &steps;
  const Tiles tiles(few, pieces.words);
  for (int64_t f = 0; f < p.features; f += 2 * kSide) {
    product.w = weights + f * pieces.count * pieces.depth;
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

// How the gradient of a kernel is summed on tiles: as a product of the result's gradient g, turned,
// with the pixels seen, in which the three taps of a row of the kernel are the next three pixels.
// Pixels are numbered through an image with zeros at a row's end, where g is 0, so that a tap's pixel
// lies at the same distance from g's everywhere. Of the input, every stride-th row lies together.
// Images are summed in `chunks`, and then those, however many threads there are.
struct KernelSums {
  int64_t pitch, pixels, pairs, group, chunks, bands, width, row, lines, seen_row, seen_image;

  explicit KernelSums(const KernelGradient& k) {
    pitch = (k.width + 2) / k.stride, pixels = Whole(k.rows * pitch), width = 3 * k.depth;
    pairs = WordsOf(k.images), group = std::max<int64_t>(1, kPixels / (k.rows * k.columns));
    row = Whole(width), bands = (k.features + kBand - 1) / kBand;
    chunks = std::clamp<int64_t>(kMostSums / (3 * row * k.features), 1, std::min(pairs, kChunks));
    lines = k.rows + 2 / k.stride;  // of each of `stride` planes of rows
    seen_row = pitch * k.stride * k.depth;
    // What lies behind is multiplied by 0, or is no sum that is used.
    seen_image = k.stride * lines * seen_row + (pixels - k.rows * pitch) * k.stride * k.depth + row;
  }
  int64_t Size() const { return chunks * bands * 3 * kBand * row; }  // of all sums
  int64_t At(int64_t chunk, int64_t band) const { return (chunk * bands + band) * 3 * kBand * row; }
};

// A pair of images in words of one number of either, with zeros around, in planes of rows.
inline void PackSeen(const KernelGradient& k, const KernelSums& s, int64_t first, float* to) {
  const int64_t inside = k.width * k.depth, size = k.height * inside;
  const float* image = k.x + first * size;
  std::fill(to + k.stride * s.lines * s.seen_row, to + s.seen_image, 0.0f);
  for (int64_t plane = 0; plane < k.stride; ++plane)
    for (int64_t i = 0; i < s.lines; ++i, to += s.seen_row) {
      const int64_t y = i * k.stride + plane - 1;
      if (y < 0 || y >= k.height) {
        std::fill_n(to, s.seen_row, 0.0f);
        continue;
      }
      const float* row = image + y * inside;
      std::fill_n(to, k.depth, 0.0f);
      Copy(row, first + 1 < k.images ? row + size : nullptr, inside, k.rectify, to + k.depth);
      std::fill(to + k.depth + inside, to + s.seen_row, 0.0f);
    }
}

// The gradient of `columns` features from f on, of a pair of images: [pixels, columns] in words of
// one number of either, zeros where an image has no pixel.
inline void PackMet(const KernelGradient& k, const KernelSums& s, int64_t f, int64_t columns,
                    int64_t first, float* to) {
  const int64_t size = k.rows * k.columns * k.features;
  const float* from = k.g + first * size + f;
  float* end = to + s.pixels * columns;
  for (int64_t i = 0; i < k.rows; ++i) {
    for (int64_t j = 0; j < k.columns; ++j, from += k.features, to += columns)
      Copy(from, first + 1 < k.images ? from + size : nullptr, columns, false, to);
    std::fill_n(to, (s.pitch - k.columns) * columns, 0.0f);
    to += (s.pitch - k.columns) * columns;
  }
  std::fill(to, end, 0.0f);
}

// The sums of a chunk of images for a band of features: [3, kBand, row].
inline void SumChunk(const KernelGradient& k, const KernelSums& s, int64_t chunk, int64_t band,
                     float* sums) {
  const int64_t f = band * kBand, columns = std::min(kBand, k.features - f);
  const int64_t turned_row = s.group * s.pixels + kLine, pixel = k.stride * k.depth;
  float* seen = Scratch<0>(s.group * s.seen_image);
  float* met = Scratch<1>(s.group * s.pixels * columns);
  float* turned = Scratch<2>(columns * turned_row);
  const int64_t begin = chunk * s.pairs / s.chunks, end = (chunk + 1) * s.pairs / s.chunks;
  const Tiles tiles(kSide, kSide);
  for (int64_t first = begin; first < end; first += s.group) {
    const int64_t count = std::min(s.group, end - first);
    std::vector<TileStep> steps;
    for (int64_t n = 0; n < count; ++n) {
      PackSeen(k, s, (first + n) * kPair, seen + n * s.seen_image);
      PackMet(k, s, f, columns, (first + n) * kPair, met + n * s.pixels * columns);
      for (int64_t at = 0; at < s.pixels; at += kSide)
        steps.push_back({n * s.pixels + at, n * s.seen_image + at * pixel});
    }
    CopyTurned({met, columns}, count * s.pixels, columns, {turned, turned_row});
    TileProduct product{};
    product.x[0] = turned, product.x[1] = turned + kSide * turned_row, product.x_row = turned_row;
    product.w_row = pixel, product.w_column = kSide, product.steps = &steps;
    product.start_row = product.out_row = s.row;
    for (int64_t a = 0; a < 3; ++a)
      for (int64_t n = 0; n < s.row; n += 2 * kSide) {
        product.w = seen + (a % k.stride * s.lines + a / k.stride) * s.seen_row + n;
        for (int64_t m = 0; m < 2; ++m) {
          product.out[m] = sums + (a * kBand + m * kSide) * s.row + n;
          product.start[m] = first > begin ? product.out[m] : nullptr;
        }
        MultiplyTiles(product, columns > kSide, n + kSide < s.row);
      }
  }
}

// Adds up the chunks of a band: the gradient of row `a` of the kernel.
inline void SumChunks(const KernelGradient& k, const KernelSums& s, const float* sums, int64_t band,
                      int64_t a) {
  const int64_t f = band * kBand, columns = std::min(kBand, k.features - f);
  float* kernel = k.kernel + a * s.width * k.features + f;
  float* total = Scratch<0>(columns * s.row);
  std::copy_n(sums + s.At(0, band) + a * kBand * s.row, columns * s.row, total);
  for (int64_t chunk = 1; chunk < s.chunks; ++chunk) {
    const float* more = sums + s.At(chunk, band) + a * kBand * s.row;
    for (int64_t i = 0; i < columns * s.row; ++i) total[i] += more[i];
  }
  for (int64_t n = 0; n < s.width; ++n)
    for (int64_t c = 0; c < columns; ++c) kernel[n * k.features + c] = total[c * s.row + n];
}

// The gradient of the kernel; sums: room for `KernelSums::Size` numbers that all members share.
// bias(part): work of `biases` parts that is done beside it.
template <typename Bias>
void SumOnTiles(Member& member, const KernelGradient& k, const KernelSums& s, float* sums,
                int64_t biases, const Bias& bias) {
  const int64_t parts = s.chunks * s.bands;
  member.Each(parts + biases, [&](int64_t part, int64_t) {
    if (part >= parts) return bias(part - parts);
    const int64_t chunk = part / s.bands, band = part % s.bands;
    SumChunk(k, s, chunk, band, sums + s.At(chunk, band));
  });
  member.Each(3 * s.bands, [&](int64_t part, int64_t) {
    SumChunks(k, s, sums, part / 3, part % 3);
  });
}

}  // namespace

#endif
