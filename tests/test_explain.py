"""Captions while they are written, and why they read as they do."""

import jax
import kept_models
import numpy as np
import pytest
from conftest import tiny_config
from test_inference import TEXTS, images, no_compile_cache, words  # noqa: F401

from coca_jax import inference
from coca_jax.models import attention_maps, coca
from coca_jax.ops import reference
from coca_jax.parallel import sharding


def params_of(module: coca.CoCa) -> dict:
    """Random parameters, without a program that makes them."""
    shapes = jax.eval_shape(lambda: sharding.unbox(coca.init(module, jax.random.key(0))))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def model(words):  # noqa: F811
    config = tiny_config()
    config.model.image.depth = 1
    config.model.text.update(vocab_size=320, max_len=24, unimodal_depth=1, multimodal_depth=1)
    params = params_of(coca.build(config.model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_models, "KEPT", {})  # below they are counted
        yield inference.CoCaModel(config, params, words, batch_size=8, devices=jax.devices()[:1])


def test_streamed_captions_end_as_the_whole_ones(model, images):  # noqa: F811
    for how in (dict(), dict(do_sample=True, num_return_sequences=2, seed=3)):
        how |= dict(max_new_tokens=6, min_new_tokens=2)
        whole = model.captions(images[:3], prompt=["a", "", "two red"], **how)
        steps = list(model.stream_captions(images[:3], prompt=["a", "", "two red"], **how))
        assert len(steps) == max(c.num_tokens for row in whole for c in row)
        for row, last in zip(whole, steps[-1]):
            last = sorted(last, key=lambda caption: -caption.log_prob)
            assert [c.tokens for c in last] == [c.tokens for c in row]
            assert [c.text for c in last] == [c.text for c in row]
            logs = [c.log_prob for c in last]
            np.testing.assert_allclose(logs, [c.log_prob for c in row], atol=1e-4)
        for row in range(3):  # each step adds a token or leaves a finished caption as it is
            for place in range(len(steps[0][row])):
                grown = [step[row][place] for step in steps]
                for old, new in zip(grown, grown[1:]):
                    assert new.tokens[: len(old.tokens)] == old.tokens
                    assert new.num_tokens == old.num_tokens + (not old.finished)
    with pytest.raises(ValueError, match="num_beams=2: beams cannot be streamed"):
        next(model.stream_captions(images[:1], num_beams=2))
    with pytest.raises(ValueError, match="batch_size=8"):
        next(model.stream_captions(np.concatenate([images] * 2)))


def test_words_have_their_probabilities(model, images):  # noqa: F811
    captions = [row[0] for row in model.captions(images, max_new_tokens=8, min_new_tokens=3)]
    found = model.explain(images, captions)
    for caption, explained in zip(captions, found):
        total = sum(word.log_prob for word in explained.words)
        assert total == pytest.approx(caption.log_prob, abs=1e-3)
        text = " ".join(word.text for word in explained.words if word.text)
        assert text.split() == caption.text.split()
        best = explained.words[0].alternatives  # greedy: the first token is the most probable
        assert len(best) == 5 and best[0][1] >= best[1][1]
    scores, _ = model.caption_log_likelihood(images, TEXTS)
    totals = [sum(word.log_prob for word in one.words) for one in model.explain(images, TEXTS)]
    np.testing.assert_allclose(totals, scores, rtol=1e-4)
    (alone,) = model.explain(images[:1], TEXTS[0])
    assert [word.text for word in alone.words] == [*TEXTS[0].split(), ""]
    (written,) = model.explain(images[:1], captions[0])
    assert len(written.words) == len(found[0].words)
    with pytest.raises(ValueError, match="one text an image"):
        model.explain(images[:4], "blue")
    with pytest.raises(ValueError, match="one text an image"):
        model.explain(images, TEXTS[:2])
    with pytest.raises(ValueError, match="one text an image"):
        model.explain(images[:2], TEXTS)


def test_texts_of_any_length_run_by_one_program(model, images):  # noqa: F811
    """A first caption longer than those before it does not wait for a compiler."""
    long = " ".join(["red"] * model.max_len)
    (before,) = model.explain(images[:1], ["a"])
    programs = model._explain._cache_size()
    (after,) = model.explain(images[:1], [long])
    assert len(before.words) == 2 and len(after.words) >= 8  # some tokens each
    assert model._explain._cache_size() == programs


def test_attention_is_over_the_patches(model, images):  # noqa: F811
    for explained in model.explain(images, TEXTS):
        maps = [explained.attention, *(word.attention for word in explained.words)]
        for one in maps:
            assert one.shape == (2, 2) and one.dtype == np.float32 and (one >= 0).all()
            assert one.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "kind, registers",
    [("cascade", 2), ("parallel", 0), ("open_clip", 0), ("none", 2)],
)
def test_attention_of_every_kind_of_pooler(kind, registers):
    """It sums to 1, less what a class token has, and what registers have."""
    config = tiny_config()
    config.model.pooler.kind = kind
    has_class = kind in ("open_clip", "none")
    config.model.image.update(depth=1, class_token=has_class, registers=registers)
    config.model.text.update(unimodal_depth=1, multimodal_depth=1)
    module = attention_maps.recording(coca.build(config.model))
    pixels = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    tokens = np.array([[3, 7, 8, 2], [3, 9, 2, 0]], np.int32)
    run = jax.jit(lambda *inputs: attention_maps.maps(module, *inputs)[1:])
    seen, whole = run(params_of(module), pixels, tokens, tokens > 0)
    assert seen.shape == (2, 4, 4) and whole.shape == (2, 4)
    assert not np.allclose(seen[0, 0], seen[1, 0])  # of another picture
    for sums, loses in ((seen.sum(-1), ("open_clip",)), (whole.sum(-1), ("open_clip", "none"))):
        if kind in loses:
            assert (sums > 0.3).all() and (sums < 0.99).all()
        else:
            np.testing.assert_allclose(sums, 1, atol=1e-5)


def test_recorded_weights_are_those_that_attention_uses():
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(2, n, 8)).astype(np.float32) for n in (3, 5, 5))
    mask = np.array([True, True, False, True, True])[None, None, None]
    weights = reference.attention_weights(query, key, mask, heads=2)
    values = value.reshape(2, 5, 2, 4)
    wanted = np.einsum("bhnm,bmhk->bnhk", weights, values).reshape(2, 3, 8)
    found = reference.Reference().attend(query, key, value, mask, 2)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert not weights[..., 2].any()


def test_clips_have_a_map_for_each_frame(words):  # noqa: F811
    config = tiny_config()
    config.model.image.depth = 1
    config.model.text.update(vocab_size=320, unimodal_depth=1, multimodal_depth=1)
    config.data.num_frames = 3
    module = coca.build(config.model)
    clips = inference.CoCaModel(config, params_of(module), words, devices=jax.devices()[:1])
    videos = np.random.default_rng(0).integers(0, 256, (1, 3, 16, 16, 3), dtype=np.uint8)
    (found,) = clips.explain(videos, ["red"])
    assert found.attention.shape == (3, 2, 2)
    assert found.attention.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(found.attention.sum((1, 2)), 1 / 3, atol=1e-5)
    assert found.words[0].attention.sum() == pytest.approx(1, abs=1e-5)
