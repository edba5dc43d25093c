"""The form for TPUs: its kernels, interpreted, and its arithmetic against plain forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_cases import arrays, assert_close, assert_close_with_gradients, drawn, plain_attention

from coca_jax import ops
from coca_jax.models import block, layers
from coca_jax.ops import reference, tpu_attention, tpu_attention_long, tpu_attention_short, tpu_norm


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_the_plain_form(dtype, tolerance, masked):
    inputs = arrays(2, 9, 24, count=3, dtype=dtype)
    mask = reference.causal_mask(9, 9) if masked else None
    assert_close_with_gradients(
        lambda q, k, v: tpu_attention.attend(q, k, v, mask, 3),
        lambda q, k, v: plain_attention(q, k, v, mask, 3),
        inputs,
        tolerance,
    )


def test_attention_stays_finite_for_large_scores_and_rows_without_keys():
    query, key, value = arrays(1, 4, 8, count=3)
    mask = jnp.zeros((1, 1, 4, 4), bool).at[..., 1:, :].set(True)

    def total(q, k, v):
        return tpu_attention.attend(q * 1e4, k, v, mask, 1).sum()

    run = jax.jit(jax.value_and_grad(total, (0, 1, 2)))
    for x in jax.tree.leaves(run(query, key, value)):
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
def test_kernels_equal_the_plain_form(n, m, heads, width, mask):
    """Alone, and as the middle one of three layers: what stands beside it must stay."""
    rng = np.random.default_rng(0)
    query, key, value, gradient = (
        (rng.normal(size=(2, length, heads * width)) * 2).astype(jnp.bfloat16)
        for length in (n, m, m, n)
    )
    seen = bias = None
    if mask:
        seen = np.tri(n, dtype=bool)[None, None]
        if mask == "rows":
            seen = seen & (rng.random((2, 1, 1, m)) > 0.3)
            seen[..., 0] = True
        bias = np.where(seen[:, 0], 0.0, tpu_attention_short.NEGATIVE).astype(np.float32)
    options = dict(pairs=n > 64, interpret=True)

    @jax.jit  # in one program: there are many small operations
    def run(query, key, value, gradient):
        out, pull = jax.vjp(lambda *x: plain_attention(*x, seen, heads), query, key, value)
        call, found = (query, key, value, bias), []
        single = tpu_attention_short.forward(*call, heads, **options)
        found.append(
            (single, *tpu_attention_short.backward(*call, out, gradient, heads, **options))
        )
        *stacks, outs = (jnp.stack([x + 1, x, x - 1]) for x in (query, key, value, out))
        call, stack = (*stacks, bias), jnp.full_like(outs, 7)
        stack = tpu_attention_short.forward(*call, heads, stack=stack, index=1, **options)
        gradients = tpu_attention_short.backward(*call, outs, gradient, heads, index=1, **options)
        found.append((stack[1], *gradients))
        return (out, *pull(gradient)), found, stack

    wanted, found, stack = run(query, key, value, gradient)
    assert (np.asarray(stack[0]) == 7).all() and (np.asarray(stack[2]) == 7).all()
    for each in found:
        assert_close(each, wanted, 2e-2)


def test_kernels_take_no_more_than_fits_a_core():
    def fits(n, m, width, dtype=jnp.bfloat16):
        shape = jax.ShapeDtypeStruct
        return tpu_attention_short.fits(shape((2, n, width), dtype), shape((2, m, width), dtype))

    assert fits(256, 256, 1408) and fits(65, 65, 768) and fits(64, 256, 1408)
    assert not fits(1024, 1024, 1408) and not fits(1, 256, 768)
    assert not fits(64, 64, 768, jnp.float32)


# Blocks of 32 queries meet blocks of 32 keys; heads as above.
@pytest.mark.parametrize(
    "n,m,heads,width,pairs", [(64, 96, 3, 88, False), (64, 64, 4, 64, True), (16, 64, 1, 64, False)]
)
def test_kernels_for_long_sequences_equal_the_plain_form(n, m, heads, width, pairs, monkeypatch):
    for name in ("MOST_FORWARD", "MOST_QUERIES", "MOST_KEYS", "LEAST"):
        monkeypatch.setattr(tpu_attention_long, name, 32)
    query, key, value, gradient = (
        arrays(2, length, heads * width, dtype=jnp.bfloat16, seed=seed)[0] * 2
        for seed, length in enumerate((n, m, m, n))
    )
    options = dict(index=1, pairs=pairs, interpret=True)

    @jax.jit  # in one program: there are many small operations
    def run(query, key, value, gradient):
        out, pull = jax.vjp(lambda *x: plain_attention(*x, None, heads), query, key, value)
        stack = jnp.full((3,) + out.shape, 7, out.dtype)
        operands = [jnp.stack([x + 1, x, x - 1]) for x in (query, key, value)]
        got, sums = tpu_attention_long.forward(*operands, heads, stack=stack, **options)
        scores = jnp.einsum(
            "bnhk,bmhk->bnhm", *(reference.split_heads(x, heads) for x in (query, key)),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        all_sums = jax.nn.logsumexp(scores * width**-0.5, -1)
        kept = (jnp.stack([out - 1, out, out]), gradient, jnp.stack([sums + 1, sums, sums]))
        gradients = tpu_attention_long.backward(*operands, *kept, heads, **options)
        return (out, *pull(gradient)), (got[1], *gradients), got, sums[..., :heads], all_sums

    wanted, found, got, sums, all_sums = run(query, key, value, gradient)
    assert (np.asarray(got[0]) == 7).all() and (np.asarray(got[2]) == 7).all()
    np.testing.assert_allclose(sums, all_sums, rtol=1e-4, atol=1e-4)
    assert_close(found, wanted, 2e-2)


def test_long_sequences_take_the_kernels_for_them(caplog):
    """On a CPU the program beside the kernels runs; its results are the plain form's."""
    query, key, value = arrays(1, 512, 64, count=3, dtype=jnp.bfloat16)

    def attend(q, k, v):
        return tpu_attention.attend(q, k, v, None, 1)

    text = str(jax.make_jaxpr(jax.grad(lambda q: attend(q, key, value).sum()))(query))
    assert "name=long_attention_1_heads" in text
    assert "name=long_attention_gradient_1_heads" in text
    assert_close_with_gradients(
        attend, lambda q, k, v: plain_attention(q, k, v, None, 1), (query, key, value), 2e-2
    )
    single = str(jax.make_jaxpr(attend)(query[:, :1], *arrays(1, 8192, 64, count=2)))
    assert "long_attention" not in single  # float32
    mask = reference.causal_mask(512, 512)
    reference.log_once.cache_clear()
    with caplog.at_level("WARNING", "coca_jax"):
        masked = jax.make_jaxpr(lambda q: tpu_attention.attend(q, key, value, mask, 1))(query)
    assert "long_attention" not in str(masked)
    assert "attention of 512 tokens to 512 runs as XLA makes it" in caplog.text

    def fits(n, m, width):
        shape = jax.ShapeDtypeStruct
        bfloat16 = jnp.bfloat16
        return tpu_attention_long.fits(
            shape((2, n, width), bfloat16), shape((2, m, width), bfloat16)
        )

    assert fits(1024, 1024, 1408) and fits(256, 1024, 1408) and fits(16, 1024, 1408)
    assert not fits(1028, 1028, 1408) and not fits(4096, 4096, 1408)
    # Blocks of 80 x 160 tokens, and of 16 x 16: those took four times what XLA's form does.
    assert fits(320, 320, 768) and not fits(272, 272, 768)


@pytest.mark.parametrize("n", [16, 65, 512])
def test_norm_kernel_equals_the_plain_gradients(n):
    rng = np.random.default_rng(0)
    x, gradient, beside = (
        (rng.normal(size=(4, n, 96)) + shift).astype(jnp.bfloat16) for shift in (3, 0, 0)
    )
    scale = rng.normal(size=96).astype(np.float32)

    @jax.jit  # in one program: there are many small operations
    def run(x, scale, gradient, beside):
        mean, inverse = tpu_norm.statistics(x, 1e-5)
        plain = tpu_norm.norm_gradients(x, mean, inverse, scale, gradient)
        dx, sums = tpu_norm.backward(
            jnp.stack([x - 1, x]), scale, gradient, beside, epsilon=1e-5, index=1, interpret=True
        )
        wanted = (beside + plain[0], *plain[1:], dx.astype(jnp.float32).sum((0, 1)))
        return (dx, *sums.sum(0)), wanted

    assert_close(*run(x, scale, gradient, beside), 1e-2)


def test_a_single_query_is_padded_to_what_the_kernel_takes():
    query, key, value = arrays(2, 256, 256, count=3, dtype=jnp.bfloat16)
    text = str(jax.make_jaxpr(lambda q: tpu_attention.attend(q, key, value, None, 4))(query[:, :1]))
    assert "name=attention_4_heads" in text and "bf16[2,16,256]" in text
    assert_close_with_gradients(
        lambda q, k, v: tpu_attention.attend(q, k, v, None, 4),
        lambda q, k, v: plain_attention(q, k, v, None, 4),
        (query[:, :1], key, value),
        2e-2,
    )


@pytest.mark.parametrize("cross,long", [(None, False), ("paper", False), (None, True)])
@pytest.mark.long
def test_layers_written_out_equal_a_scan_of_blocks(cross, long, monkeypatch):
    """Gradients included, against the same arithmetic differentiated by JAX."""
    rng = np.random.default_rng(0)
    length = 16 if long else 10
    x = jnp.asarray(rng.normal(size=(2, length, 32)), jnp.bfloat16)
    context = jnp.asarray(rng.normal(size=(2, 7, 32)), jnp.bfloat16) if cross else None
    mask = (
        reference.causal_mask(10, 10)
        & jnp.asarray([[True] * 10, [True] * 6 + [False] * 4])[:, None, None]
    )
    if long:  # 16 tokens stand for what is too long for one block
        mask = None
        monkeypatch.setattr(tpu_attention_short, "MOST_WEIGHTS", 0)
        weights = jax.make_jaxpr(lambda x: tpu_attention.forward(x, x, x, None, 4))(x)
        assert weights.out_avals[1].shape == (2, 16, tpu_attention_short.LANES)
    options = dict(depth=3, num_heads=4, mlp_dim=96, cross=cross)
    shared = layers.BlockOptions(dtype=jnp.bfloat16, ops=ops.Tpu())
    plain = layers.BlockOptions(dtype=jnp.float32, ops=ops.Reference())
    written, scanned, true = (
        block.Stack(remat=remat, options=form, **options)
        for remat, form in (("named", shared), ("none", shared), ("none", plain))
    )
    params = drawn(jax.eval_shape(scanned.init, jax.random.key(0), x, mask, context), 0.15)
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
    precise = None
    pairs = zip(jax.tree.leaves(our_gradients), jax.tree.leaves(gradients), strict=True)
    for place, pair in enumerate(pairs):
        got, want = (np.asarray(x, np.float32) for x in pair)
        if np.abs(got - want).max() <= 1.5e-2 * np.abs(want).max() + 1e-6:
            continue
        # Some versions of XLA round the scan's values at other places, farther from float32.
        precise = precise or jax.tree.leaves(run(true)[1])
        true_one = np.asarray(precise[place], np.float32)
        known = min(np.abs(want - true_one).max(), 2e-2 * np.abs(true_one).max())
        assert np.abs(got - true_one).max() <= known


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
        lambda *a: tpu_norm.layer_norm(*a, 1e-5), plain, (x, scale, bias), 1e-2
    )


@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_gelu_and_bias_equal_the_plain_forms(dtype, tolerance):
    (x,) = arrays(4, 9, 16, dtype=dtype)
    (bias,) = arrays(16, dtype=dtype)

    def plain(x, bias):
        return jax.nn.gelu(x.astype(jnp.float32) + bias.astype(jnp.float32)).astype(dtype)

    assert_close_with_gradients(tpu_norm.bias_gelu, plain, (x * 3, bias), tolerance)
    assert_close_with_gradients(tpu_norm.add_bias, lambda x, b: x + b, (x, bias), tolerance)


def test_sums_on_the_matrix_unit_keep_float32_accuracy():
    (x,) = arrays(8, 1408)
    np.testing.assert_allclose(
        tpu_norm.row_sum(jnp.square(x))[:, 0], np.square(np.asarray(x)).sum(-1), rtol=1e-5
    )
    whole = jnp.round(x * 8)  # exact in bfloat16
    np.testing.assert_allclose(tpu_norm.column_sum(whole), whole.sum(0), rtol=1e-6)
