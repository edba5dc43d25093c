"""Every form of the operations against the reference, values and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ops_cases import arrays, assert_close, assert_close_with_gradients, drawn, with_gradients

from coca_jax import ops
from coca_jax.models import block, coca, layers
from coca_jax.ops import gpu, reference
from coca_jax.parallel import sharding
from coca_jax.recipes import base

FORMS = [ops.Cpu(), ops.Gpu(cudnn=False), ops.Tpu(), ops.Tpu(kernels=False)]


def operations(form, dtype):
    """name: (an operation of a form, its inputs): dense, add_bias, bias_activation, gate, rotate,
    layer_norm, convolve (of images too) and attend (masked, causal, across)."""
    x, y, z = arrays(2, 9, 24, count=3, dtype=dtype)
    (kernel,) = arrays(24, 40)
    scale, bias = arrays(24, count=2)
    wide_bias = arrays(40, dtype=dtype, seed=1)[0]
    hidden, gate = arrays(2, 9, 40, count=2, dtype=dtype, seed=2)
    valid = np.array([[True] * 9, [True] * 6 + [False] * 3])[:, None, None]
    filter_bias = arrays(16)[0]
    angles = np.random.default_rng(3).normal(size=(2, 9, 4)).astype(np.float32)
    rotation = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    found = {
        "dense": (lambda x, k: form.dense(x, k, dtype), (x, kernel)),
        "add_bias": (form.add_bias, (hidden, wide_bias)),
        "rotate": (lambda x: form.rotate(x, rotation, 3), (x,)),
        "layer_norm": (lambda x, s, b: form.layer_norm(x * 3 + 1, s, b, dtype), (x, scale, bias)),
        "attend across": (lambda *a: form.attend(*a, None, 3), (x[:, :1], y, z)),
    }
    for name in reference.ACTIVATIONS:
        activate = functools.partial(form.bias_activation, activation=name)
        found[f"bias and {name}"] = activate, (hidden, wide_bias)
        found[f"gate of {name}"] = functools.partial(form.gate, activation=name), (hidden, gate)
    for mask, causal in ((None, False), (None, True), (valid, True)):
        mask, causal = ops.Reference().prepare_mask(mask, causal, 9)
        attend = functools.partial(form.attend, mask=mask, heads=3, causal=causal)
        found[f"attend {mask is not None} {causal}"] = attend, (x, y, z)
    for channels, stride in ((3, 2), (8, 2), (8, 1)):
        pixels, filters = arrays(2, 6, 6, channels, dtype=dtype)[0], arrays(3, 3, channels, 16)[0]
        for before in (None, reference.Before("relu", 0.5, 2.0)):
            convolve = functools.partial(form.convolve, stride=stride, dtype=dtype, before=before)
            found[f"convolve {channels} {stride} {before}"] = (
                convolve,
                (pixels, filters, filter_bias),
            )
    return found


@functools.cache
def outcomes(form, dtype):
    """Of all operations, compiled together: one by one it takes twice as long."""
    calls = operations(form, dtype)

    @jax.jit
    def run(inputs):
        return {name: with_gradients(call, inputs[name]) for name, (call, _) in calls.items()}

    return run({name: inputs for name, (_, inputs) in calls.items()})


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.description)
@pytest.mark.parametrize("dtype,tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_every_operation_of_every_form_equals_the_reference(form, dtype, tolerance):
    wanted = outcomes(ops.Reference(), dtype)
    for name, found in outcomes(form, dtype).items():
        assert_close(found, wanted[name], tolerance, name)


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
    # Collectives meet in the order that the compiler gives them by itself.
    alone, several = ops.compiler_options("cpu"), ops.compiler_options("cpu", devices=8)
    assert several.items() <= alone.items() and "xla_cpu_scheduler_type" not in several


def test_a_step_on_a_cpu_writes_moments_in_place():
    """Without the compiler's option most of AdamW's would be copied whole first."""
    own = ops.compiler_options("cpu", devices=8)  # without the order, which spares a part too
    options = dict(own)
    if not options.pop("xla_cpu_copy_insertion_use_region_analysis", False):
        pytest.skip("this jaxlib has no such option")
    rule = optax.adamw(0.1)
    params = {name: arrays(256, 256, seed=seed)[0] for seed, name in enumerate("ab")}
    gradients = jax.tree.map(lambda x: x + 1, params)

    def step(state, gradients):
        params, moments = state
        finite = jnp.isfinite(gradients["a"][0, 0])
        updates, new = rule.update(gradients, moments, params)
        moved = jax.tree.map(jnp.add, params, updates)
        return jax.tree.map(lambda n, o: jnp.where(finite, n, o), (moved, new), state)

    def compiled(options):
        run = jax.jit(step, donate_argnums=0, compiler_options=options)
        return run.lower((params, rule.init(params)), gradients).compile()

    both = [compiled(o) for o in (own, options)]
    temporaries = [program.memory_analysis().temp_size_in_bytes for program in both]
    moments = 2 * 2 * 256 * 256 * 4
    assert temporaries[0] < 0.1 * moments < 0.9 * moments <= temporaries[1]
    own, other = (
        jax.tree.leaves(program(jax.tree.map(jnp.array, (params, rule.init(params))), gradients))
        for program in both
    )
    for x, y in zip(own, other):
        np.testing.assert_array_equal(x, y)


def test_a_step_on_a_cpu_makes_zeros_for_gradients_when_a_loop_adds_to_them():
    """Without the compiler's option those of all stacks lie there while the forward pass runs."""
    options = dict(ops.compiler_options("cpu"))
    if not options.pop("xla_cpu_scheduler_type", ""):
        pytest.skip("this jaxlib has no such option")
    stacks, rows = arrays(4, 64, 64, count=4), jnp.ones((64, 64))

    def step(stacks, x):
        def loss(stacks):
            y = x
            for stack in stacks:
                y = jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), y, stack)[0]
            return jnp.square(y).sum()

        return jax.tree.map(lambda p, g: p - 0.1 * g, stacks, jax.grad(loss)(stacks))

    both = [
        jax.jit(step, donate_argnums=0, compiler_options=o).lower(stacks, rows).compile()
        for o in (ops.compiler_options("cpu"), options)
    ]
    temporaries = [program.memory_analysis().temp_size_in_bytes for program in both]
    assert temporaries[0] + 2 * stacks[0].nbytes < temporaries[1]
    own, other = (program(jax.tree.map(jnp.array, stacks), rows) for program in both)
    for x, y in zip(own, other):
        np.testing.assert_array_equal(x, y)


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
@pytest.mark.long
def test_a_stack_padded_once_for_cudnn_equals_the_plain_one(causal, masked, turned):
    """An odd length: the encoder's without a mask, the unimodal half's with valid tokens."""
    x = arrays(2, 9, 16, dtype=jnp.bfloat16)[0]
    mask = (jnp.arange(9) < jnp.asarray([[9], [6]]))[:, None, None] if masked else None
    turns = layers.of_places(jnp.arange(9)[None, :, None], 8, 100.0) if turned else None

    def stack(form):
        options = layers.BlockOptions(dtype=jnp.bfloat16, ops=form)
        built = block.Stack(
            depth=2, num_heads=2, mlp_dim=24, causal=causal, options=options, remat="none"
        )
        if form != CudnnByXla():
            return built
        assert form.pad_sequences(x, mask, turns, 2, causal)[0].shape == (2, 10, 16)
        return built

    def gradients(module):
        def value(params, x):
            out = module.apply(params, x, mask, None, turns)
            return jnp.square(out.astype(jnp.float32)).mean()

        options = {"xla_allow_excess_precision": False}  # as operation by operation
        return jax.jit(jax.value_and_grad(value, (0, 1)), compiler_options=options)(params, x)

    plain = stack(ops.Reference())
    params = drawn(jax.eval_shape(plain.init, jax.random.key(0), x, mask), 0.2)
    got, want = (gradients(m) for m in (stack(CudnnByXla()), plain))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= 0.03 * np.abs(b).max() + 1e-6


def test_the_residual_stream_of_several_gpus_stays_where_it_is():
    """Each device adds its rows; a layout that is asked for gathers nothing."""
    mesh = sharding.make_mesh(2, 2, 1, jax.devices()[:4])
    rows = jax.sharding.NamedSharding(mesh, sharding.spec("batch"))
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
    changes = (dict(activation="relu"), dict(cross="open_clip"), dict(some_new_option=True))
    for change in (*changes, layers.BlockOptions(bias=False).beyond(fields)):
        caplog.clear()
        assert ops.Tpu().layer_loop({**fields, **change}, "named") is None
        assert str(list(change)[0]) in caplog.text
    assert ops.Tpu().layer_loop(fields, "none") is None
    assert ops.Tpu(kernels=False).layer_loop(fields, "named") is None
    (query,) = arrays(1, 4, 12)
    ops.Gpu().attend(query, query, query, None, 3)
    assert "without cuDNN: it takes bfloat16 and not float32" in caplog.text
