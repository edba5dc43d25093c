// Muon's iterations on a CPU; see muon_kernels.py.
//
// All is float32; with COCA_JAX_BFLOAT16 both operands of each product are rounded to bfloat16, of
// which a word holds a pair that one instruction multiplies, and sums and what is kept between
// products are float32. A matrix is small enough for a core's second cache, and one core's work.

#include "amx.h"
#include "registers.h"

namespace {

#ifdef COCA_JAX_TILES
// As `Multiply` below, whose blocks must have whole lines of rows too.
void MultiplyOnTiles(Block x, Block w, int64_t rows, int64_t depth, float scale, const float* add,
                     float keep, Block out) {
  const int64_t words = TileWords(depth), high = Whole(rows);
  std::vector<TileStep> steps;
  for (int64_t at = 0; at < depth; at += words) steps.push_back({at, at * w.row});
  float sums[4 * kSide * kSide];
  TileProduct product{};
  product.x_row = x.row, product.w_row = w.row, product.w_column = kSide, product.steps = &steps;
  product.out[0] = sums, product.out[1] = sums + 2 * kSide * kSide, product.out_row = 2 * kSide;
  const Tiles tiles(kSide, words);
  for (int64_t c = 0; c < out.row; c += 2 * kSide)
    for (int64_t r = 0; r < high; r += 2 * kSide) {
      const bool two_rows = r + kSide < high, two_columns = c + kSide < out.row;
      product.x[0] = x.data + r * x.row, product.x[1] = product.x[0] + kSide * x.row;
      product.w = w.data + c;
      MultiplyTiles(product, two_rows, two_columns);
      for (int64_t i = 0; i < (1 + two_rows) * kSide; ++i)
        for (int64_t j = 0; j < (1 + two_columns) * kSide; j += kLanes) {
          const int64_t at = (r + i) * out.row + c + j;
          const Vector sum = scale * Load(sums + i * 2 * kSide + j);
          Store(out.data + at, add ? keep * Load(add + at) + sum : sum);
        }
    }
}
#endif

// out [rows, whole lines] = scale * x [rows, depth] @ w [depth, whole lines], plus keep * add if
// there is such, which lies as `out` does.
void Multiply(Block x, Block w, int64_t rows, int64_t depth, float scale, const float* add,
              float keep, Block out) {
#ifdef COCA_JAX_TILES
  if (TilesAllowed()) return MultiplyOnTiles(x, w, rows, depth, scale, add, keep, out);
#endif
  MultiplyRows(x, w, rows, depth, out.row, [=](int64_t r, int64_t c, Vector sum) {
    const int64_t at = r * out.row + c;
    Store(out.data + at, add ? keep * Load(add + at) + scale * sum : scale * sum);
  });
}

// A matrix of whole lines, zeros where none is written.
template <int use>
Block Zeros(int64_t rows, int64_t columns) {
  const Block found{Scratch<use>(rows * columns), columns};
  std::fill_n(found.data, rows * columns, 0.0f);
  return found;
}

// The rows of x as left operands: words of numbers side by side.
void Left(Block x, int64_t rows, Block to) {
  for (int64_t r = 0; r < rows; ++r) Copy(x.data + r * x.row, x.row, false, to.data + r * to.row);
}

// The rows of x as a right operand: words of numbers below each other.
void Right(Block x, int64_t rows, Block to) {
  for (int64_t r = 0; r < rows; r += kPair) {
    const float* row = x.data + r * x.row;
    Copy(row, row + x.row, x.row, false, to.data + r / kPair * to.row);
  }
}

// Iterates x [rows, columns], rows <= columns: x <- a x + (b s + c s s) x with s = x turned x.
void Iterate(const float* in, int64_t rows, int64_t columns, const float* abc, int64_t iterations,
             float* out) {
  const int64_t high = Whole(rows), wide = Whole(columns), words = wide / kPair;
  const Block x = Zeros<0>(high, wide), left = Zeros<1>(high, words), turned = Zeros<2>(words, high);
  const Block right = Zeros<3>(WordsOf(high), wide), square = Zeros<4>(high, high);
  const Block sum = Zeros<5>(high, high), narrow = Zeros<6>(high, high / kPair);
  const Block deep = Zeros<7>(WordsOf(high), high);
  for (int64_t r = 0; r < rows; ++r) std::copy_n(in + r * columns, columns, x.data + r * wide);
  for (int64_t i = 0; i < iterations; ++i) {
    Left(x, rows, left);
    CopyTurned(left, rows, words, turned);
    Multiply(left, turned, rows, words, 1.0f, nullptr, 0.0f, square);
    Left(square, rows, narrow);
    Right(square, rows, deep);
    Multiply(narrow, deep, rows, high / kPair, abc[2], square.data, abc[1], sum);
    Left(sum, rows, narrow);
    Right(x, rows, right);
    Multiply(narrow, right, rows, high / kPair, 1.0f, x.data, abc[0], x);
  }
  for (int64_t r = 0; r < rows; ++r) std::copy_n(x.data + r * wide, columns, out + r * columns);
}

// x [L, M, N], of each matrix so many iterations; abc [3].
ffi::Error Orthogonalise(ffi::ThreadPool pool, Floats x, Floats abc, int64_t iterations,
                         ffi::Result<Floats> y) {
  const auto dims = x.dimensions();
  const int64_t layers = dims[0], rows = dims[1], columns = dims[2], size = rows * columns;
  const float *in = x.typed_data(), *factors = abc.typed_data();
  float* out = y->typed_data();
  Together(pool, layers, [=](Member& member) {
    member.Each(layers, [&](int64_t layer, int64_t) {
      Iterate(in + layer * size, rows, columns, factors, iterations, out + layer * size);
    });
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SYMBOL(orthogonalise), Orthogonalise,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Attr<int64_t>("iterations")
                                  .Ret<Floats>());
