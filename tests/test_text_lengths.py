"""Captions cut to a batch's lengths train as whole ones do, on any mesh."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import open_clip_cases as cases
import pytest
from conftest import random_batch, tiny_config
from test_inference import random_params

from coca_jax.checkpoints import config_file
from coca_jax.config import shapes, typed
from coca_jax.data.vocabulary.clip_bpe import ClipBpe
from coca_jax.models import coca
from coca_jax.parallel import sharding
from coca_jax.training import feed
from coca_jax.training.feed import measured
from coca_jax.training.train_step import Parts, loss_and_metrics, value_and_gradients


def _batch(config, lengths):
    batch = random_batch(config)
    batch["text_valid"] = np.arange(config.model.text.max_len)[None] < np.array(lengths)[:, None]
    tokens = np.random.default_rng(1).integers(5, config.model.text.vocab_size, (16, 8))
    batch["tokens"] = np.where(batch["text_valid"], tokens, 0)
    return batch


def _config(parts=4, **changes):
    config = tiny_config()
    config.batch_size, config.text_lengths, config.text_parts = 16, (4, 6), parts
    config.update(changes)
    return config


LENGTHS = [3, 8, 4, 3, 4, 4, 7, 3, 3, 4, 6, 4, 5, 3, 4, 4]  # five above 4, four of them longest


def test_the_longest_rows_stand_in_every_fourth_place():
    config = _config()
    batch = _batch(config, LENGTHS) | {"row": np.arange(16)}
    found = feed.arrange(batch, config)
    assert sorted(found["row"]) == list(range(16))
    assert found["text_valid"].sum(1)[3::4].tolist() == [8, 7, 6, 5]
    assert found["row"][np.arange(16) % 4 != 3].tolist() == [0, 2, 3, 4, 5, 7, 8, 9, 11, 13, 14, 15]
    assert np.array_equal(found["tokens"], batch["tokens"][found["row"]])
    config.accumulate_steps = 2  # row i goes to micro-batch i % 2
    lengths = feed.arrange(batch, config)["text_valid"].sum(1)
    for micro in (lengths[::2], lengths[1::2]):
        assert micro.reshape(2, 4)[:, :3].max() == 4 < micro.reshape(2, 4)[:, 3].min()
    config.text_parts = 1
    assert feed.arrange(batch, config) is batch


def test_an_id_that_is_hidden_inside_a_caption_does_not_shorten_it():
    """CLIP's "!" before another sign has the id of padding."""
    words = ClipBpe(cases.small_merges())
    config = _config(1, text_lengths=(8, 9))
    config.model.text.max_len = 16
    texts = ["the dog !;) the dog", "the dog", "the !; dog"]
    tokens, valid = words.encode_batch(texts, 16)
    assert valid.sum(1).tolist() == [8, 4, 5] and (tokens[:, 3] == 0).tolist() == [1, 0, 0]
    _, answers, prompts = words.encode_answers(["the dog !;"], ["the dog"], 16)
    assert answers[0, :9].tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 0] and prompts[0] == 5
    assert shapes.lengths(valid).tolist() == [9, 4, 6]
    assert shapes.lengths(jnp.asarray(valid)).tolist() == [9, 4, 6]
    assert shapes.lengths(np.zeros((1, 16), bool)).tolist() == [0]
    with jax.set_mesh(sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])):
        longest = feed.longest_text(jnp.asarray(valid), config)
    assert longest.tolist() == [9, 9] and feed.choose(config, longest.tolist()) == (9, 9)
    config.text_parts = 3
    batch = feed.arrange(dict(text_valid=valid[::-1], tokens=tokens[::-1]), config)
    assert shapes.lengths(batch["text_valid"]).tolist() == [6, 4, 9]


def _both_ways(config, mesh, function):
    """function(params, model, config, batch, key, lengths) of the batch as a whole and cut."""
    config.model.image.depth = config.model.text.unimodal_depth = 1
    config.model.text.multimodal_depth = 1
    batch = feed.arrange(_batch(config, LENGTHS), config)
    with jax.set_mesh(mesh):
        model = coca.build(config.model)
        params = random_params(model)
        placed = sharding.place_batch(mesh, batch)
        found = jax.jit(lambda valid: feed.longest_text(valid, config))(placed["text_valid"])
        lengths = feed.choose(config, found.tolist())

        def run(lengths):
            return jax.jit(lambda p, b: function(p, model, config, b, jax.random.key(0), lengths))

        return lengths, run(None)(params, placed), run(lengths)(params, placed)


def _close(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-5 * max(float(jnp.abs(b).max()), 1e-3))


@pytest.mark.slow
def test_gradients_are_those_of_whole_captions(one_device_mesh):
    config = _config(4)
    lengths, whole, split = _both_ways(config, one_device_mesh, value_and_gradients)
    assert lengths == (4, 8)
    _close(split, whole)


@pytest.mark.long
def test_losses_are_those_of_whole_captions_on_a_mesh_with_the_shifted_mask():
    config = _config(4)
    mesh = sharding.make_mesh(2, 2, 1, devices=jax.devices()[:4])
    with config.unlocked():
        config.model.bias = False  # fewer arrays
        config.model.text.cls_mask = "shifted"
    lengths, whole, split = _both_ways(config, mesh, loss_and_metrics)
    assert lengths == (6, 8)
    _close(split, whole)


def test_micro_batches_of_two_lengths_are_four_parts():
    """What all rows share has a fourth of its gradient in each (see `gradients.linearise`), and
    what is joined of them stands where it stood."""
    config = _config(4)
    config.accumulate_steps = 2
    batch = feed.arrange(_batch(config, LENGTHS), config)
    for lengths, rows in (((4, 8), [6, 2, 6, 2]), ((8, 8), [8, 8]), (None, [8, 8])):
        parts = Parts.of(config, lengths)
        stacked = parts.micro({name: jnp.asarray(x) for name, x in batch.items()})
        micro = [{name: x[i] for name, x in stacked.items()} for i in range(2)]
        found = [part for rows_ in micro for part in parts.by_length(rows_)]
        assert [len(part["tokens"]) for part in found] == rows and parts.count == len(rows)
        for rows_ in micro:
            joined = parts.join([part["image"] for part in parts.by_length(rows_)])
            np.testing.assert_array_equal(joined, rows_["image"])


def test_the_smallest_lengths_that_hold_the_captions():
    config = _config(1, text_lengths=(6, 4))
    found = [feed.choose(config, (n, n))[1] for n in (3, 4, 5, 6, 7, 8)]
    assert found == [4, 4, 6, 6, 8, 8]
    longer = _config(1, text_lengths=(4, 12))  # than the model's texts
    assert feed.choose(longer, (8, 8)) == (8, 8)
    with config.unlocked():
        config.model.text.cls_mask = "shifted"
    found = [feed.choose(config, (n, n))[0] for n in (3, 4, 6, 8)]
    assert found == [4, 6, 8, 8]


def test_every_batch_comes_once_with_its_own_lengths():
    """Also on eight devices."""
    config = _config(2, batch_size=16)
    mesh = sharding.make_mesh(8, 1, 1)
    rows = [[3] * 16, [3] * 15 + [8], [5] * 16, [3] * 9 + [5] * 7]
    batches = [feed.arrange(_batch(config, lengths), config) for lengths in rows]
    with jax.set_mesh(mesh):
        placed = [sharding.place_batch(mesh, batch) for batch in batches]
        found = list(itertools.islice(measured(itertools.cycle(placed), config), 4))
        assert [lengths for _, lengths in found] == [(4, 4), (4, 8), (6, 6), (4, 6)]
        assert all(batch is wanted for (batch, _), wanted in zip(found, placed))
        config.text_parts = 1  # then all rows are measured as one
        assert next(measured(iter(placed[1:]), config))[1] == (8, 8)
        config.text_lengths = ()
        assert next(measured(iter(placed), config))[1] == (8, 8)


def test_impossible_values_are_refused():
    for changes, message in (
        (dict(text_lengths=(2, 6)), "a whole number from 3 to 65,536"),
        (dict(text_lengths=(), text_parts=2), "needs config.text_lengths"),
        (dict(text_parts=0), "text_parts=0"),
    ):
        config = _config(**changes)
        config.data.sources = (dict(builtin="scenes"),)
        with pytest.raises(ValueError, match=message):
            typed(config).check()
    with pytest.raises(ValueError, match="text_parts=4; choose a multiple of 32"):
        config_file.check_batch(_config(), 8)
