"""The model: exact sizes, what each part may see, what padding may not change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import params_of, random_batch, tiny_config

from coca_jax import partitioning
from coca_jax.configs import coca_2b, coca_224, coca_base, coca_large
from coca_jax.models import coca, decoding, layers, roles, rotary, stem
from coca_jax.ops.reference import ACTIVATIONS


def initialise(model, seed=0):
    return params_of(model, seed)


def count(config):
    model = coca.build(config.model)
    boxed = jax.eval_shape(lambda: coca.init(model, jax.random.key(0)))
    return coca.count_parameters(partitioning.unbox(boxed))


# coca_paper.md, from Table 1: encoder, decoder, poolers, untied and tied.
PAPER = {
    "base": (coca_base, 85_999_872, 296_843_776, 333_627_648, (2_562_048, 2_366_208)),
    "large": (coca_large, 303_569_920, 483_850_752, 721_820_672, (4_464_640, 4_203_520)),
    "2b": (coca_2b, 1_011_740_288, 1_180_260_864, 2_101_825_152, (8_301_568, 7_942_528)),
}


@pytest.mark.parametrize("name", PAPER)
def test_parameter_counts_are_the_papers(name):
    recipe, encoder, decoder, tied_total, poolers = PAPER[name]
    config = recipe.get_config()
    for tie in (False, True):
        config.model.text.tie_embeddings = tie
        parts = count(config)
        assert parts["encoder"] == encoder
        assert (parts["generative_pooler"], parts["contrastive_pooler"]) == poolers
        if tie:
            assert parts["encoder"] + parts["decoder"] == tied_total
        else:
            assert parts["decoder"] == decoder


def test_only_the_largest_recipe_ties_embeddings():
    assert not coca_base.get_config().model.text.tie_embeddings
    assert not coca_large.get_config().model.text.tie_embeddings
    assert coca_2b.get_config().model.text.tie_embeddings


def test_small_recipe_has_the_published_sizes():
    config = coca_224.get_config()
    model = config.model
    assert (model.image_size, model.image.depth, model.image.width) == (224, 12, 768)
    assert (model.text.unimodal_depth, model.text.multimodal_depth) == (6, 6)
    assert (model.text.vocab_size, model.temperature, config.batch_size) == (30_000, 0.07, 256)
    assert (config.epochs, config.optimizer.learning_rate) == (100, 1e-4)
    assert config.data.label_token and config.log.every_steps == 100


OPTIONS = dict(
    paper={},
    qk_norm=dict(qk_norm=True),
    modern=dict(
        norm="rms",
        bias=False,
        positions="rope",
        gated_mlp=True,
        activation="silu",
        layer_scale=0.5,
        text=dict(kv_heads=2),
        image=dict(registers=2, class_token=True),
    ),
    both=dict(norm_eps=1e-3, bias=False, positions="both", text=dict(kv_heads=1)),
)


def change(config, options):
    for key, value in options.items():
        if isinstance(value, dict):
            config.model[key].update(value)
        else:
            config.model[key] = value


@pytest.fixture(scope="module", params=["cascade", "parallel"])
def setup(request):
    """The paper's model, and the other kind of pooling with the options of later blocks."""
    config = tiny_config()
    config.model.pooler.kind = request.param
    change(config, OPTIONS["modern"] if request.param == "parallel" else {})
    model = coca.build(config.model)
    params = initialise(model, 1)
    # Away from the symmetric start, so that every path carries signal.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
    params = jax.tree.unflatten(tree, noisy)
    batch = random_batch(config)
    pixels = jnp.asarray(batch["image"], jnp.float32) / 127.5 - 1
    forward = jax.jit(lambda p, *xs: model.apply({"params": p}, *xs))
    return (
        model,
        params,
        forward,
        pixels,
        jnp.asarray(batch["tokens"]),
        jnp.asarray(batch["text_valid"]),
    )


def logits(outputs):
    return np.asarray(outputs.logits)


def test_no_position_sees_later_ones(setup):
    _, params, forward, pixels, tokens, valid = setup
    everything = jnp.ones_like(valid)
    before = logits(forward(params, pixels, tokens, everything))
    for t in range(1, tokens.shape[1]):
        changed = tokens.at[:, t].set((tokens[:, t] + 7) % 64)
        after = logits(forward(params, pixels, changed, everything))
        assert np.abs(after[:, :t] - before[:, :t]).max() < 1e-5
        assert np.abs(after[:, t] - before[:, t]).max() > 1e-3


def test_text_embedding_ignores_the_image_and_logits_do_not(setup):
    _, params, forward, pixels, tokens, valid = setup
    a = forward(params, pixels, tokens, valid)
    b = forward(params, pixels[::-1], tokens, valid)
    np.testing.assert_array_equal(a.text_embedding, b.text_embedding)
    assert np.abs(logits(a) - logits(b)).max() > 1e-2
    assert np.abs(a.image_embedding - b.image_embedding).max() > 1e-3


def test_cls_sees_every_valid_token_and_no_token_sees_cls(setup):
    model, params, forward, pixels, tokens, valid = setup
    before = forward(params, pixels, tokens, valid)
    for t in range(tokens.shape[1]):
        changed = tokens.at[:, t].set((tokens[:, t] + 7) % 64)
        after = forward(params, pixels, changed, valid)
        moved = np.abs(after.text_embedding - before.text_embedding).max(1)
        seen = np.asarray(valid[:, t])
        assert (moved[seen] > 1e-4).all()
        assert (moved[~seen] == 0).all()
    decoder = dict(params["text_decoder"])
    decoder["cls"] = jax.tree.map(lambda x: jnp.roll(x, 3), decoder["cls"])
    after = forward(params | {"text_decoder": decoder}, pixels, tokens, valid)
    np.testing.assert_array_equal(logits(after), logits(before))
    assert np.abs(after.text_embedding - before.text_embedding).max() > 1e-3


def test_padding_changes_nothing(setup):
    _, params, forward, pixels, tokens, valid = setup
    short = valid & (jnp.arange(8) < 5)[None]
    full = forward(params, pixels, tokens, short)
    garbage = jnp.where(short, tokens, 9)
    other = forward(params, pixels, garbage, short)
    cut = forward(params, pixels, tokens[:, :5], short[:, :5])
    for outputs in (other, cut):
        np.testing.assert_allclose(full.text_embedding, outputs.text_embedding, atol=1e-6)
        keep = np.asarray(short[:, :5])
        np.testing.assert_allclose(
            logits(full)[:, :5][keep], logits(outputs)[:, :5][keep], atol=1e-5
        )


def test_methods_agree_with_the_forward_pass(setup):
    model, params, forward, pixels, tokens, valid = setup
    outputs = forward(params, pixels, tokens, valid)
    apply = jax.jit(model.apply, static_argnames="method")
    image, image_tokens = apply({"params": params}, pixels, method="encode_image")
    text = apply({"params": params}, tokens, valid, method="encode_text")
    np.testing.assert_allclose(image, outputs.image_embedding, atol=1e-6)
    np.testing.assert_allclose(image_tokens, outputs.image_tokens, atol=1e-6)
    np.testing.assert_allclose(text, outputs.text_embedding, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, atol=1e-5)


def test_poolers_of_both_kinds_have_equal_sizes():
    config = tiny_config()
    sizes = []
    for kind in ("cascade", "parallel"):
        config.model.pooler.kind = kind
        sizes.append(count(config)["total"])
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_the_forms_of_all_platforms_agree(options):
    config = tiny_config()
    change(config, options)
    batch = random_batch(config)
    pixels = jnp.asarray(batch["image"], jnp.float32) / 255
    params, outputs = initialise(coca.build(config.model)), []
    for platform in ("cpu", "tpu", "gpu"):
        forward = jax.jit(coca.build(config.model, platform=platform).apply)
        found = forward({"params": params}, pixels, batch["tokens"], batch["text_valid"])
        outputs.append(found.logits)
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)
    np.testing.assert_allclose(outputs[0], outputs[2], atol=1e-5)


def test_queries_and_keys_are_normed_in_each_head():
    """Against the formula in NumPy; their size no longer matters, and the key's bias does."""
    options = layers.BlockOptions(qk_norm=True)
    attention = layers.Attention(8, 2, options=options)
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    params = partitioning.unbox(attention.init(jax.random.key(1), x)["params"])
    params = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)

    def project(name):
        return np.einsum("bnd,dhk->bnhk", x, params[name]["kernel"]) + params[name]["bias"]

    def normed(name):
        y = project(name)
        inverse = 1 / np.sqrt(np.square(y).mean(-1, keepdims=True) + 1e-5)
        return y * inverse * params[f"{name}_norm"]["scale"]

    scores = np.einsum("bnhk,bmhk->bhnm", normed("query"), normed("key")) / 2
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bhnm,bmhk->bnhk", weights, project("value"))
    want = np.einsum("bnhk,hkd->bnd", mixed, params["out"]["kernel"]) + params["out"]["bias"]
    np.testing.assert_allclose(attention.apply({"params": params}, x), want, atol=2e-6)
    larger = jax.tree.map(lambda p: 50.0 * p, params["query"])
    got = attention.apply({"params": params | {"query": larger}}, x)
    np.testing.assert_allclose(got, want, atol=1e-4)
    bias = jax.grad(lambda p: attention.apply({"params": p}, x)[0, 0, 0])(params)["key"]["bias"]
    assert jnp.abs(bias).max() > 1e-4


def test_rotary_positions_turn_pairs_by_their_place():
    """Against complex numbers; and a score depends on the distance alone."""
    places = jnp.array([[0, 3, 7, 11]])
    rotation = rotary.of_places(places[..., None], 8, 100.0)
    x = jax.random.normal(jax.random.key(0), (1, 4, 16))
    got = np.asarray(rotary.rotate(x, rotation, 2)).reshape(4, 2, 8)
    heads = np.asarray(x).reshape(4, 2, 8)
    angle = np.asarray(places)[0][:, None] * 100.0 ** (-np.arange(4) / 4)
    turned = (heads[..., :4] + 1j * heads[..., 4:]) * np.exp(1j * angle)[:, None]
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=1e-5)
    later = rotary.rotate(x, rotary.of_places(places[..., None] + 5, 8, 100.0), 2)
    scores = [np.einsum("bnd,bmd->nm", y, y) for y in (rotary.rotate(x, rotation, 2), later)]
    np.testing.assert_allclose(*scores, atol=1e-4)


def test_rotary_positions_of_patches_go_by_row_and_column():
    rotation = rotary.of_places(rotary.grid((3, 3), (3, 3)), 8, 100.0).reshape(3, 3, 2, 2, 2)
    rows, columns = rotation[:, :, :, 0], rotation[:, :, :, 1]  # [row, column, cos or sin, wave]
    np.testing.assert_array_equal(rows[:, 0], rows[:, 2])
    np.testing.assert_array_equal(columns[0], columns[2])
    np.testing.assert_allclose(rows[2, 0, 1], np.sin([2, 0.2]), rtol=1e-6)
    np.testing.assert_array_equal(rows[:, 0], columns[0])
    halved = rotary.grid((6, 6), (3, 3)).reshape(
        6, 6, 2
    )  # twice as many patches of the same picture
    np.testing.assert_allclose(halved[:2, 0, 0].mean(), 0.0, atol=1e-6)
    np.testing.assert_allclose(halved[4:, 0, 0].mean(), 2.0, atol=1e-6)


def test_heads_that_share_keys_are_heads_with_equal_keys():
    grouped, whole = layers.Attention(12, 4, kv_heads=2), layers.Attention(12, 4)
    x = jax.random.normal(jax.random.key(0), (2, 5, 12))
    params = partitioning.unbox(grouped.init(jax.random.key(1), x)["params"])
    params = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)
    assert params["key"]["kernel"].shape == (12, 2, 3)
    repeated = {
        name: jax.tree.map(lambda p: jnp.repeat(p, 2, axis=p.ndim - 2), params[name])
        for name in ("key", "value")
    }
    got = grouped.apply({"params": params}, x)
    want = whole.apply({"params": params | repeated}, x)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_gated_mlps_and_norms_are_their_formulas():
    options = layers.BlockOptions(gated_mlp=True, activation="silu", bias=False, norm="rms")
    x = 3 * jax.random.normal(jax.random.key(0), (2, 5, 8)) + 1
    mlp = layers.Mlp(12, options=options)
    params = partitioning.unbox(mlp.init(jax.random.key(1), x)["params"])
    gate, up, out = (np.asarray(params[name]["kernel"]) for name in ("gate", "in", "out"))
    gated = x @ gate / (1 + np.exp(-(x @ gate))) * (x @ up)
    np.testing.assert_allclose(mlp.apply({"params": params}, x), gated @ out, atol=1e-5)
    scale = jnp.linspace(0.5, 2, 8)
    got = layers.Norm(options).apply({"params": {"scale": scale}}, x)
    want = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(got, want, atol=1e-5)
    plain = dataclasses.replace(options, norm="layer", norm_eps=0.5)
    got = layers.Norm(plain).apply({"params": {"scale": scale}}, x)
    want = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.5) * scale
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_model_without_biases_has_none_and_every_parameter_has_a_role():
    config = tiny_config()
    change(config, OPTIONS["modern"])
    config.model.image.patch_bias = config.model.text.head_bias = False
    model = coca.build(config.model)
    boxed = jax.eval_shape(lambda: coca.init(model, jax.random.key(0)))
    kinds = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(partitioning.unbox(boxed)):
        names = roles.names_of(path)
        kinds.setdefault(roles.role_of(names).kind, set()).add("/".join(names[-2:]))
    assert set(kinds) == {"kernel", "norm", "table"}
    assert {"attention_scale/gain", "mlp_scale/gain", "query_norm/scale"} <= kinds["norm"]
    assert "gate/kernel" in kinds["kernel"] and "registers/value" in kinds["table"]
    assert "positions/value" not in kinds["table"]


def test_conv_stem_gives_the_same_number_of_tokens():
    config = tiny_config(patch_size=4, activation="relu")
    config.model.image.update(conv_widths=(8, 12), conv_depths=(0, 1))
    model = coca.build(config.model)
    pixels = jnp.ones((2, 16, 16, 3))
    tokens = jax.eval_shape(
        lambda key: model.apply(
            {"params": partitioning.unbox(coca.init(model, key))},
            pixels,
            method=lambda m, x: m.image_encoder(x),
        ),
        jax.random.key(0),
    )
    assert tokens.shape == (2, 16, 16)
    config.model.patch_size = 8
    with pytest.raises(ValueError, match="conv_widths has 2 stages"):
        coca.build(config.model)


def test_patch_dropout_drops_in_training_only():
    config = tiny_config()
    config.model.image.patch_dropout = 0.5
    model = coca.build(config.model)
    params = jax.eval_shape(lambda: partitioning.unbox(coca.init(model, jax.random.key(0))))
    pixels = jnp.ones((2, 16, 16, 3))

    def encode(m, x, deterministic):
        return m.image_encoder(x, deterministic=deterministic)

    rngs = {"patch_dropout": jax.random.key(0)}
    kept = jax.eval_shape(
        lambda p: model.apply({"params": p}, pixels, False, method=encode, rngs=rngs), params
    )
    whole = jax.eval_shape(
        lambda p: model.apply({"params": p}, pixels, True, method=encode), params
    )
    assert kept.shape[1] == 2 and whole.shape[1] == 4


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(patch_size=7), "model.patch_size=7 does not divide model.image_size=16"),
        (dict(dtype="float16"), "model.dtype='float16'"),
        (dict(activation="swish"), "model.activation='swish'"),
        (dict(image=dict(block=dict(width=8))), "model.image.block: no key 'width' of a block"),
        (dict(text=dict(block=dict(norm_eps=2.0))), "model.text.block.norm_eps=2.0: give a number"),
        (dict(text=dict(kv_heads=3)), "model.text.kv_heads=3 does not divide model.text.num_heads"),
        (dict(positions="rope", image=dict(num_heads=8)), "heads of model.image are 2 wide"),
    ],
)
def test_impossible_models_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        coca.build(tiny_config(**change).model)


def test_heads_must_divide_the_width():
    config = tiny_config()
    config.model.text.num_heads = 5
    with pytest.raises(ValueError, match="model.text.num_heads=5 does not divide"):
        coca.build(config.model)


def test_float64_is_refused_where_it_would_not_be_float64(config):
    config.model.dtype = "float64"
    with pytest.raises(ValueError, match="JAX_ENABLE_X64=1"):
        coca.build(config.model)
    with jax.enable_x64(True):
        assert coca.build(config.model).dtype == jnp.float64
        with pytest.raises(ValueError, match="for checks on the CPU"):
            coca.build(config.model, platform="tpu")
        with pytest.raises(ValueError, match="decoding needs 'float32' or 'bfloat16'"):
            decoding.decoder(config.model, num_ids=64, eos_id=1)


@pytest.mark.parametrize("channels,stride", [(3, 2), (8, 1)])
def test_convolution_standardises_its_kernel(channels, stride):
    """Also of images, whose few channels take another way through unfolded pixels."""
    layer = stem.Convolution(16, stride=stride)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, channels))
    params = partitioning.unbox(layer.init(jax.random.key(1), x)["params"])
    kernel = params["kernel"] * 5 + 0.3  # neither scale nor mean of a kernel matters
    params = params | {"gain": jnp.linspace(0.5, 2, 16), "bias": jnp.linspace(-1, 1, 16)}
    centred = kernel - kernel.mean((0, 1, 2))
    unit = centred / jnp.sqrt(jnp.square(centred).sum((0, 1, 2)))
    want = jax.lax.conv_general_dilated(
        x, unit, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    want = want * params["gain"] + params["bias"]
    got = layer.apply({"params": params | {"kernel": kernel}}, x)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(layer.apply({"params": params}, x), want, atol=1e-4)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_convolutional_stem_keeps_the_variance_of_its_features(activation):
    module = stem.ConvStem((64, 64), (1, 2), activation, jnp.float32)
    pixels = jax.random.normal(jax.random.key(0), (8, 32, 32, 3))
    features = module.apply(module.init(jax.random.key(1), pixels), pixels)
    assert features.shape == (8, 8, 8, 64)
    assert 0.6 < features.std((0, 1, 2)).mean() < 1.4
