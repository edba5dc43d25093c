"""What version 0.1 wrote, and the names that it had, still work; an old name says the new one."""

import importlib
import json
import pathlib
import sys
import tarfile

import launch_stand_ins
import numpy as np
import pytest
from launch_stand_ins import launch

import coca_jax
from coca_jax.cli import main
from coca_jax.config import Config, renamed
from coca_jax.evaluation.evaluators import base
from coca_jax.inference.generation import config
from coca_jax.training import recipes

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden"
# The commands of 0.1 and what each took, that is not a key of the recipe.
FLAGS = dict(
    train="config coordinator num_processes process_id workdir",
    evaluate="batch_size checkpoint class_names coordinator data dtype image_field java_metrics "
    "label_field limit name num_beams num_frames num_processes out process_id questions split "
    "tasks templates text_field where",
    caption="batch_size checkpoint dtype early_stop length_penalty max_tokens min_tokens "
    "no_repeat_ngram num_beams num_captions num_frames out prompt repetition_penalty seed "
    "temperature top_k top_p",
    prepare="class_names config dedup distance exclude format image_field input label_field "
    "max_aspect max_pixels max_side max_text min_side min_text out overwrite processes require "
    "sample seed sentences shards size split step text_field verify where",
    convert="bpe input model out to",
    compile="config dump_hlo top topology",
    export="checkpoint out platforms",
    report="workdir",
    benchmark="batch_size beams config memory_every peer repeats seconds tokens",
)
METHODS = (
    "answer caption caption_log_likelihood captions checksum classify encode_image encode_text "
    "encode_video features forward num_tokens preprocess score similarity zero_shot"
)


@pytest.fixture(autouse=True)
def nothing_is_said_yet():
    renamed.say.cache_clear()


def unpacked(name: str, folder: pathlib.Path) -> pathlib.Path:
    with tarfile.open(GOLDEN / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_a_checkpoint_of_0_1_loads_and_captions(tmp_path):
    """That it trains on is in test_train.py."""
    model = coca_jax.load(str(unpacked("run_0_1", tmp_path)))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    image, text = model.encode_image(pixels), model.encode_text(["a red circle"])
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, rtol=1e-5)
    assert image.shape == (2, 4) and text.shape == (1, 4)
    assert len(model.caption(list(pixels), max_tokens=3)) == 2


def test_a_converted_model_of_0_1_gives_what_it_gave_there(tmp_path):
    """converted_0_1.tar.xz: what version 0.1 converted and then computed with it."""
    folder = unpacked("converted_0_1", tmp_path) / "converted_0_1"
    model = coca_jax.load(str(folder))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    with np.load(folder / "expected.npz") as expected:
        np.testing.assert_allclose(model.encode_image(pixels), expected["image"], atol=2e-6)
        text = model.encode_text(["a cat", "two dogs"])
        np.testing.assert_allclose(text, expected["text"], atol=2e-6)
    found = [one for (one,) in model.captions(list(pixels), max_tokens=6)]
    told = json.loads((folder / "captions.json").read_text())
    assert [one.text for one in found] == [text for text, _ in told]
    np.testing.assert_allclose([one.log_prob for one in found], [p for _, p in told], rtol=1e-4)


def test_every_key_of_0_1_is_one_today():
    def keys(config, prefix=""):
        for name, value in config.items():
            inner = isinstance(value, dict)
            yield from keys(value, f"{prefix}{name}.") if inner else [prefix + name]

    old = set(keys(json.loads((GOLDEN / "config_0_1.json").read_text())))
    assert len(old) == 90 and old <= set(keys(Config().to_dict()))


@pytest.mark.parametrize("command", FLAGS)
def test_every_command_and_flag_of_0_1_is_one_today(command, monkeypatch):
    known = flags_of(command, monkeypatch)
    assert command in main.COMMANDS and set(FLAGS[command].split()) <= known


def flags_of(command: str, monkeypatch) -> set[str]:
    """The names that a command's flags have, defined apart from those of others."""
    from absl import flags

    monkeypatch.setattr(flags, "FLAGS", own := flags.FlagValues())
    monkeypatch.setattr(sys, "argv", [command])
    for name, value in list(vars(flags).items()):
        if name.startswith("DEFINE_") and callable(value):
            monkeypatch.setattr(flags, name, with_values(value, own, f"coca_jax.cli.{command}"))
    importlib.import_module(f"coca_jax.cli.{command}").define_flags()
    return set(own)


def with_values(define, values, module):
    given = dict(flag_values=values, module_name=module)
    return lambda *args, **more: define(*args, **more | given)


def test_the_model_has_the_methods_of_0_1():
    from coca_jax.inference import CoCaModel, load

    assert callable(load) and all(callable(getattr(CoCaModel, name)) for name in METHODS.split())


def test_the_old_name_of_the_settings_says_the_new_one(capsys):
    from coca_jax import decoding

    assert decoding.Settings is config.Settings
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "coca_jax.decoding.Settings is now" in said
    assert "coca_jax.inference.generation.config.Settings; the old name works until 0.3" in said
    with pytest.raises(AttributeError, match="no attribute 'prepare'; see coca_jax.inference"):
        decoding.prepare  # noqa: B018


def test_recipes_that_import_configs_load_and_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "configs", None)  # as where there is none
    pathlib.Path("mine.py").write_text(
        "from configs import tiny\n\n\ndef get_config():\n    return tiny.get_config()\n"
    )
    assert recipes.load("mine.py").batch_size == recipes.load("tiny").batch_size
    said = capsys.readouterr().err
    assert said.startswith("`configs`, which mine.py imports, is now `coca_jax.recipes`; the old")


def test_the_old_launcher_of_ablations_runs_the_command(tmp_path):
    python = tmp_path / "venv/bin/python"
    launch_stand_ins.program(python, f'#!/usr/bin/env bash\necho "$@" >> {tmp_path}/calls\n')
    env = {"VENV": str(tmp_path / "venv"), "PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    done = launch("ablations.sh", "runs/mine", "--config.steps=3", **env)
    assert done.returncode == 0, done.stderr
    assert "is now coca-jax ablate examples/ablations.toml --out=runs/mine; the" in done.stderr
    last = (tmp_path / "calls").read_text().splitlines()[-1]
    assert last == "-m coca_jax ablate examples/ablations.toml --out=runs/mine --config.steps=3"


def test_the_old_setting_of_a_slice_s_restarts_is_read(tmp_path):
    env = {"NAME": "coca", "ZONE": "z", "TYPE": "v4-8", "TRIES": "many"}
    done = launch("tpu_vm.sh", "run", "--dry_run", "--", "--config=tiny", **env)
    assert "TRIES is now RESTARTS, of failures alone; the old name works until 0.3" in done.stderr
    assert done.returncode == 2 and "RESTARTS=many; it must be a whole number" in done.stderr


def test_the_old_name_of_a_benchmark_s_beams_is_read(monkeypatch, capsys):
    from coca_jax.apps import benchmark as model_times
    from coca_jax.cli import benchmark

    flags_of("benchmark", monkeypatch)
    benchmark.flags.FLAGS(["benchmark", "--beams=3"])
    monkeypatch.setattr(benchmark, "typed", lambda config: config)
    monkeypatch.setattr(model_times, "caption", lambda config, batch, tokens, beams, *_: beams)
    assert benchmark.measure("caption") == 3
    assert "--beams is now --num_beams; the old name works until 0.3" in capsys.readouterr().err


def test_the_old_name_of_prompts_is_read(tmp_path, capsys, monkeypatch):
    """In the flags of evaluate, in a task of a recipe and in a call."""
    from absl import flags

    flags_of("evaluate", monkeypatch)
    flags.FLAGS(["evaluate", "--templates=plain", "--class_names=names.txt"])
    zero_shot = base.of("zero_shot")
    task = dict(name="x", data={}, kind="zero_shot")
    zero_shot.from_flags(task, flags.FLAGS)
    assert (task["prompts"], task["class_names"]) == ("plain", "names.txt")
    said = "--templates is now --prompts; the old name works until 0.3\n"
    assert capsys.readouterr().err == said
    task = dict(name="x", data={}, class_names=["cat", "dog"], templates="plain")
    made = zero_shot.from_task(task, base.Setting())
    assert made.prompts == ("a photo of the {}",)
    assert "templates is now a task's prompts" in capsys.readouterr().err
    zero_shot.from_task(task, base.Setting())
    assert not capsys.readouterr().err  # it is said once
    with pytest.raises(ValueError, match="the old name of a task's prompts, which is given too"):
        base.check([dict(task, kind="zero_shot", prompts="bare")])
    model = coca_jax.load(str(unpacked("run_0_1", tmp_path)))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    names, prompts = ["a red circle", "a blue square"], ["{}", "one {}"]
    old = model.zero_shot(pixels, names, templates=prompts)
    assert "templates is now prompts; the old name works" in capsys.readouterr().err
    np.testing.assert_array_equal(old, model.zero_shot(pixels, names, prompts))
    assert not capsys.readouterr().err
