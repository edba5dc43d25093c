"""The model: exact sizes, what each part may see, what padding may not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_batch, tiny_config
from ops_cases import drawn

from coca_jax.models import coca, param_groups, text_decoder
from coca_jax.parallel import sharding
from coca_jax.recipes import coca_2b, coca_224, coca_base, coca_large


def some_params(model):
    """Away from the symmetric start, so that every path carries signal."""
    return drawn(jax.eval_shape(lambda: coca.init(model, jax.random.key(0))))


def count_parameters(params):
    """Parameters by part, split as in the paper's Table 1.

    'encoder' and 'decoder' hold what Table 1 counts (blocks, embeddings, softmax layer);
    'generative_pooler' and 'contrastive_pooler' it leaves out; 'extras' are the text positions,
    [CLS], the decoder's two last norms, the projections to the joint space, temperature and bias.
    """

    def size(tree):
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))

    decoder = params["text_decoder"]
    table1 = ("token_embedding", "unimodal", "multimodal", "head")
    counts = {
        "encoder": size(params["image_encoder"]),
        "decoder": size({k: v for k, v in decoder.items() if k in table1}),
        "generative_pooler": size(params["generative_pooler"]),
        "contrastive_pooler": size(params["contrastive_pooler"]),
    }
    total = size(params)
    return counts | {"extras": total - sum(counts.values()), "total": total}


def count(config):
    model = coca.build(config.model)
    boxed = jax.eval_shape(lambda: coca.init(model, jax.random.key(0)))
    return count_parameters(sharding.unbox(boxed))


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
    batch = random_batch(config)
    pixels = np.asarray(batch["image"], np.float32) / 127.5 - 1
    forward = jax.jit(lambda p, *xs: model.apply({"params": p}, *xs))
    return model, some_params(model), forward, pixels, batch["tokens"], batch["text_valid"]


def with_other_tokens(tokens, t):
    """Other ones at position t."""
    return np.where(np.arange(tokens.shape[1]) == t, (tokens + 7) % 64, tokens)


def logits(outputs):
    return np.asarray(outputs.logits)


def test_no_position_sees_later_ones(setup):
    _, params, forward, pixels, tokens, valid = setup
    everything = np.ones_like(valid)
    before = logits(forward(params, pixels, tokens, everything))
    for t in range(1, tokens.shape[1]):
        changed = with_other_tokens(tokens, t)
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
        changed = with_other_tokens(tokens, t)
        after = forward(params, pixels, changed, valid)
        moved = np.abs(np.asarray(after.text_embedding) - before.text_embedding).max(1)
        seen = np.asarray(valid[:, t])
        assert (moved[seen] > 1e-4).all()
        assert (moved[~seen] == 0).all()
    decoder = dict(params["text_decoder"])
    decoder["cls"] = jax.tree.map(lambda x: np.roll(x, 3), decoder["cls"])
    after = forward(params | {"text_decoder": decoder}, pixels, tokens, valid)
    np.testing.assert_array_equal(logits(after), logits(before))
    assert np.abs(after.text_embedding - before.text_embedding).max() > 1e-3


def test_padding_changes_nothing(setup):
    _, params, forward, pixels, tokens, valid = setup
    short = valid & (np.arange(8) < 5)[None]
    full = forward(params, pixels, tokens, short)
    garbage = np.where(short, tokens, 9)
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
@pytest.mark.long
def test_the_forms_of_all_platforms_agree(options):
    config = tiny_config()
    change(config, options)
    batch = random_batch(config)
    pixels = np.asarray(batch["image"], np.float32) / 255
    params, outputs = some_params(coca.build(config.model)), []
    for platform in ("cpu", "tpu", "gpu"):
        model = coca.build(config.model, platform=platform)
        forward = jax.jit(lambda p, *xs, model=model: model.apply({"params": p}, *xs).logits)
        outputs.append(forward(params, pixels, batch["tokens"], batch["text_valid"]))
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)
    np.testing.assert_allclose(outputs[0], outputs[2], atol=1e-5)


def test_a_model_without_biases_has_none_and_every_parameter_has_a_role():
    config = tiny_config()
    change(config, OPTIONS["modern"])
    config.model.image.patch_bias = config.model.text.head_bias = False
    model = coca.build(config.model)
    boxed = jax.eval_shape(lambda: coca.init(model, jax.random.key(0)))
    kinds = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(sharding.unbox(boxed)):
        names = param_groups.names_of(path)
        kinds.setdefault(param_groups.role_of(names).kind, set()).add("/".join(names[-2:]))
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
            {"params": sharding.unbox(coca.init(model, key))},
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
    params = jax.eval_shape(lambda: sharding.unbox(coca.init(model, jax.random.key(0))))
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
        (dict(image=dict(block=dict(width=8))), "model.image.block.*no key 'width'"),
        (
            dict(text=dict(block=dict(norm_eps=2.0))),
            "model.text.block.*norm_eps=2.0: give a number",
        ),
        (dict(text=dict(kv_heads=3)), "model.text.kv_heads=3 does not divide num_heads"),
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
    config.model.text.update(num_heads=4, multimodal_heads=3)
    with pytest.raises(ValueError, match="multimodal_heads=3 does not divide width=16"):
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
            text_decoder.decoder(config.model, num_ids=64, eos_id=1)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_products_in_float32_of_a_model_in_bfloat16_are_that(platform):
    """Those to the joint space, whose operands accelerators round unless told."""
    model = coca.build(tiny_config(dtype="bfloat16").model, platform=platform)
    params = jax.eval_shape(lambda: sharding.unbox(coca.init(model, jax.random.key(0))))
    batch = random_batch(tiny_config())

    def embeddings(params, image, tokens):
        image = model.apply({"params": params}, image / 255.0, method="encode_image")[0]
        return image, model.apply({"params": params}, tokens, tokens != 0, method="encode_text")

    traced = jax.jit(embeddings).trace(params, batch["image"], batch["tokens"])
    lines = traced.lower(lowering_platforms=(platform,)).as_text().splitlines()
    products = [line for line in lines if "dot_general" in line and "bf16>" not in line]
    assert len(products) == 2
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
    with jax.default_matmul_precision("highest"):  # as of JAX_DEFAULT_MATMUL_PRECISION
        traced = jax.jit(lambda *given: embeddings(*given)).trace(
            params, batch["image"], batch["tokens"]
        )
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "DEFAULT" not in text and text.count("HIGHEST") > 20
