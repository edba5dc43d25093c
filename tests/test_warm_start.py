"""Starting from other weights: exact copies, resized positions, clear refusals."""

import functools
import json
import types

import jax
import numpy as np
import pytest
from conftest import params_of, tiny, tiny_config

from coca_jax.apps import fit_choice
from coca_jax.checkpoints import config_file, manager
from coca_jax.config import typed
from coca_jax.interop import export_format
from coca_jax.models import coca
from coca_jax.training import inherit, recipes, setup, trainer, warm_start
from coca_jax.training.state import state_shardings


def blank_state(model, config, mesh):
    """A state of zeros, whose parameters other weights replace: no program draws it."""
    abstract, shardings = state_shardings(model, config, mesh)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    return jax.device_put(zeros, shardings)


def test_positions_of_the_same_grid_stay_and_others_interpolate():
    grid = np.arange(16, dtype=np.float32).reshape(16, 1)
    np.testing.assert_allclose(warm_start.resize_positions(grid, 16), grid, atol=1e-5)
    bigger = warm_start.resize_positions(grid, 64).reshape(8, 8)
    assert (np.diff(bigger, axis=1) > 0).all() and (np.diff(bigger, axis=0) > 0).all()
    np.testing.assert_allclose(bigger.mean(), grid.mean(), rtol=1e-3)
    with_class = np.concatenate([[[99.0]], grid]).astype(np.float32)
    assert warm_start.resize_positions(with_class, 65)[0, 0] == 99
    with pytest.raises(ValueError, match="not both square grids"):
        warm_start.resize_positions(grid, 60)


@pytest.mark.parametrize("length", [5, 9, 12])
def test_text_positions_keep_their_places_and_cls_stays_last(length):
    positions = np.arange(9 * 64, dtype=np.float32).reshape(9, 64)
    found = warm_start.fit_text_positions(positions, length)
    kept = min(9, length) - 1
    assert found.shape == (length, 64) and found.dtype == np.float32
    np.testing.assert_array_equal(found[:kept], positions[:kept])
    np.testing.assert_array_equal(found[-1], positions[-1])
    if length > 9:
        assert 0.015 < found[8:-1].std() < 0.025  # as in a new model


@pytest.mark.long
def test_longer_texts_leave_shorter_ones_as_they_were(tmp_path, one_device_mesh, caplog):
    short, longer = tiny_config(), tiny_config()
    longer.model.text.max_len = short.model.text.max_len + 4
    (tmp_path / "vocabulary.model").write_bytes(b"-")
    host = jax.device_get(params_of(coca.build(short.model)))
    vocabulary = tmp_path / "vocabulary.model"
    given = {"model": short.model.to_dict()}
    export_format.write_export(tmp_path / "export", host, given, vocabulary)
    model = coca.build(longer.model)
    state = blank_state(model, longer, one_device_mesh)
    state = warm_start.apply(state, str(tmp_path / "export"))
    assert (
        "positions of texts, this model " in caplog.text
        and "the others start untrained" in caplog.text
    )
    tokens = np.arange(12).reshape(2, 6) + 5
    valid = np.ones((2, 6), bool)
    embeddings = []
    for config, params in ((short, host), (longer, state.params)):
        encode = functools.partial(coca.build(config.model).apply, method="encode_text")
        embeddings.append(jax.jit(encode)({"params": params}, tokens, valid))
    np.testing.assert_array_equal(*embeddings)


def test_a_model_of_another_size_is_refused_by_its_keys_before_data_are_read(tmp_path):
    """An array was named, once the data were indexed."""
    words, place = tmp_path / "vocabulary.model", str(tmp_path / "export")
    words.write_bytes(b"-")
    given = {"model": tiny_config().model.to_dict()}
    export_format.write_export(place, params_of(coca.build(tiny_config().model)), given, words)

    def config(**changes):
        return tiny().change({"init_from": place} | {f"model.{k}": v for k, v in changes.items()})

    size, layers = {"image.width": 48}, {"text.multimodal_depth": 3, "pooler.num_queries": 2}
    old = tiny().model.text.multimodal_depth, tiny().model.pooler.num_queries
    with pytest.raises(ValueError, match="model.image.width is 16 there, 48 here; set what"):
        setup.check_start(config(**size), str(tmp_path / "run"))
    line = f"multimodal_depth is {old[0]} there, 3 here; model.pooler.num_queries is {old[1]} there"
    with pytest.raises(ValueError, match=line):
        setup.check_start(config(**layers), str(tmp_path / "run"))
    # What does not matter to the image encoder, and what no array has the shape of, may differ.
    image = config(**layers, embed_dim=8).change({"init_parts": "image"})
    setup.check_start(image, str(tmp_path / "run"))
    with pytest.raises(ValueError, match="export: model.image.width is 16 there, 48 here; set wh"):
        setup.check_start(image.change({"model.image.width": 48}), str(tmp_path / "run"))
    fits = {"image_size": 32, "text.max_len": 99, "activation": "relu", "norm_eps": 1e-6}
    setup.check_start(config(**fits), str(tmp_path / "run"))
    free = {"image_size": 32, "text.max_len": 99, "temperature": 0.1}
    assert warm_start.remark(config(**free)) == ""
    others = {"activation": "relu", "image.rope_theta": 20.0, "text.cls_mask": "shifted"}
    assert warm_start.remark(config(**others)) == (
        f"warning: init_from={tmp_path / 'export'}: model.activation is gelu there, relu here; "
        "model.text.cls_mask is exact there, shifted here: the same weights are another model "
        "then; set what they have, unless it is meant"
    )
    image = config(**others, **{"image.block": {"norm_eps": 1e-6}}).change({"init_parts": "image"})
    line = warm_start.remark(image)
    assert "relu here; model.image.block.norm_eps is not set there, 1e-06 here: the" in line


def test_weights_start_a_model_of_another_image_size(tmp_path, one_device_mesh, caplog):
    small, large = tiny_config(), tiny_config(image_size=32)
    vocabulary = tmp_path / "vocabulary.model"
    vocabulary.write_bytes(b"-")
    host = jax.device_get(params_of(coca.build(small.model)))
    given = {"model": small.model.to_dict()}
    export_format.write_export(tmp_path / "export", host, given, vocabulary)
    state = blank_state(coca.build(large.model), large, one_device_mesh)
    state = warm_start.apply(state, str(tmp_path / "export"))
    assert state.params["image_encoder"]["positions"]["value"].shape == (16, 16)
    for part in ("text_decoder", "generative_pooler"):
        jax.tree.map(np.testing.assert_array_equal, state.params[part], host[part])

    other = tiny_config()
    other.model.text.width = 48
    state = blank_state(coca.build(other.model), other, one_device_mesh)
    with pytest.raises(ValueError, match="contrastive_pooler/attention/key/bias has shape"):
        warm_start.apply(state, str(tmp_path / "export"))
    with pytest.raises(FileNotFoundError, match="no checkpoint under"):
        warm_start.apply(state, str(tmp_path / "nothing"))
    # The positions that changed are said.
    assert "init_from: positions of 2 x 2 patches are resized" in caplog.text


def test_what_a_helping_loss_left_in_weights_is_left_out(tmp_path, one_device_mesh, caplog):
    """And what is in the way is still named."""
    config = tiny().change({"loss.bag_weight": 0.5, "loss.contrastive": "sigmoid"})
    config = config.change({"loss.hidden_weight": 0.5, "loss.hidden_share": 0.3})
    params = params_of(coca.build(config.model, loss=config.loss))
    words = tmp_path / "vocabulary.model"
    words.write_bytes(b"-")
    given, place = {"model": config.model.to_dict()}, str(tmp_path / "export")
    export_format.write_export(place, params, given, words)
    plain = tiny_config()
    state = blank_state(coca.build(plain.model), plain, one_device_mesh)
    found = export_format.flatten(warm_start.apply(state, place).params)
    before = export_format.flatten(params)
    left = {name.split("/")[-2] for name in before.keys() - found.keys()}
    assert left >= {"bag_head", "mask_token", "logit_bias"}
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, before[name])
    told = [one.getMessage() for one in caplog.records]
    for part in ("bag_head", "image_encoder/mask_token", "logit_bias"):
        assert f"init_from: {part} of {place} is left out, the model has none" in told
    export_format.write_export(place, params | {"third": {"kernel": np.ones(2)}}, given, words)
    with pytest.raises(ValueError, match="has third/kernel, which this config's model lacks"):
        warm_start.apply(state, place)


def test_a_run_starts_from_weights_as_its_keys_say(monkeypatch, tmp_path, capsys):
    config = tiny_config()
    config.init_from, config.init_positions, config.init_parts = "weights", "interpolate", "image"
    monkeypatch.setattr(trainer, "init_state", lambda *_: "fresh")
    monkeypatch.setattr(warm_start, "apply", lambda *given: given)
    monkeypatch.setattr(warm_start, "remark", lambda config: f"warning: {config.init_from}")
    run = trainer.Trainer(config, str(tmp_path))
    run.model, run.mesh, run.class_names = None, None, ("cat",)
    run.checkpoints = types.SimpleNamespace(steps=lambda: [])
    run.restore_or_init()
    assert capsys.readouterr().err == "making the model ...\nwarning: weights\n"
    assert run.step == 0 and run.state == (
        "fresh",
        "weights",
        ("cat",),
        "interpolate",
        "image",
        (2, 2),
    )


def test_what_a_fit_reads_of_weights(tmp_path):
    """An export's model, size, resizing and words; what is no such folder is a line."""
    config = tiny_config()
    params = params_of(coca.build(config.model))
    (tmp_path / "vocabulary.model").write_bytes(b"-")
    given = {"model": config.model.to_dict(), "preprocess": {"resize": "crop"}}
    host, words = jax.device_get(params), tmp_path / "vocabulary.model"
    export_format.write_export(tmp_path / "export", host, given, words)
    into = tmp_path / "converted"
    found = fit_choice.read(str(tmp_path / "export"), str(into))
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert found.model == typed(config).model and found.resize == "crop"
    assert found.path == str(tmp_path / "export")
    assert found.vocabulary == str(tmp_path / "export" / "vocabulary.model")
    for name in ("vocabulary.model", "absent"):
        with pytest.raises((ValueError, FileNotFoundError), match=name):
            fit_choice.read(str(tmp_path / name), str(into))
    given["preprocess"]["resize"] = "native"
    export_format.write_export(tmp_path / "native", host, given, words)
    with pytest.raises(ValueError, match="its images keep their aspect ratio"):
        fit_choice.read(str(tmp_path / "native"), str(into))
    assert not into.exists()


def test_weights_that_have_to_be_converted_are_told_how_by_recipes_too(tmp_path, monkeypatch):
    """A recipe read them for its values first, and found "no checkpoint" under them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "open_clip_model.bin").write_bytes(b"-")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "open_clip_config.json").write_text("{}")
    for place, says in (
        ("open_clip_model.bin", "is a file: convert it first with"),
        ("theirs", "is open_clip's: convert it first with"),
        ("hf-hub:org/name", "is no folder; weights by a name become one with"),
        ("coca_ViT-L-14:tag", "is no folder; weights by a name become one with"),
    ):
        line = f"init_from={place} {says} coca-jax convert --input={place} --out=DIR"
        with pytest.raises(ValueError, match=f": {line}$"):
            recipes.load(f"finetune_open_clip:{place}")
        with pytest.raises((ValueError, FileNotFoundError), match=f"^{line}$"):
            setup.check_start(tiny(init_from=place), "run")
    with pytest.raises(
        (ValueError, FileNotFoundError), match="theirs"
    ):  # `fit` converts it, but it has no weights
        fit_choice.read("theirs", "converted")
    with pytest.raises(ValueError, match="no checkpoint under nowhere; give a run's workdir or"):
        recipes.load("finetune_open_clip:nowhere")


def test_weights_are_the_same_however_their_place_is_spelled(tmp_path, monkeypatch):
    """Also the tokenizer beside them, and where a recipe leaves values to weights that are gone."""
    monkeypatch.chdir(tmp_path)
    config = typed(tiny_config())

    def begun_with(weights, words=""):
        return config.change({"init_from": weights, "data.vocabulary": words})

    def goes_on(old, new):
        there = json.loads(json.dumps(old.to_dict(), default=list))
        config_file.check_resumable(new, there, "runs/a")

    spelled = ("w/base", "./w/base/", f"{tmp_path}/w/base", f"{tmp_path}/w/../w/base/")
    for one in spelled:
        goes_on(begun_with("w/base", "w/base/v.model"), begun_with(one, f"{one}/v.model"))
    goes_on(begun_with("gs://b/w"), begun_with("gs://b/w/"))
    for other in ("w/other", "", f"{tmp_path}/base"):
        with pytest.raises(ValueError, match=f"init_from: 'w/base' there, '{other}' here"):
            goes_on(begun_with("w/base"), begun_with(other))

    def load_config(place):
        if place != "runs/a":
            raise FileNotFoundError(place)
        return begun_with("w/base")

    monkeypatch.setattr(manager, "load_config", load_config)
    assert inherit._found(f"{tmp_path}/w/base/", "runs/a")["data.resize"] == config.data.resize
    with pytest.raises(FileNotFoundError):
        inherit._found("w/other", "runs/a")
