// Rounding to bfloat16 with rows and columns exchanged, and a step that the compiler cannot see
// through; see turn_kernels.py.

#include "matrix.h"
#include "team.h"

namespace {

constexpr int64_t kTogether = 32;  // rows of the input: a line of the cache of the result
constexpr int64_t kColumns = 128;  // of a part of the work, 16 KiB

// The nearest bfloat16, ties to even; NaN stays one.
inline uint16_t Rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : nearest;
}

ffi::Error Turn(ffi::ThreadPool pool, Floats x, ffi::ResultBuffer<ffi::BF16> y) {
  const int64_t rows = x.dimensions()[0], columns = x.dimensions()[1];
  const int64_t bands = (rows + kTogether - 1) / kTogether;
  const int64_t pieces = (columns + kColumns - 1) / kColumns, parts = bands * pieces;
  const float* from = x.typed_data();
  auto* to = reinterpret_cast<uint16_t*>(y->untyped_data());
  Together(pool, parts, [=](Member& member) {
    member.Each(parts, [&](int64_t part, int64_t) {
      const int64_t first = part / pieces * kTogether, few = std::min(kTogether, rows - first);
      const int64_t left = part % pieces * kColumns, right = std::min(columns, left + kColumns);
      float band[kColumns * kTogether];
      CopyTurned({from + first * columns + left, columns}, few, right - left, {band, kTogether});
      for (int64_t c = left; c < right; ++c)
        for (int64_t r = 0; r < few; ++r)
          to[c * rows + first + r] = Rounded(band[(c - left) * kTogether + r]);
    });
  });
  return ffi::Error::Success();
}

// Nothing: the result lies where the operand did.
ffi::Error Keep(ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer>) { return ffi::Error::Success(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(coca_jax_turn, Turn,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Ret<ffi::Buffer<ffi::BF16>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(coca_jax_keep, Keep,
                              ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
