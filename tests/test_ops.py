"""Every form of the operations against the reference, values and gradients."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coca_jax import ops, partitioning
from coca_jax.configs import base
from coca_jax.models import block, coca, layers, rotary
from coca_jax.ops import gpu, reference
from coca_jax.ops.tpu import attention_kernel, forms, norm_kernel


def arrays(*shape, count=1, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(count)]


def assert_close_with_gradients(ours, plain, inputs, tolerance):
    """Value and every gradient, relative to the largest entry."""
    (weight,) = arrays(*jax.eval_shape(plain, *inputs).shape, seed=9)
    argnums = tuple(range(len(inputs)))

    def run(function):
        def scalar(*x):
            out = function(*x).astype(jnp.float32)
            return (out * weight).sum(), out

        gradients, out = jax.jit(jax.grad(scalar, argnums, has_aux=True))(*inputs)
        return (out, *gradients)

    for got, want in zip(run(ours), run(plain)):
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def plain_attention(q, k, v, mask, heads):
    q, k, v = (x.reshape(x.shape[:2] + (heads, -1)) for x in (q, k, v))
    return reference.attend(q, k, v, mask).reshape(q.shape[:2] + (-1,))


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_the_plain_form(dtype, tolerance, masked):
    inputs = arrays(2, 9, 24, count=3, dtype=dtype)
    mask = reference.causal_mask(9, 9) if masked else None
    assert_close_with_gradients(
        lambda q, k, v: forms.attend(q, k, v, mask, 3),
        lambda q, k, v: plain_attention(q, k, v, mask, 3),
        inputs,
        tolerance,
    )


def test_attention_stays_finite_for_large_scores_and_rows_without_keys():
    query, key, value = arrays(1, 4, 8, count=3)
    mask = jnp.zeros((1, 1, 4, 4), bool).at[..., 1:, :].set(True)

    def total(q, k, v):
        return forms.attend(q * 1e4, k, v, mask, 1).sum()

    for x in jax.tree.leaves(jax.value_and_grad(total, (0, 1, 2))(query, key, value)):
        assert jnp.isfinite(x).all()


# Heads 64 and 88 wide share tiles of 128 lanes; three of 88 leave the last tile half full.
@pytest.mark.parametrize(
    "n,m,heads,width,mask",
    [
        (32, 32, 4, 64, None),
        (17, 17, 3, 88, "rows"),
        (16, 40, 3, 88, None),
        (24, 24, 2, 64, "all"),
        (72, 72, 4, 64, "rows"),  # in pairs: so many queries otherwise go one by one
    ],
)
@pytest.mark.parametrize("stacked", [False, True])
def test_kernels_equal_the_plain_form(n, m, heads, width, mask, stacked):
    rng = np.random.default_rng(0)

    def array(length):
        return jnp.asarray(rng.normal(size=(2, length, heads * width)) * 2, jnp.bfloat16)

    query, key, value, gradient = array(n), array(m), array(m), array(n)
    seen = None
    if mask:
        seen = reference.causal_mask(n, n)
        if mask == "rows":
            seen &= jnp.asarray(rng.random((2, 1, 1, m)) > 0.3).at[..., 0].set(True)
    bias = None if seen is None else jnp.where(seen[:, 0], 0.0, attention_kernel.NEGATIVE)
    out, pull = jax.vjp(lambda *x: plain_attention(*x, seen, heads), query, key, value)
    kept, options = [query, key, value, out], {"pairs": n > 64}
    if stacked:  # the middle one of three layers; what stands beside it must stay
        kept = [jnp.stack([x + 1, x, x - 1]) for x in kept]
        stack = jnp.full((3,) + out.shape, 7, out.dtype)
        options["index"] = 1
        got = attention_kernel.forward(
            query, key, value, bias, heads, stack=stack, **options, interpret=True
        )
        assert (got[0] == 7).all() and (got[2] == 7).all()
        got = got[1]
    else:
        got = attention_kernel.forward(query, key, value, bias, heads, **options, interpret=True)
    gradients = attention_kernel.backward(
        *kept[:3], bias, kept[3], gradient, heads, **options, interpret=True
    )
    for ours, wanted in zip((got, *gradients), (out, *pull(gradient))):
        ours, wanted = ours.astype(jnp.float32), wanted.astype(jnp.float32)
        assert jnp.abs(ours - wanted).max() <= 2e-2 * jnp.abs(wanted).max()


def test_kernels_take_no_more_than_fits_a_core():
    def fits(n, m, width, dtype=jnp.bfloat16):
        shape = jax.ShapeDtypeStruct
        return attention_kernel.fits(shape((2, n, width), dtype), shape((2, m, width), dtype))

    assert fits(256, 256, 1408) and fits(65, 65, 768) and fits(64, 256, 1408)
    assert not fits(1024, 1024, 1408) and not fits(1, 256, 768)
    assert not fits(64, 64, 768, jnp.float32)


@pytest.mark.parametrize("n", [16, 65])
def test_norm_kernel_equals_the_plain_gradients(n):
    rng = np.random.default_rng(0)
    x, gradient, beside = (
        jnp.asarray(rng.normal(size=(4, n, 96)) + shift, jnp.bfloat16) for shift in (3, 0, 0)
    )
    scale = jnp.asarray(rng.normal(size=96), jnp.float32)
    mean, inverse = forms.statistics(x, 1e-5)
    wanted = forms.norm_gradients(x, mean, inverse, scale, gradient)
    stack = jnp.stack([x - 1, x])
    dx, sums = norm_kernel.backward(
        stack, scale, gradient, beside, epsilon=1e-5, index=1, interpret=True
    )
    for got, want in (
        (dx, beside + wanted[0]),
        (sums[:, 0].sum(0), wanted[1]),
        (sums[:, 1].sum(0), wanted[2]),
        (sums[:, 2].sum(0), dx.astype(jnp.float32).sum((0, 1))),
    ):
        got, want = got.astype(jnp.float32), want.astype(jnp.float32)
        assert jnp.abs(got - want).max() <= 1e-2 * jnp.abs(want).max()


def test_a_single_query_is_padded_to_what_the_kernel_takes():
    query, key, value = arrays(2, 256, 256, count=3, dtype=jnp.bfloat16)
    text = str(jax.make_jaxpr(lambda q: forms.attend(q, key, value, None, 4))(query[:, :1]))
    assert "name=attention_4_heads" in text and "bf16[2,16,256]" in text
    assert_close_with_gradients(
        lambda q, k, v: forms.attend(q, k, v, None, 4),
        lambda q, k, v: plain_attention(q, k, v, None, 4),
        (query[:, :1], key, value),
        2e-2,
    )


@pytest.mark.parametrize("cross", [None, "paper"])
def test_layers_written_out_equal_a_scan_of_blocks(cross):
    """Gradients included, against the same arithmetic differentiated by JAX."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 10, 32)), jnp.bfloat16)
    context = jnp.asarray(rng.normal(size=(2, 7, 32)), jnp.bfloat16) if cross else None
    mask = (
        reference.causal_mask(10, 10)
        & jnp.asarray([[True] * 10, [True] * 6 + [False] * 4])[:, None, None]
    )
    options = dict(depth=3, num_heads=4, mlp_dim=96, cross=cross)
    shared = layers.BlockOptions(dtype=jnp.bfloat16, ops=ops.Tpu())
    written, scanned = (
        block.Stack(remat=remat, options=shared, **options) for remat in ("named", "none")
    )
    params = partitioning.unbox(scanned.init(jax.random.key(0), x, mask, context))
    params = jax.tree.map(lambda p: p + 0.05 * rng.normal(size=p.shape).astype(p.dtype), params)
    weight = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    def run(stack):
        def scalar(params, x, context):
            return (stack.apply(params, x, mask, context).astype(jnp.float32) * weight).sum()

        arguments = (0, 1, 2) if cross else (0, 1)
        # Else the compiler keeps some bfloat16 values in float32, and others in the other form.
        exact = jax.jit(
            jax.value_and_grad(scalar, arguments),
            compiler_options={"xla_allow_excess_precision": False},
        )
        return exact(params, x, context)

    (ours, our_gradients), (value, gradients) = run(written), run(scanned)
    assert float(ours) == pytest.approx(float(value), rel=1e-4)
    assert jax.tree.structure(our_gradients) == jax.tree.structure(gradients)
    for got, want in zip(jax.tree.leaves(our_gradients), jax.tree.leaves(gradients)):
        got, want = got.astype(jnp.float32), want.astype(jnp.float32)
        assert jnp.abs(got - want).max() <= 1.5e-2 * jnp.abs(want).max() + 1e-6


def test_norm_equals_the_plain_form_with_a_large_mean():
    (x,) = arrays(4, 9, 64, dtype=jnp.bfloat16)
    x = x + jnp.asarray(30, jnp.bfloat16)
    scale, bias = arrays(64, count=2)

    def plain(x, scale, bias):
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
        return (centred * inverse * scale + bias).astype(jnp.bfloat16)

    assert_close_with_gradients(
        lambda *a: forms.layer_norm(*a, 1e-5), plain, (x, scale, bias), 1e-2
    )


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_gelu_and_bias_equal_the_plain_forms(dtype, tolerance):
    (x,) = arrays(4, 9, 16, dtype=dtype)
    (bias,) = arrays(16, dtype=dtype)

    def plain(x, bias):
        return jax.nn.gelu(x.astype(jnp.float32) + bias.astype(jnp.float32)).astype(dtype)

    assert_close_with_gradients(forms.bias_gelu, plain, (x * 3, bias), tolerance)
    assert_close_with_gradients(forms.add_bias, lambda x, b: x + b, (x, bias), tolerance)


def test_sums_on_the_matrix_unit_keep_float32_accuracy():
    (x,) = arrays(8, 1408)
    np.testing.assert_allclose(
        forms.row_sum(jnp.square(x))[:, 0], np.square(np.asarray(x)).sum(-1), rtol=1e-5
    )
    whole = jnp.round(x * 8)  # exact in bfloat16
    np.testing.assert_allclose(forms.column_sum(whole), whole.sum(0), rtol=1e-6)


FORMS = [ops.Cpu(), ops.Gpu(cudnn=False), ops.Tpu(), ops.Tpu(kernels=False)]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.description)
@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_every_operation_of_every_form_equals_the_reference(form, dtype, tolerance):
    """dense, add_bias, bias_activation, layer_norm, convolve (of images too) and attend (masked,
    causal, across)."""
    plain = ops.Reference()
    x, y, z = arrays(2, 9, 24, count=3, dtype=dtype)
    (kernel,) = arrays(24, 40)
    scale, bias = arrays(24, count=2)
    wide_bias = arrays(40, dtype=dtype, seed=1)[0]
    hidden = arrays(2, 9, 40, dtype=dtype, seed=2)[0]
    valid = jnp.asarray([[True] * 9, [True] * 6 + [False] * 3])[:, None, None]

    def check(call, *inputs):
        assert_close_with_gradients(
            lambda *a: call(form, *a), lambda *a: call(plain, *a), inputs, tolerance
        )

    check(lambda f, x, k: f.dense(x, k, dtype), x, kernel)
    check(lambda f, h, b: f.add_bias(h, b), hidden, wide_bias)
    for activation in reference.ACTIVATIONS:
        check(lambda f, h, b: f.bias_activation(h, b, activation), hidden, wide_bias)  # noqa: B023
    check(lambda f, x, s, b: f.layer_norm(x, s, b, dtype), x * 3 + 1, scale, bias)
    for mask, causal in ((None, False), (None, True), (valid, True)):
        mask, causal = plain.prepare_mask(mask, causal, 9)
        check(lambda f, *a: f.attend(*a, mask, 3, causal), x, y, z)  # noqa: B023
    check(lambda f, *a: f.attend(*a, None, 3), x[:, :1], y, z)
    for channels, stride in ((3, 2), (8, 2), (8, 1)):
        pixels, filters = arrays(2, 6, 6, channels, dtype=dtype)[0], arrays(3, 3, channels, 16)[0]
        for before in (None, reference.Before("relu", 0.5, 2.0)):
            check(
                lambda f, x, k, b: f.convolve(x, k, b, stride, dtype, before),  # noqa: B023
                pixels,
                filters,
                arrays(16)[0],
            )


def test_on_a_cpu_bfloat16_is_in_products_alone():
    """Operands are rounded to it; results, and what lies between products, are float32."""
    form = ops.Cpu()
    x, kernel = arrays(4, 24)[0], arrays(24, 40)[0]
    rounded = (a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, kernel))
    got = form.dense(x, kernel, jnp.bfloat16)
    assert got.dtype == form.stream_dtype(jnp.bfloat16) == jnp.float32
    np.testing.assert_allclose(got, jnp.dot(*rounded, precision="highest"), rtol=1e-5, atol=1e-6)
    assert form.layer_norm(x, x[0], x[1], jnp.bfloat16).dtype == jnp.float32
    assert (
        ops.Gpu().stream_dtype(jnp.bfloat16) == ops.Tpu().kernel_dtype(jnp.bfloat16) == "bfloat16"
    )


def test_options_of_the_compiler_are_ones_that_it_knows():
    assert ops.compiler_options("tpu") == ops.compiler_options("rocm") == {}
    assert ops.compiler_options("gpu") == ops.compiler_options("cuda") == gpu.COMPILER_OPTIONS
    run = jax.jit(lambda x: x + 1, compiler_options=ops.compiler_options("cpu"))
    assert run(1.0) == 2.0


@pytest.mark.parametrize("queries,keys", [(1, 9), (9, 9), (8, 8), (8, 5)])
@pytest.mark.parametrize("masked,causal", [(False, False), (True, False), (True, True)])
def test_attention_padded_for_cudnn_equals_the_plain_form(queries, keys, masked, causal):
    """Odd lengths and a single query, through the same code with XLA in cuDNN's place."""
    (query,), (key, value) = arrays(2, queries, 3, 8), arrays(2, keys, 3, 8, count=2, seed=1)
    mask = jnp.arange(keys)[None, None, None] < jnp.asarray([keys, keys - 2])[:, None, None, None]
    mask = mask if masked else None
    if causal and queries != keys:
        pytest.skip("causal order is that of a text over itself")
    order = reference.causal_mask(queries, keys) if causal else jnp.ones((1, 1, 1, 1), bool)
    seen = order if mask is None else order & mask
    assert_close_with_gradients(
        lambda *a: gpu.library_attention(*a, mask, causal, implementation="xla"),
        lambda *a: reference.attend(*a, jnp.broadcast_to(seen, (2, 1, queries, keys))),
        (query, key, value),
        1e-5,
    )


@dataclasses.dataclass(frozen=True)
class CudnnByXla(ops.Gpu):
    """The form for GPUs with XLA's attention in cuDNN's place, which no CPU has."""

    def attend(self, query, key, value, mask, heads, causal=False):
        split = (reference.split_heads(x, heads) for x in (query, key, value))
        out = gpu.library_attention(*split, mask, causal, implementation="xla")
        return reference.merge_heads(out)


@pytest.mark.parametrize("causal,masked,turned", [(False, False, True), (True, True, False)])
def test_a_stack_padded_once_for_cudnn_equals_the_plain_one(causal, masked, turned):
    """An odd length: the encoder's without a mask, the lower half's with valid tokens."""
    x = arrays(2, 9, 16, dtype=jnp.bfloat16)[0]
    mask = (jnp.arange(9) < jnp.asarray([[9], [6]]))[:, None, None] if masked else None
    turns = rotary.of_places(jnp.arange(9)[None, :, None], 8, 100.0) if turned else None

    def stack(form):
        options = layers.BlockOptions(dtype=jnp.bfloat16, ops=form)
        built = block.Stack(
            depth=2, num_heads=2, mlp_dim=24, causal=causal, options=options, remat="none"
        )
        if form != CudnnByXla():
            return built
        assert form.pad_sequences(x, mask, turns, 2, causal)[0].shape == (2, 10, 16)
        return built

    params = nn.meta.unbox(stack(ops.Reference()).init(jax.random.key(0), x, mask))
    got, want = (
        jax.value_and_grad(
            lambda p, x, m=m: jnp.square(
                m.apply(p, x, mask, None, turns).astype(jnp.float32)
            ).mean(),
            argnums=(0, 1),
        )(params, x)
        for m in (stack(CudnnByXla()), stack(ops.Reference()))
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.shape == b.shape
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        assert float(jnp.abs(a - b).max()) <= 0.03 * float(jnp.abs(b).max()) + 1e-6


def test_the_residual_stream_of_several_gpus_stays_where_it_is():
    """Each device adds its rows; a layout that is asked for gathers nothing."""
    mesh = partitioning.make_mesh(2, 2, 1, jax.devices()[:4])
    rows = jax.sharding.NamedSharding(mesh, partitioning.spec("batch"))
    x, y = (jax.device_put(a, rows) for a in arrays(8, 3, 4, count=2))
    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(lambda x, y: (ops.Gpu().add_update(x, y) ** 2).sum()))
        assert "all-gather" not in run.lower(x, y).compile().as_text()
        np.testing.assert_allclose(run(x, y)[1], 2 * (x + y), rtol=1e-6)


def test_the_norm_s_single_pass_loses_nothing_to_a_mean_far_from_zero():
    x = np.random.default_rng(0).normal(3000.0, 1.0, (8, 512)).astype(np.float32)
    x[:4, 0] = -1e5  # the number that distances are taken from is an outlier itself
    exact = x.astype(np.float64)
    centred = exact - exact.mean(-1, keepdims=True)
    want = centred / np.sqrt(exact.var(-1, keepdims=True) + reference.NORM_EPSILON)
    got = gpu.layer_norm(jnp.asarray(x), jnp.ones(512), jnp.zeros(512))
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


def test_the_form_follows_the_platform_and_the_request():
    assert ops.choose("cpu") == ops.Cpu() and ops.choose("tpu") == ops.Tpu()
    assert ops.choose("gpu") == ops.choose("cuda") == ops.Gpu(cudnn=True)
    assert ops.choose("gpu", "xla") == ops.choose("rocm") == ops.Gpu(cudnn=False)
    assert ops.choose("tpu", "xla") == ops.Tpu(kernels=False)
    model = base.get_config().model
    for platform, remat in (("cpu", "named"), ("gpu", "none"), ("tpu", "none")):
        built = coca.build(model, remat="auto", platform=platform)
        assert built.encoder.remat == built.decoder.remat == remat
    for platform in ("cpu", "gpu", "tpu"):
        assert type(ops.choose(platform, "reference")) is ops.Reference
    with pytest.raises(ValueError, match="model.implementation='fast'; choose from auto, xla"):
        ops.choose("cpu", "fast")


def test_forms_step_aside_for_what_they_do_not_know_and_say_so(caplog):
    fields = dict(
        num_heads=2, mlp_dim=8, depth=1, cross=None, activation="gelu", dtype=jnp.bfloat16
    )
    assert ops.Tpu().layer_loop(fields, "named") is not None
    for change in (dict(activation="relu"), dict(cross="open_clip"), dict(some_new_option=True)):
        caplog.clear()
        assert ops.Tpu().layer_loop({**fields, **change}, "named") is None
        assert str(list(change)[0]) in caplog.text
    assert ops.Tpu().layer_loop(fields, "none") is None
    assert ops.Tpu(kernels=False).layer_loop(fields, "named") is None
    (query,) = arrays(1, 4, 12)
    ops.Gpu().attend(query, query, query, None, 3)
    assert "without cuDNN: it takes bfloat16 and not float32" in caplog.text
