// What a 3 x 3 convolution and its gradients are, for their kernels.
#pragma once

#include "numbers.h"

namespace {

constexpr int64_t kPanel = 64;    // columns of a panel of weights
constexpr int64_t kPixels = 144;  // words of images that are summed together for a kernel's gradient

struct Tap {
  int64_t row, column;  // of the padded input, for the first pixel
  int64_t weight;       // which of a panel's nine
};

// The pixels of a result that see the same taps: (row + i * spacing, column + j * spacing).
struct Phase {
  int64_t row, column, count;
  Tap taps[9];
};

// The result [images, *, result_width, features] of an input [images, height, width, channels].
struct Product {
  const float* in;
  int64_t images, height, width, channels, depth;  // depth: the words of a pixel
  bool rectify;        // the input
  int64_t step;        // pixels of the input from one pixel of a phase to the next
  const float* start;  // [features], of the sums
  const float* panels;
  float* out;
  int64_t result_height, result_width, features;
  int64_t rows, columns, spacing;  // of a phase
  int64_t phases;
  Phase phase[4];
  const float* positive;  // like the result: where it is not above 0 the result is 0; or null
};

// An image, in words, with zeros around it, in scratch memory.
inline float* Padded(const Product& p, int64_t image) {
  const int64_t row = (p.width + 2) * p.depth, inside = p.width * p.channels;
  // Pixels whose last word is not full are written one by one.
  const int64_t pieces = p.channels % kPair ? p.width : 1, piece = inside / pieces;
  float* padded = Scratch<0>((p.height + 2) * row);
  const float* in = p.in + image * p.height * inside;
  std::fill_n(padded, row, 0.0f);
  for (int64_t y = 0; y < p.height; ++y) {
    float* to = padded + (y + 1) * row;
    std::fill_n(to, p.depth, 0.0f);
    for (int64_t i = 0; i < pieces; ++i)
      Copy(in + y * inside + i * piece, piece, p.rectify, to + (i + 1) * p.depth);
    std::fill_n(to + row - p.depth, p.depth, 0.0f);
  }
  std::fill_n(padded + (p.height + 1) * row, row, 0.0f);
  return padded;
}

// Zeros in an image's result where it says so.
inline void Mask(const Product& p, int64_t image) {
  if (!p.positive) return;
  const int64_t size = p.result_height * p.result_width * p.features;
  const float* positive = p.positive + image * size;
  float* out = p.out + image * size;
  for (int64_t i = 0; i < size; ++i) out[i] = positive[i] > 0 ? out[i] : 0;
}

struct KernelGradient {
  const float *x, *g;
  int64_t images, height, width, depth, rows, columns, features, stride;
  bool rectify;
  float *kernel, *bias;
};

}  // namespace
