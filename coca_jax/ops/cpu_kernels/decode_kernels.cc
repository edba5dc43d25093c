// The kernels of a decoding step on a CPU; see decode_kernels.py.
//
// All is float32; with COCA_JAX_BFLOAT16 the operands of products with weights and with image
// tokens are bfloat16, in pairs that one instruction multiplies, and their sums float32.
//
// A step has a few rows and hundreds of megabytes of weights, so what counts is to read those once,
// in order, while computing. Each kernel is a residual part of a decoder block: one call from XLA,
// inside which threads go through its phases together.

#include <string_view>

#include "attention.h"
#include "products.h"

namespace {

// ops.reference.ACTIVATIONS, by name.
enum class Activation { kGelu, kGeluExact, kRelu, kQuickGelu };

inline Vector Sigmoid(Vector x) {
  return 1.0f / (1.0f + Exp(-x > 80.0f ? Vector{} + 80.0f : -x));
}

// Half of erfc(x / sqrt 2) for x >= 0, to 8e-8: Abramowitz and Stegun 7.1.26.
inline Vector UpperTail(Vector x) {
  const Vector z = x * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
  Vector series = Vector{} + 1.061405429f;
  for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
    series = series * t + c;
  return 0.5f * t * series * Exp(-z * z);
}

template <Activation kind>
inline Vector Activate(Vector x) {
  if (kind == Activation::kRelu) return x < 0.0f ? Vector{} : x;
  if (kind == Activation::kQuickGelu) return x * Sigmoid(1.702f * x);
  // (1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
  if (kind == Activation::kGelu) return x * Sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
  const Vector tail = UpperTail(x < 0.0f ? -x : x);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

// x + attention over the past. N new tokens an image, whose keys and values go to slots slot ...
// slot + N - 1. key, value [B, H, M, K], in place; mask [B, N, M].
ffi::Error SelfAttention(ffi::ThreadPool pool, Floats x, Floats scale, Floats shift, Numbers qkv,
                         Floats qkv_bias, Numbers out, Floats out_bias,
                         ffi::Buffer<ffi::PRED> mask, ffi::Buffer<ffi::S32> slot, Floats key,
                         Floats value, ffi::Result<Floats> y, ffi::Result<Floats> new_key,
                         ffi::Result<Floats> new_value) {
  const Input in(x, scale, shift);
  const int64_t heads = key.dimensions()[1], slots = key.dimensions()[2];
  const int64_t width = key.dimensions()[3], first = slot.typed_data()[0];
  if (width % kLine || width / kLine > static_cast<int64_t>(std::size(kAttend)) ||
      heads * width != in.width || !Fits(qkv, in.width, 3 * in.width) ||
      !Fits(out, in.width, in.width))
    return ffi::Error::InvalidArgument("self attention: shapes do not fit");
  if (new_key->typed_data() != key.typed_data() || new_value->typed_data() != value.typed_data())
    return ffi::Error::InvalidArgument("self attention: the caches must be in place");
  if (first < 0 || first + in.queries > slots)
    return ffi::Error::InvalidArgument("self attention: no such slot");
  const AttendOf attend = kAttend[width / kLine - 1];
  const Operands normed = ScratchOperands<1>(in.rows, in.width);
  const Rows joint = ScratchRows<2>(in.rows, 3 * in.width);
  float *keys = key.typed_data(), *values = value.typed_data(), *to = y->typed_data();
  const bool* shown = mask.typed_data();
  const float *qkv_panels = Words(Data(qkv)), *qkv_shift = qkv_bias.typed_data();
  const float *out_panels = Words(Data(out)), *out_shift = out_bias.typed_data();
  Together(pool, Panels(in.width), [=](Member& member) {
    Norm(member, in.x, in.rows, in.width, in.scale, in.shift, normed);
    Multiply(member, {normed, in.rows, in.width, 3 * in.width, qkv_panels},
             Biased(joint, qkv_shift));
    member.Each(in.batch * heads, [&](int64_t part, int64_t following) {
      const int64_t b = part / heads, h = part % heads, cache = part * slots * width;
      const int64_t next = std::min(following, in.batch * heads - 1);
      const int64_t ahead = (next - part) * slots * width;
      float* scores = Scratch<0>(slots);
      // Half of it lies in other threads' caches.
      const float* soon = joint[next / heads * in.queries] + next % heads * width;
      for (int64_t i = 0; i < 3 * in.width; i += in.width)
        for (int64_t k = 0; k < width; k += kLine) __builtin_prefetch(soon + i + k, 0, 3);
      for (int64_t n = 0; n < in.queries; ++n) {
        const float* row = joint[b * in.queries + n] + h * width;
        const int64_t at = cache + (first + n) * width;
        std::copy_n(row + in.width, width, keys + at);
        std::copy_n(row + 2 * in.width, width, values + at);
      }
      for (int64_t n = 0; n < in.queries; ++n) {
        const int64_t row = b * in.queries + n;
        float found[kWidest];
        attend(joint[row] + h * width, keys + cache, values + cache, shown + row * slots, slots,
               ahead, scores, found);
        Put(normed[row] + h * width, found, width);
      }
    });
    Multiply(member, {normed, in.rows, in.width, in.width, out_panels},
             Residual(in, out_shift, to));
  });
  return ffi::Error::Success();
}

// x + attention over keys and values [B, H, M, K] of images.
ffi::Error CachedImageAttention(ffi::ThreadPool pool, Floats x, Floats scale, Floats shift,
                                Numbers query, Floats query_bias, Numbers out, Floats out_bias,
                                Floats key, Floats value, ffi::Result<Floats> y) {
  const Input in(x, scale, shift);
  const int64_t heads = key.dimensions()[1], slots = key.dimensions()[2];
  const int64_t width = key.dimensions()[3];
  if (width % kLine || width / kLine > static_cast<int64_t>(std::size(kAttend)) ||
      heads * width != in.width || !Fits(query, in.width, in.width) ||
      !Fits(out, in.width, in.width))
    return ffi::Error::InvalidArgument("cached image attention: shapes do not fit");
  const AttendOf attend = kAttend[width / kLine - 1];
  const Operands normed = ScratchOperands<1>(in.rows, in.width);
  const Rows asked = ScratchRows<2>(in.rows, in.width);
  const float *keys = key.typed_data(), *values = value.typed_data();
  const float *query_panels = Words(Data(query)), *query_shift = query_bias.typed_data();
  const float *out_panels = Words(Data(out)), *out_shift = out_bias.typed_data();
  float* to = y->typed_data();
  Together(pool, Panels(in.width), [=](Member& member) {
    Norm(member, in.x, in.rows, in.width, in.scale, in.shift, normed);
    Multiply(member, {normed, in.rows, in.width, in.width, query_panels},
             Biased(asked, query_shift));
    member.Each(in.batch * heads, [&](int64_t part, int64_t following) {
      const int64_t b = part / heads, h = part % heads, cache = part * slots * width;
      const int64_t ahead = (std::min(following, in.batch * heads - 1) - part) * slots * width;
      for (int64_t n = 0; n < in.queries; ++n) {
        const int64_t row = b * in.queries + n;
        float found[kWidest];
        attend(asked[row] + h * width, keys + cache, values + cache, nullptr, slots, ahead,
               Scratch<0>(slots), found);
        Put(normed[row] + h * width, found, width);
      }
    });
    Multiply(member, {normed, in.rows, in.width, in.width, out_panels},
             Residual(in, out_shift, to));
  });
  return ffi::Error::Success();
}

// x + attention over image tokens [B, Q, D'] that all heads and layers share, D' = D in whole
// panels. in_keys [H, D' / 32, K, 32] takes a query to the tokens' space, from_values
// [H, ceil(K / 32), D', 32] takes what it finds back.
ffi::Error ImageAttention(ffi::ThreadPool pool, Floats x, Floats scale, Floats shift, Numbers query,
                          Floats query_bias, Numbers out, Floats out_bias, Numbers in_keys,
                          Numbers from_values, Floats value_bias, Numbers tokens,
                          ffi::Result<Floats> y) {
  const Input in(x, scale, shift);
  const int64_t heads = in_keys.dimensions()[0], width = in.width / heads;
  const int64_t count = tokens.dimensions()[1], wide = tokens.dimensions()[2];
  if (wide != Panels(in.width) * kPanel || !Fits(query, in.width, in.width) ||
      !Fits(in_keys, width, wide) || !Fits(from_values, wide, width) ||
      !Fits(out, in.width, in.width))
    return ffi::Error::InvalidArgument("image attention: shapes do not fit");
  const Operands normed = ScratchOperands<1>(in.rows, in.width);
  const Operands asked = ScratchOperands<2>(in.rows, in.width);
  const Operands looking = ScratchOperands<6>(in.rows * heads, wide);
  const float *query_panels = Words(Data(query)), *query_shift = query_bias.typed_data();
  const float *key_panels = Words(Data(in_keys)), *value_panels = Words(Data(from_values));
  const float *out_panels = Words(Data(out)), *out_shift = out_bias.typed_data();
  const Number *image = Data(tokens), *after = Data(from_values);
  const float* value_shift = value_bias.typed_data();
  float* to = y->typed_data();
  // An image's rows stay together, to share its tokens, unless there are more threads than images.
  const int64_t each = in.queries * heads;
  const int64_t splits = std::max((each + kQueries - 1) / kQueries,
                                  std::min((pool.num_threads() + in.batch - 1) / in.batch, each));
  Together(pool, Panels(in.width), [=](Member& member) {
    Norm(member, in.x, in.rows, in.width, in.scale, in.shift, normed);
    Multiply(member, {normed, in.rows, in.width, in.width, query_panels},
             Biased(asked, query_shift));
    Multiply(member, {asked, in.rows, width, wide, key_panels, heads, width},
             [&](int64_t row, int64_t head, int64_t column, const float* sums, int64_t columns) {
               Put(looking[row * heads + head] + column, sums, columns);
             });
    member.Each(in.batch * splits, [&](int64_t part, int64_t following) {
      const int64_t b = part / splits, split = part % splits, first = split * each / splits;
      const int64_t next = following / splits;
      AttendTokens(image + b * count * wide, count, wide,
                   {looking[b * each + first], looking.stride},
                   static_cast<int>((split + 1) * each / splits - first),
                   next < in.batch ? image + next * count * wide : after);
    });
    const Operands found{looking.data, heads * looking.stride};
    Multiply(member, {found, in.rows, wide, width, value_panels, heads, looking.stride},
             [&](int64_t row, int64_t head, int64_t column, const float* sums, int64_t columns) {
               const int64_t at = head * width + column;
               float part[kPanel];
               for (int64_t i = 0; i < columns; ++i) part[i] = sums[i] + value_shift[at + i];
               Put(asked[row] + at, part, columns);
             });
    Multiply(member, {asked, in.rows, in.width, in.width, out_panels},
             Residual(in, out_shift, to));
  });
  return ffi::Error::Success();
}

template <Activation kind>
void Mlp(ffi::ThreadPool& pool, const Input& in, int64_t hidden, const float* up,
         const float* up_bias, const float* down, const float* down_bias, float* y) {
  const Operands normed = ScratchOperands<1>(in.rows, in.width);
  const Operands inner = ScratchOperands<2>(in.rows, hidden);
  Together(pool, Panels(in.width), [=](Member& member) {
    Norm(member, in.x, in.rows, in.width, in.scale, in.shift, normed);
    Multiply(member, {normed, in.rows, in.width, hidden, up},
             [&](int64_t row, int64_t, int64_t column, const float* sums, int64_t columns) {
               float part[kPanel];
               for (int64_t i = 0; i < columns; ++i) part[i] = sums[i] + up_bias[column + i];
               Map(part, columns, Activate<kind>);
               Put(inner[row] + column, part, columns);
             });
    Multiply(member, {inner, in.rows, hidden, in.width, down}, Residual(in, down_bias, y));
  });
}

constexpr char kActivation[] = "activation";

// x + the MLP of width up_bias.size.
ffi::Error ResidualMlp(ffi::ThreadPool pool, Floats x, Floats scale, Floats shift, Numbers up,
                       Floats up_bias, Numbers down, Floats down_bias, ffi::Result<Floats> y,
                       ffi::Attr<std::string_view, kActivation> activation) {
  const Input in(x, scale, shift);
  const int64_t hidden = up_bias.dimensions()[0];
  if (!Fits(up, in.width, hidden) || !Fits(down, hidden, in.width))
    return ffi::Error::InvalidArgument("mlp: shapes do not fit");
  const auto run = [&](auto kind) {
    Mlp<kind()>(pool, in, hidden, Words(Data(up)), up_bias.typed_data(), Words(Data(down)),
                down_bias.typed_data(), y->typed_data());
    return ffi::Error::Success();
  };
  if (*activation == "gelu") return run(std::integral_constant<Activation, Activation::kGelu>());
  if (*activation == "gelu_exact")
    return run(std::integral_constant<Activation, Activation::kGeluExact>());
  if (*activation == "relu") return run(std::integral_constant<Activation, Activation::kRelu>());
  if (*activation == "quick_gelu")
    return run(std::integral_constant<Activation, Activation::kQuickGelu>());
  return ffi::Error::InvalidArgument("mlp: no such activation");
}

// Logits [B, N, V] of states x before the last norm, and their log-sum-exp [B, N].
ffi::Error Logits(ffi::ThreadPool pool, Floats x, Floats scale, Floats shift, Numbers panels,
                  Floats bias, ffi::Result<Floats> y, ffi::Result<Floats> log_sum_exp) {
  const Input in(x, scale, shift);
  const int64_t vocabulary = bias.dimensions()[0];
  if (!Fits(panels, in.width, vocabulary))
    return ffi::Error::InvalidArgument("logits: shapes do not fit");
  const Operands normed = ScratchOperands<1>(in.rows, in.width);
  const Rows out{y->typed_data(), vocabulary};
  const float *weights = Words(Data(panels)), *add = bias.typed_data();
  float* sums = log_sum_exp->typed_data();
  Together(pool, Panels(vocabulary), [=](Member& member) {
    Norm(member, in.x, in.rows, in.width, in.scale, in.shift, normed);
    Multiply(member, {normed, in.rows, in.width, vocabulary, weights}, Biased(out, add));
    member.Each(in.rows, [&](int64_t row, int64_t) {
      const float* logits = out[row];
      const auto at = [=](int64_t i) { return Load(logits + i, vocabulary - i, -INFINITY); };
      Vector most = at(0), total = {};
      for (int64_t i = kLanes; i < vocabulary; i += kLanes) most = Larger(most, at(i));
      const float highest = Largest(most);
      for (int64_t i = 0; i < vocabulary; i += kLanes) total += Exp(at(i) - highest);
      sums[row] = highest + std::log(Sum(total));
    });
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SYMBOL(self_attention), SelfAttention);
XLA_FFI_DEFINE_HANDLER_SYMBOL(SYMBOL(image_attention), ImageAttention);
XLA_FFI_DEFINE_HANDLER_SYMBOL(SYMBOL(cached_image_attention), CachedImageAttention);
XLA_FFI_DEFINE_HANDLER_SYMBOL(SYMBOL(mlp), ResidualMlp);
XLA_FFI_DEFINE_HANDLER_SYMBOL(SYMBOL(logits), Logits);
