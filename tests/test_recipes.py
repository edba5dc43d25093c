"""What `--config=` takes: names, paths, own files, arguments, and the lines for what it cannot."""

import pathlib
import re
import shutil
import sys

import numpy as np
import pytest
from absl import flags
from conftest import scenes_words, tiny
from ml_collections import ConfigDict

from coca_jax.checkpoints import config_file
from coca_jax.cli import main
from coca_jax.config import typed
from coca_jax.data import mixture
from coca_jax.interop import export_format
from coca_jax.training import recipes, run_vocabulary, setup

OWN = "from coca_jax.recipes import tiny\n\n\ndef get_config():\n    config = tiny.get_config()\n"


@pytest.fixture
def parse(monkeypatch):
    """Parses a command line of the flag `--config` alone; gives the config."""

    def run(*arguments: str) -> ConfigDict:
        clear()
        monkeypatch.setattr(sys, "argv", ["coca-jax train", *arguments])
        recipes.define_flag()
        main.parse_flags(sys.argv, recipes)
        return flags.FLAGS.config

    def clear() -> None:
        for name in list(flags.FLAGS):
            if name.split(".")[0] == "config":
                delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()

    yield run
    clear()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_recipe_is_had_by_name_by_path_and_from_an_own_file(elsewhere):
    (elsewhere / "mine.py").write_text(OWN + "    config.batch_size = 24\n    return config\n")
    by_name = recipes.load("tiny")
    assert by_name == recipes.load("configs/tiny.py") == recipes.load(str(recipes.find("tiny")))
    assert recipes.load("mine.py").batch_size == 24
    assert by_name.batch_size == 16


def test_a_file_that_is_there_wins_over_the_package_s_path(elsewhere):
    (elsewhere / "configs").mkdir()
    (elsewhere / "configs/tiny.py").write_text(OWN + "    config.steps = 9\n    return config\n")
    assert recipes.load("configs/tiny.py").steps == 9
    assert recipes.load("tiny").steps == 5


def test_an_own_recipe_may_import_its_neighbours_and_the_current_folder(elsewhere):
    (elsewhere / "far").mkdir()
    (elsewhere / "far/neighbour.py").write_text("SIZE = 32\n")
    (elsewhere / "at_hand.py").write_text("STEPS = 7\n")
    body = (
        "    config.batch_size, config.steps = neighbour.SIZE, at_hand.STEPS\n    return config\n"
    )
    (elsewhere / "far/mine.py").write_text("import at_hand, neighbour\n" + OWN + body)
    before = list(sys.path)
    config = recipes.load("far/mine.py")
    assert (config.batch_size, config.steps) == (32, 7)
    assert sys.path == before
    (elsewhere / "other").mkdir()
    (elsewhere / "other/neighbour.py").write_text("SIZE = 64\n")
    shutil.copy(elsewhere / "far/mine.py", elsewhere / "other/mine.py")
    assert [recipes.load(f"{d}/mine.py").batch_size for d in ("other", "far")] == [64, 32]


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_of_the_package_loads_from_any_folder(name, elsewhere):
    assert recipes.load(name).data.sources
    assert recipes.names()[name]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("coca_lagre", "no such recipe and no such file; did you mean coca_large.* Recipes: ani"),
        ("own", "did you mean own.py"),
        (
            "nowhere/x.py",
            "--config=nowhere/x.py: no such recipe.* Recipes: .*, tuxpaint, tuxpaint_tuned, vqa",
        ),
        (".", "is a folder"),
        ("own.py", "own.py, line 3: expected ':'"),
        ("needs.py", r"needs an argument: --config=needs.py:ARGUMENT"),
        ("tiny:weights", "takes no argument: leave out :weights"),
        ("gone.py", "gone.py, line 1: ModuleNotFoundError: No module named 'gone_for_good'"),
        ("fails.py", "fails.py, line 2: ZeroDivisionError: division by zero"),
        ("empty.py", r"it has no function get_config\(\)"),
        ("none.py", "gives NoneType, not a ConfigDict"),
        ("finetune_open_clip:nowhere", "nowhere"),
    ],
)
def test_a_recipe_that_cannot_be_had_is_one_line(value, message, elsewhere):
    (elsewhere / "own.py").write_text("x = 1\n\ndef get_config()\n    return 1\n")
    (elsewhere / "needs.py").write_text("def get_config(weights):\n    return weights\n")
    (elsewhere / "gone.py").write_text("from gone_for_good import base\n")
    (elsewhere / "fails.py").write_text("def get_config():\n    return 1 / 0\n")
    (elsewhere / "empty.py").write_text("")
    (elsewhere / "none.py").write_text("def get_config():\n    pass\n")
    with pytest.raises(ValueError, match=message) as error:
        recipes.load(value)
    assert f"--config={value}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_that_begins_from_weights_asks_for_them(parse):
    for name in ("finetune_open_clip", "imagenet_frozen", "tuxpaint_tuned"):
        config = parse(f"--config={name}")
        with pytest.raises(ValueError, match=f"{name} begins from weights: .* --config={name}:W"):
            recipes.check_weights(config)
    recipes.check_weights(parse("--config=finetune_open_clip", "--config.init_from=weights"))
    recipes.check_weights(parse("--config=easy_vqa"))  # says that it has a model of its own
    recipes.check_weights(parse("--config=tiny"))


def test_values_are_replaced_from_the_command_line(parse):
    config = parse(
        *("--config.batch_size=8", "--config", "tiny", "--config.optimizer.learning_rate", "0.5"),
        *("--config.data.flip", "--config.data.sources[1].kind=caption"),
    )
    assert (config.batch_size, config.optimizer.learning_rate, config.data.flip) == (8, 0.5, True)
    assert [source["kind"] for source in config.data.sources] == ["caption", "caption"]
    config = parse("--config=tiny", "--config.data.sources=({'path': 'x', 'weight': 0.5},)")
    assert config.data.sources == ({"path": "x", "weight": 0.5},)
    for given, size in (("(48, 96)", (48, 96)), ("48", 48)):  # a number, or height and width
        found = parse("--config=tiny", f"--config.model.image_size={given}").model.image_size
        assert found == size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optimizer.learning_rte=1"], "did you mean --config.optimizer.learning_rate?"),
        (["--config.learning_rate=1"], "did you mean --config.optimizer.learning_rate?"),
        (
            ["--config.optimizer.lr=1"],
            "no key 'lr'; did you mean --config.optimizer.learning_rate?",
        ),
        (["--config.learning_rte=1"], "did you mean --config.optimizer.learning_rate?"),
        (["--config.model.batch_size=8"], "did you mean --config.batch_size?"),
        (
            ["--config.image_size=64"],
            "did you mean --config.model.image_size or --config.image_sizes?",
        ),
        (["--config.optimizer.q=1"], "no key 'q'; --config.optimizer has: average_share, beta1"),
        (["--config.batch_size.x=1"], "--config.batch_size is a value and has no keys"),
        (["--config.data.sources.0.path=x"], "data.sources is a tuple of 2"),
        (
            ["--config.data.sources=(dict(path='x'),)"],
            "in braces; give all of it: --config.data",
        ),
        (["--config.data.sources[0].path=x"], "no such key; give all of it"),
        (["--config.data.sources[7].kind=x"], "no such element"),
        (["--config.log.trackers[0]=x"], "is not set by itself; .*--config.log.trackers="),
        (
            ["--config.data.sources[0]=3"],
            r"it is a dict, .* --config.data.sources\[0\].KEY=VALUE; ",
        ),
        (["--config.image_sizes=((0.5, 32)"], "not a Python value"),
        (["--learning_rate=1e-4"], "no such flag; .* is --config.optimizer.learning_rate=1e-4"),
        (["--config.batch_size=big"], "error: --config.batch_size=big: give a whole number, as 16"),
        (["--config.optimizer.learning_rate=x"], "give a number, as 0.001 in the recipe"),
        (["--config.optimizer=adam"], "a group of keys; set one: average_share, beta1"),
        (
            ["--config.model.image.block.norm=rms"],
            "block is a dict; give all of it in quotes: --config.model.image.block=\"{'norm':",
        ),
        (["--config.model.text.block=rms"], "=rms: --config.model.text.block is a dict; give all"),
    ],
)
def test_a_wrong_key_or_value_names_the_right_one(arguments, message, parse, capsys):
    try:
        parse("--config=tiny", *arguments)
    except ValueError as error:
        cause = f"error: {error}"
    except SystemExit as end:
        assert end.code == 2
        cause = capsys.readouterr().err
    assert re.search(message.replace("?", r"\?"), cause), cause


def test_without_a_recipe_a_key_asks_for_one(parse, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("--config.steps=3")
    assert "--config.steps=3 needs a recipe to change" in capsys.readouterr().err


def test_a_length_given_on_the_command_line_replaces_the_recipe_s(parse, capsys):
    long = "finetune_open_clip"  # one epoch, 500 steps of warm-up
    config = parse(f"--config={long}", "--config.steps=30")
    assert (config.steps, config.epochs, config.optimizer.warmup_steps) == (30, 0, 3)
    said = capsys.readouterr().err
    assert "--config.steps=30 replaces epochs=1.0" in said
    assert "no longer than optimizer.warmup_steps=500; warms up for 3" in said
    config = parse(f"--config={long}", "--config.steps=900")
    assert (config.steps, config.epochs, config.optimizer.warmup_steps) == (900, 0, 500)
    config = parse("--config=tiny", "--config.epochs=2")
    assert (config.steps, config.epochs) == (0, 2)


def test_lengths_that_are_all_given_are_left_to_the_check(parse, capsys):
    config = parse("--config=tiny", "--config.steps=3", "--config.epochs=2")
    assert (config.steps, config.epochs) == (3, 2)
    config = parse("--config=tiny", "--config.steps=3", "--config.optimizer.warmup_steps=9")
    assert (config.steps, config.optimizer.warmup_steps) == (3, 9)
    assert parse("--config=tiny").optimizer.warmup_steps == 1
    assert not capsys.readouterr().err


def test_a_vocabulary_that_is_not_there_names_its_key(tmp_path):
    config = recipes.load("tiny")
    config.data.vocabulary = str(tmp_path / "none.model")
    with pytest.raises(FileNotFoundError, match="^data.vocabulary=.*none.model: no such"):
        run_vocabulary.load_or_train(config, str(tmp_path))


def test_a_file_of_classes_that_is_not_there_names_its_key():
    source = (dict(builtin="scenes", kind="label"),)
    config = tiny(**{"data.sources": source, "head.kind": "classification"})
    with pytest.raises(FileNotFoundError, match="^head.classes=none.txt: no such file"):
        mixture.head_classes(config.change({"head.classes": "none.txt"}))


def test_a_batch_larger_than_the_data_is_remarked_on():
    config = recipes.load("tiny")  # a batch of 16
    assert not config_file.remark_batch(config, 16)
    assert "config.batch_size=16 is more than all 15 examples" in config_file.remark_batch(
        config, 15
    )


def test_augmentations_of_what_stays_as_it_is_are_remarked_on():
    config = recipes.load("tiny")
    config.data.update(augment="none", flip=False, augmentations=3)
    (line,) = config_file.remarks(typed(config), 10_000)
    assert line.startswith("warning: data.augmentations=3 has no effect, as data.augment='none'")
    for change in ({"augmentations": 0}, {"flip": True}, {"augment": "crop"}):
        changes = {f"data.{key}": value for key, value in change.items()}
        assert config_file.remarks(typed(config).change(changes), 10_000) == []


STARTED = """
from coca_jax.training import inherit
from coca_jax.recipes import tiny


def get_config(weights):
    config = tiny.get_config()
    config.init_from = weights
    inherit.leave(config, "model", "data.vocabulary", "data.resize")
    return config
"""


def test_a_run_goes_on_without_the_weights_that_it_began_from(parse, elsewhere, request):
    """Its recipe leaves values to them, and its config.json has these."""
    (elsewhere / "mine.py").write_text(STARTED)
    sizes = tiny(**{"model.text.vocab_size": 320}).model.to_dict()
    params = {"x": np.zeros(2, np.float32)}
    given = dict(model=sizes, preprocess=dict(resize="squash", label_token=True))
    export_format.write_export("weights", params, given, scenes_words())
    before = recipes.typed(recipes.load("mine.py:weights"))
    assert before.data.vocabulary == "weights/vocabulary.model"
    assert before.model.to_dict() == sizes
    kept = run_vocabulary.load_or_train(before, "run")
    config_file.write(config_file.contents(before, "run", kept), "run")
    pathlib.Path("weights").rename("gone")
    with pytest.raises(ValueError, match="no checkpoint under weights"):  # it has no step
        recipes.load("mine.py:weights", "run")
    pathlib.Path("run/checkpoints/3/params").mkdir(parents=True)
    if "workdir" not in flags.FLAGS:
        flags.DEFINE_string("workdir", None, "The command's.")
        request.addfinalizer(lambda: delattr(flags.FLAGS, "workdir"))
    after = recipes.typed(parse("--config=mine.py:weights", "--workdir", "run"))
    assert after == before
    setup.check(after, "run")
    assert run_vocabulary.load_or_train(after, "run").checksum == kept.checksum
    shutil.copytree("run", "other")
    with pytest.raises(ValueError, match="no checkpoint under others"):
        recipes.load("mine.py:others", "other")
    pathlib.Path("other/vocabulary.model").unlink()
    with pytest.raises(FileNotFoundError, match="data.vocabulary=weights/vocabulary.model: no"):
        run_vocabulary.load_or_train(after, "other")


def test_a_group_behind_one_of_its_keys_is_a_line(commands, tmp_path):
    given = ["--config.model.image.width=8", "--config.model.image=3"]
    done = commands.run(["train", "--config=tiny", "--workdir=w", *given], tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: Flag --config.model.image is provided after")
