"""The typed configuration: what recipes, old runs and command lines become inside."""

import dataclasses
import json
import pathlib
import re
import typing

import numpy as np
import pytest
from conftest import tiny

from coca_jax.checkpoints import config_file
from coca_jax.config import (
    BlockOptions,
    Config,
    Data,
    Entry,
    Head,
    Mesh,
    Model,
    Pooler,
    docs,
    heads,
    keys,
    read,
    typed,
)
from coca_jax.data import augment
from coca_jax.interop import export_format
from coca_jax.ops import reference
from coca_jax.recipes import base, finetune_open_clip
from coca_jax.runtime import json_files
from coca_jax.training import recipes

ROOT = pathlib.Path(__file__).parents[1]
NO_LOSSES = {"loss.contrastive_weight": 0.0, "loss.captioning_weight": 0.0}


def test_the_base_recipe_has_the_defaults():
    assert typed(base.get_config()) == Config()
    assert base.get_config().to_dict() == Config().to_dict()


def test_unknown_keys_are_ignored_in_files_of_other_versions_only():
    old = Config().to_dict()
    old["loss"]["question_tokens"] = True
    assert read(Config, old, old=True) == Config()
    with pytest.raises(ValueError, match=r"^config.loss.question_tokens: no key .*config.loss has"):
        read(Config, old)


def test_a_seed_has_32_bits():
    """Above them SentencePiece fails, and JAX would use the lower 32 only."""
    with pytest.raises(ValueError, match="config.seed=5000000000: give a .* to 4,294,967,295$"):
        Config().change(dict(seed=5_000_000_000))
    assert Config().change(dict(seed=(1 << 32) - 1)).seed == 4_294_967_295


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("optimizer", "learning_rte", "did you mean config.optimizer.learning_rate?"),
        ("data", "source", "did you mean config.data.sources?"),
        ("mesh", "quiet", "config.mesh has: data, fsdp, tensor"),
    ],
)
def test_a_recipe_s_unknown_key_is_refused_with_the_nearest(section, key, message):
    config = base.get_config()
    config[section][key] = 1
    with pytest.raises(ValueError) as error:
        typed(config)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_values_have_the_type_of_their_key():
    config = base.get_config()
    config.epochs, config.image_sizes = 2, [[0.5, 144]]
    config.data.sources = ({"path": "x", "where": {"a": [1, 2]}},)
    found = typed(config)
    assert isinstance(found.epochs, float) and found.image_sizes == ((0.5, 144),)
    assert found.data.sources == (Entry(path="x", where={"a": (1, 2)}),)
    for value in ("x", 3):
        with pytest.raises(ValueError, match="^config.model=.*: give a dict of activation, bias"):
            read(Config, {"model": value})


def test_a_config_is_frozen_and_changes_by_name():
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3
    other = config.change({"mesh.fsdp": 8, "batch_size": 64})
    assert (other.mesh, other.batch_size) == (Mesh(fsdp=8), 64)
    assert other.change({"mesh.fsdp": 0, "batch_size": 256}) == config
    block = config.change({"model.image.block": {"norm_eps": 1e-6, "qk_norm": True}})
    assert block.change({"model.image.block.norm_eps": 1e-5}).model.image.block == {
        "norm_eps": 1e-5,
        "qk_norm": True,
    }
    for emptied in ({"model.image.block": {}}, {"model": {"image": {"block": {}}}}):
        assert block.change(emptied) == config
    with pytest.raises(ValueError, match="^config.mesh.fsd: no key 'fsd'; did you mean"):
        config.change({"mesh.fsd": 8})
    with pytest.raises(ValueError, match="no key 'fsdpp'; did you mean config.mesh.fsdp[?]"):
        config.change({"fsdpp": 8})
    with pytest.raises(ValueError, match="^config.mesh.data=0: give a whole number of devices"):
        config.change({"mesh.data": 0})


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_comes_back_from_what_its_run_writes(name):
    config = typed(recipes.load(name))
    written = json.loads(json.dumps(config.to_dict(), default=list))
    assert read(Config, written) == config


def test_a_recipe_leaves_its_model_to_weights_that_it_does_not_read(tmp_path):
    """Evaluated without them; what it or the command line sets is kept, the rest is theirs."""
    place = str(tmp_path / "weights")
    config = finetune_open_clip.get_config(place)
    assert config.model.image_size is None and config.model.dtype == "bfloat16"
    model = base.get_config().model
    model.update(image_size=64, patch_size=16, dtype="float32")
    words = tmp_path / "words.model"
    words.write_bytes(b"words")
    given = dict(model=model.to_dict(), preprocess=dict(resize="squash", label_token=True))
    export_format.write_export(place, {"x": np.zeros(2, np.float32)}, given, str(words))
    config.model.embed_dim = 24
    found = recipes.typed(config)
    assert (found.model.image_size, found.model.patch_size, found.model.embed_dim) == (64, 16, 24)
    assert found.model.dtype == "bfloat16" and found.data.vocabulary == f"{place}/vocabulary.model"
    assert (found.data.resize, found.data.label_token) == ("squash", True)
    assert finetune_open_clip.get_config().data.resize == "crop"
    adapted = recipes.load(f"imagenet_frozen:{place}").data
    assert (adapted.resize, adapted.vocabulary) == ("squash", f"{place}/vocabulary.model")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        recipes.typed(finetune_open_clip.get_config(str(tmp_path / "nowhere")))


def test_every_recipe_on_weights_of_native_images_keeps_how_many_patches_they_have(tmp_path):
    """A recipe that leaves data.resize and not data.max_patches would take the pictures smaller."""
    run = Config().change({"data.resize": "native", "data.max_patches": 8})
    json_files.write_sealed(tmp_path / "config.json", run.to_dict())
    (tmp_path / "checkpoints/1").mkdir(parents=True)
    found = {}
    for name in recipes.names():
        if "def get_config(weights: str" in recipes.find(name).read_text():
            data = recipes.load(f"{name}:{tmp_path}").data
            found[name] = data.resize, data.max_patches
    assert len(found) >= 10 and set(found.values()) == {("native", 8)}


def test_the_page_of_keys_is_current():
    """python -m coca_jax.config.docs > docs/config.md"""
    assert (ROOT / "docs/config.md").read_text() == docs.page()


def test_what_stays_as_it_is_drawn_at_random_is_told():
    frozen = {"head.kind": "classification", "optimizer.encoder_learning_rate": 0.0, **NO_LOSSES}
    (line,) = config_file.remarks(tiny(**frozen), 1000)
    assert line.startswith("warning: optimizer.encoder_learning_rate=0 without init_from: the head")
    assert not config_file.remarks(tiny(**frozen, init_from="runs/coca"), 1000)
    for key, value in (("lora_rank", 4), ("keep_embeddings", True)):
        part = tiny(init_from="weights", init_parts="image", **{f"optimizer.{key}": value})
        (line,) = config_file.remarks(part, 1000)
        assert f"at random, and optimizer.{key}={value} trains a part of that alone" in line
        assert not config_file.remarks(part.change({"init_parts": "all"}), 1000)
    locked = {"optimizer.image_learning_rate": 0.0, "init_parts": "image"}  # the rest is learned
    assert not config_file.remarks(tiny(init_from="weights", **locked), 1000)


def test_losses_beside_a_head_that_train_nothing_are_told():
    frozen = tiny(**{"head.kind": "classification", "optimizer.encoder_learning_rate": 0.0})
    frozen = frozen.change({"init_from": "runs/coca"})
    assert config_file.remarks(frozen, 1000) == [
        "warning: loss.contrastive_weight=1.0 and loss.captioning_weight=2.0 cost time and train "
        "nothing, as optimizer.encoder_learning_rate=0 leaves the head alone; set 0"
    ]
    assert not config_file.remarks(frozen.change({"optimizer.encoder_learning_rate": 1e-4}), 1000)
    assert not config_file.remarks(frozen.change(NO_LOSSES), 1000)


def test_losses_of_a_locked_encoder_alone_are_told():
    locked = tiny(**{"optimizer.image_learning_rate": 0.0, "init_from": "runs/coca"})
    assert not config_file.remarks(locked, 1000)
    both = {"loss.bag_weight": 0.5, "loss.hidden_weight": 1.0, "optimizer.ema": 0.99}
    assert config_file.remarks(locked.change(both), 1000) == [
        "warning: loss.bag_weight=0.5 and loss.hidden_weight=1.0 cost time and train nothing, as "
        "optimizer.image_learning_rate=0 locks the image encoder; set 0"
    ]
    slow = both | {"optimizer.image_learning_rate": 1e-5}
    assert not config_file.remarks(locked.change(slow), 1000)


def test_patches_that_a_frozen_encoder_leaves_out_are_told(tmp_path):
    """As a recipe has them of a run that was trained so."""
    json_files.write_sealed(
        tmp_path / "config.json", Config().change({"model.image.patch_dropout": 0.5}).to_dict()
    )
    (tmp_path / "checkpoints/1").mkdir(parents=True)
    frozen = typed(recipes.load(f"imagenet_frozen:{tmp_path}"))
    (line,) = config_file.remarks(frozen, 10**6)
    assert line.startswith("warning: model.image.patch_dropout=0.5 hides patches from a frozen im")
    assert not config_file.remarks(frozen.change({"model.image.patch_dropout": 0.0}), 10**6)
    tuned = frozen.change({"optimizer.encoder_learning_rate": 1e-4})
    (line,) = config_file.remarks(tuned, 10**6)
    assert line.startswith("warning: model.image.patch_dropout=0.5 hides so much of each image whi")
    assert not config_file.remarks(tuned.change({"init_from": ""}), 10**6)
    both = {"model.image.patch_dropout": 0.5, "model.pooler.token_dropout": 0.7}
    (line,) = config_file.remarks(tiny(init_from="weights", **both), 1000)
    told = "warning: model.image.patch_dropout=0.5 and model.pooler.token_dropout=0.7 hide so much"
    assert line.startswith(told)


@pytest.mark.parametrize(
    "key, value, read_by",
    [
        ("optimizer.lora", "all", {"optimizer.lora_rank": 4}),
        ("optimizer.lora_alpha", 32.0, {"optimizer.lora_rank": 4}),
        ("optimizer.decay_share", 0.3, {"optimizer.schedule": "wsd"}),
        ("loss.hidden_share", 0.6, {"loss.hidden_weight": 1.0}),
        ("loss.teacher_scale", 50.0, {"loss.affinity_weight": 1.0, "loss.teacher_width": 16}),
        ("loss.global_rate", 0.9, {"loss.contrastive": "global"}),
        ("data.randaugment", (3, 15.0), {"data.augment": "randaugment"}),
    ],
)
def test_how_something_is_done_that_is_not_done_is_told(key, value, read_by):
    (line,) = config_file.remarks(tiny(**{key: value}), 1000)
    assert line.startswith(f"warning: no effect has {key}={value!r} without {next(iter(read_by))}")
    assert not config_file.remarks(tiny(**{key: value} | read_by), 1000)


def test_several_keys_without_effect_are_one_line():
    both = {"optimizer.lora": "all", "optimizer.decay_share": 0.3}
    assert config_file.remarks(tiny(**both), 1000) == [
        "warning: no effect has optimizer.lora='all' without optimizer.lora_rank above 0, and none "
        "optimizer.decay_share=0.3 without optimizer.schedule='wsd'"
    ]


def test_the_page_on_resuming_names_all_that_may_change():
    page_ = (pathlib.Path(__file__).parents[1] / "docs/training.md").read_text()
    said = page_.partition("## Resuming")[2].partition("\n\n")[2].partition("\n\n")[0]
    named = set(re.findall("`(.*?)`", said))
    assert not [key for key in config_file.FREE if not {key, key.rpartition(".")[2]} & named]


def test_every_key_says_what_it_is():
    for section in (Config, Entry):
        assert not [key for key, field in keys(section) if not field.metadata["help"].endswith(".")]


@pytest.mark.parametrize(
    ("section", "key", "known"),
    [
        (BlockOptions, "activation", reference.ACTIVATIONS),
        (Data, "augment", augment.MODES),
        (Pooler, "kind", heads.POOLERS),
        (Model, "family", ("coca", "vision", *heads.TOWERS)),
        (Head, "kind", ("", *heads.HEADS)),
    ],
)
def test_names_of_the_config_are_those_of_what_they_name(section, key, known):
    assert sorted(typing.get_args(typing.get_type_hints(section)[key])) == sorted(known)


def test_weights_may_start_below_the_bound_of_the_temperature():
    """A new run may not: `model.temperature` is where it starts."""
    config = tiny(**{"loss.min_temperature": 0.1, "data.sources": (dict(builtin="scenes"),)})
    with pytest.raises(ValueError, match="min_temperature=0.1 is above model.temperature=0.07"):
        config.check()
    config.change({"init_from": "runs/before"}).check()


@pytest.mark.parametrize("key, value", [("positions", "rope"), ("gated_mlp", True)])
def test_a_pooler_s_block_has_no_keys_that_it_does_not_read(key, value):
    config = tiny(**{"data.sources": (dict(builtin="scenes"),)})
    config.change({"model.pooler.block": {"norm_eps": 1e-6, "qk_norm": True}})
    with pytest.raises(ValueError, match=f"model.pooler.block=.*: {key} is an option of MLPs"):
        config.change({"model.pooler.block": {key: value}})


PAIR = {"head.kind": "pair"} | NO_LOSSES
LORA = {"optimizer.lora_rank": 2, "optimizer.name": "adamw"}
KEPT = {"optimizer.keep_embeddings": True, "loss.contrastive_weight": 0.0}


@pytest.mark.parametrize(
    "changes, told",
    [
        (PAIR | {"loss.bag_weight": 1.0}, r"\(loss.bag_weight=1.0\); set loss.bag_weight=0"),
        ({"model.pooler.project": False}, "model.embed_dim=16 .* model.text.width=24"),
        (LORA | {"optimizer.layer_decay": 0.5}, "layer_decay=0.5 .*lora_rank=2.* Set 1.0"),
        (
            LORA | {"loss.min_temperature": 0.05},
            "loss.min_temperature=0.05 .*lora_rank=2.* Set 0.0",
        ),
        (LORA | {"optimizer.projection_rate": 0.5}, "projection_rate=0.5 .*lora_rank=2.* Set 1.0"),
        (
            KEPT | {"optimizer.projection_rate": 0.5},
            "projection_rate=0.5 .*keep_embeddings.* Set 1.0",
        ),
        (LORA | {"loss.bag_weight": 1.0}, "loss.bag_weight=1.0 .*lora_rank=2.* Set 0.0"),
        (
            LORA | {"loss.hidden_weight": 0.5, "optimizer.ema": 0.9},
            "loss.hidden_weight=0.5 .*lora_rank=2.* Set 0.0",
        ),
        (KEPT | {"loss.bag_weight": 1.0}, "loss.bag_weight=1.0 .*keep_embeddings.* Set 0.0"),
        (
            {"loss.contrastive": "sigmoid", "loss.reduction": "mean"},
            "loss.reduction='mean' .*'sigmoid'. Set 'sum'",
        ),
        (
            {"loss.affinity_weight": 1.0, "loss.teacher_width": 16, "data.loader": "seqio"},
            "data.loader='seqio' .*teacher_width=16. Set 'direct'",
        ),
        ({"data.frame_jitter": True}, "data.frame_jitter=True .*num_frames=0"),
        (
            {"model.image.conv_depths": (1, 1)},
            r"model.image.conv_depths=\(1, 1\) .*conv_widths=\(\)",
        ),
    ],
)
def test_what_could_have_no_effect_is_refused(changes, told):
    plain = tiny(**{"model.text.width": 24, "data.sources": (dict(builtin="scenes"),)})
    plain.check()
    with pytest.raises(ValueError, match=told):
        plain.change(changes).check()


OF_PATH = dict(path="data/mine")


@pytest.mark.parametrize(
    "entry, told",
    [
        (dict(OF_PATH, questions="q"), "questions='q' .*kind='question', .* kind='caption'"),
        (dict(OF_PATH, answers=("yes",)), r"answers=\('yes',\) .*kind='question'"),
        (dict(OF_PATH, captions="all", kind="label"), "captions='all' .*kind='caption'"),
        (dict(OF_PATH, prompts="plain"), "prompts='plain' .*kind='label'"),
        (dict(OF_PATH, synthetic=0.3), "synthetic=0.3 .*captions='scored', .*='sampled'"),
        (dict(OF_PATH, scenery="varied"), "scenery='varied' .*by builtin, .* by path='da"),
        (dict(OF_PATH, objects=(1,)), r"objects=\(1,\) .*by builtin"),
        (dict(OF_PATH, data_dir="/x"), "data_dir='/x' .*by tfds"),
        (dict(OF_PATH, module="x"), "module='x' .*by seqio"),
        (dict(builtin="scenes", captions="scored"), "captions='scored' .*by builtin='scenes'"),
        (dict(tfds="a", captions="scored", synthetic=1.0), "captions='scored' .* by tfds='a'"),
        (dict(seqio="a", captions="scored"), "captions='scored' .*`recaption` .*by seqio='a'"),
        (dict(builtin="scenes", image_field="x"), "image_field='x' .*by path or tfds or"),
    ],
)
def test_a_key_of_a_source_that_nothing_reads_is_refused(entry, told):
    sources = (dict(builtin="scenes"), entry)
    with pytest.raises(ValueError, match=rf"config.data.sources\[1\]\.{told}"):
        tiny(**{"data.sources": sources})


@pytest.mark.parametrize(
    "entry",
    [
        dict(OF_PATH, kind="question", questions="q", answers=("yes",), image_field="a,b"),
        dict(OF_PATH, captions="scored", synthetic=0.3, where=dict(lang="de"), limit=3),
        dict(OF_PATH, kind="label", prompts="plain", text_field="a", label_field="b"),
        dict(builtin="scenes", objects=(1,), scenery="varied"),
        dict(tfds="a", data_dir="/x", image_field="x"),
        dict(seqio="a", module="x", image_field="x"),
    ],
)
def test_keys_of_a_source_that_its_data_read_are_taken(entry):
    config = tiny(**{"data.sources": (entry,)})
    config.check()
    assert entry.keys() <= config.data.sources[0].to_dict().keys()
