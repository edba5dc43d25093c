// 3 x 3 convolutions on a CPU, forward and backward; see conv_kernels.py.
//
// All is float32; with COCA_JAX_BFLOAT16 both operands of each product are rounded to bfloat16, of
// which a word holds a pair that one instruction multiplies, and sums are float32.
//
// All three are products whose sums stay in registers while the other operand comes from the first
// two levels of cache: a convolution is a sum over the nine taps of a kernel, and the pixels that a
// tap sees of a zero-padded image lie at an offset that is the same for all of a row.

#include "conv.h"
#include "conv_amx.h"
#include "registers.h"

namespace {

constexpr int64_t kDepth = 64;    // words of a panel used at a time: 16 KiB of the first cache
constexpr int64_t kChannels = 16;  // of a kernel's gradient that one part of the work sums

// A piece of a product: `depth` words of the input at an offset from a pixel's, and their rows of a
// panel.
struct Piece {
  int64_t offset, depth;
  const float* weights;
};

// out[r, :] = start[:] (null: out's own) + the sum over pieces and k of
// in[r * step + offset + k] * weights[k, :], for R pixels and V vectors of columns.
template <int R, int V>
struct Pixels {
  static void Run(const float* in, int64_t step, const Piece* pieces, int64_t count,
                  int64_t columns, const float* start, float* out, int64_t out_step) {
    Vector sum[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        sum[r][v] = Load((start ? start : out + r * out_step) + v * kLanes);
    for (int64_t p = 0; p < count; ++p) {
      const float* x = in + pieces[p].offset;
      const float* weights = pieces[p].weights;
      for (int64_t k = 0; k < pieces[p].depth; ++k, weights += columns) {
        Vector weight[V];
        for (int v = 0; v < V; ++v) weight[v] = Load(weights + v * kLanes);
        for (int r = 0; r < R; ++r) {
          const Vector factor = Broadcast(x + r * step + k);
          for (int v = 0; v < V; ++v) sum[r][v] = AddProduct(sum[r][v], weight[v], factor);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) Store(out + r * out_step + v * kLanes, sum[r][v]);
  }
};

// One row of a phase, with the weights of `pieces` alone.
void MultiplyRow(const Product& p, const float* in, const Piece* pieces, int64_t count,
                 int64_t panel_columns, int64_t vectors, const float* start, float* out) {
  const int64_t most = Most(vectors), splits = (p.columns + most - 1) / most;
  const int64_t step = p.step * p.depth, out_step = p.spacing * p.features;
  for (int64_t s = 0; s < splits; ++s) {
    const int64_t at = s * p.columns / splits, few = (s + 1) * p.columns / splits - at;
    Instance<Pixels>(few, vectors)(in + at * step, step, pieces, count, panel_columns, start,
                                   out + at * out_step, out_step);
  }
}

// One phase of an image's result, in the `vectors` columns from `column` of a panel on. Weights are
// used for all rows before the next ones.
void MultiplyPhase(const Product& p, const Phase& phase, const float* padded, const float* panel,
                   int64_t panel_columns, int64_t column, int64_t vectors, const float* start,
                   float* out) {
  const int64_t row = (p.width + 2) * p.depth;
  const int64_t deep = std::min(p.depth, kDepth), chunks = (p.depth + deep - 1) / deep;
  const int64_t all = phase.count * chunks, together = kDepth / deep;
  bool started[1024] = {};  // rows of which `out` has sums
  for (int64_t t = 0; t < all; t += together)
    for (int64_t y = 0; y < p.rows; ++y) {
      Piece pieces[kDepth];
      int64_t count = 0;
      for (int64_t i = t; i < std::min(all, t + together); ++i) {
        const Tap& tap = phase.taps[i / chunks];
        const int64_t k = i % chunks * deep, sees = y * p.step + tap.row;
        if (sees > 0 && sees <= p.height)  // not the zeros above or below
          pieces[count++] = {tap.row * row + tap.column * p.depth + k,
                             std::min(deep, p.depth - k),
                             panel + (tap.weight * p.depth + k) * panel_columns + column};
      }
      if (!count && (started[y] || t + together < all)) continue;
      MultiplyRow(p, padded + y * p.step * row, pieces, count, panel_columns, vectors,
                  started[y] ? nullptr : start, out + y * p.spacing * p.result_width * p.features);
      started[y] = true;
    }
}

void Multiply(Member& member, const Product& p) {
  member.Each(p.images, [&](int64_t image, int64_t) {
    const float* padded = Padded(p, image);
    const int64_t size = p.result_height * p.result_width * p.features;
    float* out = p.out + image * size;
    for (int64_t f = 0; f < p.features; f += kPanel) {
      const int64_t columns = std::min(kPanel, p.features - f);
      const float* panel = p.panels + f * 9 * p.depth;
      for (int64_t c = 0, vectors; c < columns; c += vectors * kLanes) {
        vectors = VectorsAt(c, columns);
        for (int64_t i = 0; i < p.phases; ++i) {
          const Phase& phase = p.phase[i];
          MultiplyPhase(p, phase, padded, panel, columns, c, vectors, p.start + f + c,
                        out + (phase.row * p.result_width + phase.column) * p.features + f + c);
        }
      }
    }
    Mask(p, image);
  });
}

// The product by the threads of the pool, on tiles where there are such.
void Run(ffi::ThreadPool& pool, const Product& p) {
#ifdef COCA_JAX_TILES
  if (TilesAllowed()) {
    float* packed = Scratch<2>(9 * p.depth * p.features);
    return Together(pool, std::max(p.images, p.features / kSide),
                    [p, packed](Member& member) { MultiplyOnTiles(member, p, packed); });
  }
#endif
  Together(pool, p.images, [p](Member& member) { Multiply(member, p); });
}

// y = the convolution of x (rectified or not), plus bias.
ffi::Error Forward(ffi::ThreadPool pool, Floats x, Numbers panels, Floats bias, bool rectify,
                   ffi::Result<Floats> y) {
  const auto in = x.dimensions(), out = y->dimensions();
  Product p{x.typed_data(), in[0], in[1], in[2], in[3], WordsOf(in[3]), rectify, in[1] / out[1],
            bias.typed_data(), Words(Data(panels)), y->typed_data(), out[1], out[2], out[3],
            out[1], out[2], 1, 1, {}, nullptr};
  p.phase[0].count = 9;
  for (int64_t i = 0; i < 9; ++i) p.phase[0].taps[i] = {i / 3, i % 3, i};
  Run(pool, p);
  return ffi::Error::Success();
}

// The gradient of x from g, that of y; panels: of the kernel with channels and features exchanged.
// Row i of x is read by kernel row a at row (i + 1 - a) / stride of y, if that is whole: for stride
// 1 by all three, for stride 2 by a = 1 for an even i and by 0 and 2 for an odd one.
ffi::Error Input(ffi::ThreadPool pool, Floats g, Numbers panels, Floats zeros, Floats x,
                 bool rectify, ffi::Result<Floats> dx) {
  const auto in = g.dimensions(), out = dx->dimensions();
  const int64_t stride = out[1] / in[1];
  Product p{g.typed_data(), in[0], in[1], in[2], in[3], WordsOf(in[3]), false, 1,
            zeros.typed_data(), Words(Data(panels)), dx->typed_data(), out[1], out[2], out[3],
            in[1], in[2], stride, stride * stride, {}, rectify ? x.typed_data() : nullptr};
  for (int64_t i = 0; i < p.phases; ++i) {
    Phase& phase = p.phase[i];
    phase.row = i / stride, phase.column = i % stride;
    for (int64_t a = 0; a < 3; ++a)
      for (int64_t b = 0; b < 3; ++b) {
        const int64_t row = phase.row + 1 - a, column = phase.column + 1 - b;
        if (row % stride == 0 && column % stride == 0)  // plus one for the padding
          phase.taps[phase.count++] = {row / stride + 1, column / stride + 1, 3 * a + b};
      }
  }
  Run(pool, p);
  return ffi::Error::Success();
}

// The pixels of a group of images that one tap sees, and of the gradient that they meet. A word
// holds a number of each of kPair images.
struct Sight {
  int64_t images, rows, columns;
  int64_t x_image, x_row, x_step, g_image, g_row, g_step;  // in words
};

// out[r, :] = (fresh: 0, or its own) + the sum over pixels of x[pixel, r] * g[pixel, :].
template <int R, int V>
struct Channels {
  static void Run(const float* x, const float* g, const Sight& sight, bool fresh, float* out,
                  int64_t out_step) {
    Vector sum[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        sum[r][v] = fresh ? Vector{} : Load(out + r * out_step + v * kLanes);
    const int64_t x_step = sight.x_step, g_step = sight.g_step;
    for (int64_t n = 0; n < sight.images; ++n)
      for (int64_t i = 0; i < sight.rows; ++i) {
        const float* a = x + n * sight.x_image + i * sight.x_row;
        const float* b = g + n * sight.g_image + i * sight.g_row;
        for (int64_t j = 0; j < sight.columns; ++j, a += x_step, b += g_step) {
          Vector gradient[V];
          for (int v = 0; v < V; ++v) gradient[v] = Load(b + v * kLanes);
          for (int r = 0; r < R; ++r) {
            const Vector factor = Broadcast(a + r);
            for (int v = 0; v < V; ++v) sum[r][v] = AddProduct(sum[r][v], gradient[v], factor);
          }
        }
      }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) Store(out + r * out_step + v * kLanes, sum[r][v]);
  }
};

// Pixels of which a tap sees one inside the image: from .first on, below .second.
std::pair<int64_t, int64_t> Seen(int64_t tap, int64_t pixels, int64_t size, int64_t stride) {
  return {tap == 0, std::min(pixels, (size - tap) / stride + 1)};
}

// The gradient of channels `from` to `to` and of `vectors` of features from f on, over all images.
void SumChannels(const KernelGradient& k, int64_t from, int64_t to, int64_t f, int64_t vectors) {
  const int64_t channels = to - from, features = vectors * kLanes, most = Most(vectors);
  const int64_t splits = (channels + most - 1) / most;
  const int64_t in_pixels = k.height * k.width, out_pixels = k.rows * k.columns;
  const int64_t group = std::max<int64_t>(1, kPixels / out_pixels);
  float* seen = Scratch<0>(group * in_pixels * channels);
  float* met = Scratch<1>(group * out_pixels * features);
  for (int64_t first = 0; first < k.images; first += group * kPair) {
    const int64_t images = std::min(group, WordsOf(k.images - first));
    const float* g = k.g + first * out_pixels * k.features + f;
    for (int64_t n = 0; n < images; ++n) {
      const bool other = first + n * kPair + 1 < k.images;
      const auto words = [&](const float* image, int64_t pixels, int64_t step, int64_t count,
                             bool rectify, float* to) {
        for (int64_t i = 0; i < pixels; ++i, image += step, to += count)
          Copy(image, other ? image + pixels * step : nullptr, count, rectify, to);
      };
      words(k.x + (first + n * kPair) * in_pixels * k.depth + from, in_pixels, k.depth, channels,
            k.rectify, seen + n * in_pixels * channels);
      if (kPair > 1)
        words(g + n * kPair * out_pixels * k.features, out_pixels, k.features, features, false,
              met + n * out_pixels * features);
    }
    const float* gradient = kPair > 1 ? met : g;  // floats are read where they lie
    const int64_t g_step = kPair > 1 ? features : k.features;
    for (int64_t tap = 0; tap < 9; ++tap) {
      const int64_t a = tap / 3, b = tap % 3;
      const auto [top, bottom] = Seen(a, k.rows, k.height, k.stride);
      const auto [left, right] = Seen(b, k.columns, k.width, k.stride);
      const Sight sight{images, bottom - top, right - left, in_pixels * channels,
                        k.stride * k.width * channels, k.stride * channels,
                        out_pixels * g_step, k.columns * g_step, g_step};
      const int64_t row = top * k.stride + a - 1, column = left * k.stride + b - 1;
      const float* x = seen + (row * k.width + column) * channels;
      for (int64_t s = 0; s < splits; ++s) {
        const int64_t c = s * channels / splits, few = (s + 1) * channels / splits - c;
        Instance<Channels>(few, vectors)(x + c, gradient + (top * k.columns + left) * g_step, sight,
                                         first == 0,
                                         k.kernel + (tap * k.depth + from + c) * k.features + f,
                                         k.features);
      }
    }
  }
}

void SumBias(const KernelGradient& k, int64_t f, int64_t columns) {
  std::fill_n(k.bias + f, columns, 0.0f);
  const int64_t each = k.rows * k.columns;
  for (int64_t image = 0; image < k.images; ++image) {  // in two steps, as sums of many lose digits
    float sums[kPanel] = {};
    for (int64_t i = image * each; i < (image + 1) * each; ++i)
      for (int64_t c = 0; c < columns; ++c) sums[c] += k.g[i * k.features + f + c];
    for (int64_t c = 0; c < columns; ++c) k.bias[f + c] += sums[c];
  }
}

// The gradients of the kernel [3, 3, C, F] and of the bias [F] from x and g, that of y. Each part
// of the work sums over all images in order: the result does not depend on the number of threads.
ffi::Error Kernel(ffi::ThreadPool pool, Floats x, Floats g, bool rectify,
                  ffi::Result<Floats> kernel, ffi::Result<Floats> bias) {
  const auto in = x.dimensions(), out = g.dimensions();
  const KernelGradient k{x.typed_data(), g.typed_data(), in[0], in[1], in[2], in[3],
                         out[1], out[2], out[3], in[1] / out[1], rectify,
                         kernel->typed_data(), bias->typed_data()};
  const int64_t panels = (k.features + kPanel - 1) / kPanel;
#ifdef COCA_JAX_TILES
  if (TilesAllowed()) {
    const KernelSums s(k);
    float* sums = Scratch<4>(s.Size());
    Together(pool, s.chunks * s.bands, [=](Member& member) {
      SumOnTiles(member, k, s, sums, panels, [&](int64_t panel) {
        SumBias(k, panel * kPanel, std::min(kPanel, k.features - panel * kPanel));
      });
    });
    return ffi::Error::Success();
  }
#endif
  const int64_t blocks = (k.depth + kChannels - 1) / kChannels, parts = panels * (blocks + 1);
  Together(pool, parts, [=](Member& member) {
    member.Each(parts, [&](int64_t part, int64_t) {
      const int64_t f = part % panels * kPanel, columns = std::min(kPanel, k.features - f);
      const int64_t block = part / panels;
      if (block == blocks) return SumBias(k, f, columns);
      for (int64_t c = 0, vectors; c < columns; c += vectors * kLanes) {
        vectors = VectorsAt(c, columns);
        SumChannels(k, block * k.depth / blocks, (block + 1) * k.depth / blocks, f + c, vectors);
      }
    });
  });
  return ffi::Error::Success();
}

constexpr char kRectify[] = "rectify";

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SYMBOL(convolution), Forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Numbers>()
                                  .Arg<Floats>()
                                  .Attr<bool>(kRectify)
                                  .Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(SYMBOL(convolution_input), Input,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Numbers>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Attr<bool>(kRectify)
                                  .Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(SYMBOL(convolution_kernel), Kernel,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Attr<bool>(kRectify)
                                  .Ret<Floats>()
                                  .Ret<Floats>());
