"""A model without a pooler: the class token is the embedding, the decoder sees the patches."""

import jax
import numpy as np
import pytest
from conftest import tiny_config
from test_inference import TEXTS, images, random_params, words  # noqa: F401

from coca_jax import inference
from coca_jax.config import typed
from coca_jax.estimate.flops import model_flops
from coca_jax.models import coca


def without(**image):
    config = tiny_config()
    config.model.pooler.kind = "none"
    config.model.image.update(depth=1, class_token=True, **image)
    config.model.text.update(vocab_size=320, max_len=24, unimodal_depth=1, multimodal_depth=1)
    return config


def test_captions_written_from_a_cache_are_those_of_the_whole_pass(words, images):  # noqa: F811
    config = without()
    module = coca.build(config.model)
    params = random_params(module)
    assert not {"generative_pooler", "contrastive_pooler", "pooled_norm"} & set(params)
    model = inference.CoCaModel(config, params, words, batch_size=8, devices=jax.devices()[:1])
    tokens, _ = words.encode_batch(TEXTS, model.max_len)
    out = model.forward((images / 255 - 0.5) / 0.5, tokens)
    assert out.image_tokens.shape == (6, 4, 16)  # of 2 x 2 patches
    np.testing.assert_allclose(model.encode_image(images), out.image_embedding, atol=1e-5)
    found = [row[0] for row in model.captions(images, max_new_tokens=8, min_new_tokens=3)]
    for caption, explained in zip(found, model.explain(images, found)):
        total = sum(word.log_prob for word in explained.words)
        assert total == pytest.approx(caption.log_prob, abs=1e-3)


def test_what_it_needs_is_a_line():
    with pytest.raises(ValueError, match="image.class_token=False .*kind='none'. Set True"):
        config = without()
        config.model.image.class_token = False
        coca.build(config.model)
    with pytest.raises(ValueError, match="image.width=32 .*kind='none'. Set 16"):
        coca.build(without(width=32).model)
    config = typed(without()).change({"data.resize": "native"})
    with pytest.raises(ValueError, match="pooler.kind='none' does not go with data.resize='nat"):
        config.change({"steps": 5, "data.sources": (dict(builtin="scenes"),)}).check()


def test_its_operations_have_no_pooler_s():
    pooled = typed(tiny_config()).change({"model.image.class_token": True}).model
    bare = pooled.change({"pooler.kind": "none"})
    more = pooled.change({"pooler.num_queries": pooled.num_patches})
    assert model_flops(bare) < model_flops(more)
