"""Recipes: what `--config=` may name, and the one flag through which every command reads it.

A value is the name of a recipe (`coca_large`), the path of one (`configs/coca_large.py`) or any
file of one's own that has `get_config()`. What follows a colon is handed to `get_config`:
`configs/finetune_open_clip.py:weights`. `--config.key=value` then replaces single values.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import textwrap
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

import coca_jax.recipes
from coca_jax.config import Config, Recipe, read
from coca_jax.config.base import is_value, nearest, whole_dict
from coca_jax.config.log import TRACKERS
from coca_jax.training import inherit, trackers

FOLDER = pathlib.Path(coca_jax.recipes.__path__[0])
PARTS = ("__init__", "base", "adapt")  # what recipes are made of
HELP = "Recipe: a name, configs/NAME.py or a file of your own; then :ARGUMENT if it takes one."
GROUPS = {
    "quick starts": ("tiny", "demo", "emoji", "tuxpaint", "fashion_mnist", "easy_vqa"),
    "training from scratch": (
        *("coca_224", "coca_base", "coca_large", "coca_2b"),
        *("coca_2026_small", "coca_2026_base", "coca_2026_large"),
    ),
    "fine-tuning": (
        *(
            "finetune_open_clip",
            "finetune_towers",
            "locked_captioner",
            "coco_captions",
            "vqa",
            "nlvr2",
            "snli_ve",
        ),
        *("imagenet_finetune", "imagenet_frozen", "kinetics_finetune", "kinetics_frozen"),
        *("fashion_mnist_finetune", "fashion_mnist_frozen", "tuxpaint_tuned"),
        *("emoji_reinforced", "animated_emoji"),
    ),
}

# Names of keys, the first being ours, and what other programs call the same.
SAME = (
    ("learning_rate", "lr"),
    ("batch_size", "batch", "bs"),
    ("weight_decay", "wd"),
    ("warmup_steps", "warmup"),
    ("steps", "num_steps", "max_steps", "train_steps"),
    ("epochs", "num_epochs", "max_epochs"),
    ("dtype", "precision", "mixed_precision", "amp"),
)


def names() -> dict[str, str]:
    """The recipes of the package, each with the first sentence of its docstring."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        if path.stem not in PARTS:
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            found[path.stem] = re.split(r"\.\s|\n\n", " ".join(text.split()) + " ")[0].rstrip(". ")
    return found


def listing() -> list[str]:
    """The recipes of the package by what they are for, one a line."""
    left, lines = names(), []
    groups = {title: [name for name in group if name in left] for title, group in GROUPS.items()}
    groups["others"] = [
        name for name in left if not any(name in group for group in groups.values())
    ]
    for title, group in groups.items():
        if group:
            lines.append(f"{title}:")
        for name in group:
            lines.append(f"  {name:24s}{textwrap.shorten(left[name], 72, placeholder=' ...')}")
    return lines


def find(name: str) -> pathlib.Path:
    """The file of a recipe, `name` without the argument after the colon.

    A bare name is always the package's recipe. Raises ValueError with the nearest names when there
    is no such recipe and no such file.
    """
    path = pathlib.Path(name)
    packaged = FOLDER / f"{path.stem}.py"
    if name == path.stem and packaged.is_file():
        return packaged
    if path.is_file():
        return path
    if path.parts == ("configs", packaged.name) and packaged.is_file():
        return packaged
    if path.is_dir():
        raise ValueError(f"--config={name} is a folder; give a recipe, a Python file in it perhaps")
    known = names()
    near = difflib.get_close_matches(path.stem, known, n=3, cutoff=0.6)
    if path.with_suffix(".py").is_file():
        near.insert(0, str(path.with_suffix(".py")))
    guess = f"; did you mean {' or '.join(near)}?" if near else "."
    raise ValueError(
        f"--config={name}: no such recipe and no such file{guess} Recipes: {', '.join(known)}"
    )


def load(value: str, workdir: str = "") -> ConfigDict:
    """The config of a `--config=` value, unlocked, with what it leaves to its weights. workdir: of
    the run that it is for, see `inherit.fill`.

    Raises ValueError, in one line with file, line and cause, for a recipe that cannot be had.
    """
    name, colon, argument = value.partition(":")
    path = find(name)
    given = (argument,) if colon else ()
    with _one_line(value, path), _importable(path):
        spec = importlib.util.spec_from_file_location("__recipe__", path)
        if spec is None or spec.loader is None:
            raise ValueError("a recipe is a Python file; its name ends in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise ValueError("it has no function get_config()")
        try:
            inspect.signature(get_config).bind(*given)
        except TypeError:
            remedy = f"takes no argument: leave out :{argument}" if colon else "needs an argument"
            form = "" if colon else f": --config={name}:ARGUMENT"
            raise ValueError(f"its get_config() {remedy}{form}") from None
        config = get_config(*given)
        if not isinstance(config, ConfigDict):
            raise ValueError(
                f"get_config() gives {type(config).__name__}, not a ConfigDict; "
                "begin from coca_jax.recipes.base.get_config()"
            )
        return inherit.fill(config, workdir)


def typed(config: Recipe, workdir: str = "") -> Config:
    """What a recipe's get_config() gave as a Config, with what it leaves to its weights; workdir:
    as of `load`.

    Raises ValueError for a key that there is not, or a value that cannot be.
    """
    return config if isinstance(config, Config) else read(Config, inherit.fill(config, workdir))


def check_weights(config: ConfigDict) -> None:
    """Raises ValueError where the recipe on the command line begins from weights, by the argument
    `weights` of its get_config(), and neither that nor `init_from` gives any: such a run would
    begin from random ones and say nothing."""
    value, _ = split(flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False))
    if not value or ":" in value or config.init_from:
        return
    for part in ast.parse(find(value).read_text()).body:
        if isinstance(part, ast.FunctionDef) and part.name == "get_config":
            if "weights" in (argument.arg for argument in part.args.args):
                raise ValueError(
                    f"--config={value} begins from weights: give a run, an export or what "
                    f"`convert` wrote as --config={value}:WEIGHTS or --config.init_from=WEIGHTS"
                )


@contextlib.contextmanager
def _importable(path: pathlib.Path) -> Iterator[None]:
    """A recipe may import its neighbours, and what lies in the current folder. A recipe of another
    folder has neighbours of its own, also where they have the same names."""
    folder, before = str(path.resolve().parent), set(sys.modules)
    places = [folder, str(pathlib.Path.cwd())]
    sys.path += places
    try:
        yield
    finally:
        for place in places:
            sys.path.remove(place)
        for name in set(sys.modules) - before:
            if os.path.dirname(getattr(sys.modules[name], "__file__", "") or "") == folder:
                del sys.modules[name]


@contextlib.contextmanager
def _one_line(value: str, path: pathlib.Path) -> Iterator[None]:
    """Turns whatever a recipe raises into a ValueError that names its file, the line and why."""
    try:
        yield
    except SyntaxError as error:
        where = f"{error.filename}, line {error.lineno}"
        raise ValueError(f"--config={value}: {where}: {error.msg}") from None
    except Exception as error:
        own = {path.parent.resolve(), FOLDER.resolve()}
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f for f in frames if pathlib.Path(f.filename).resolve().parent in own]
        where = f" {lines[-1].filename}, line {lines[-1].lineno}:" if lines else ""
        cause = str(error)
        if not isinstance(error, (ValueError, OSError)):
            cause = f"{type(error).__name__}: {cause}"
        raise ValueError(f"--config={value}:{where} {cause}") from None


def define_flag(note: str = "") -> None:
    """Defines `--config` and, from the command line, `--config.key=value` for all of its keys.

    `note` goes before the flag's help. Raises ValueError for a recipe that cannot be loaded and
    for a key that it does not have.
    """
    value, rest = split(flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False))
    if value is None:
        flags.DEFINE_string("config", None, note + HELP)
        return
    config = load(value, split(rest, "workdir")[0] or "")
    for key, text in _overrides(rest):
        check_key(config, key, text)
    config_flags.DEFINE_config_dict("config", config, note + HELP, sys_argv=rest)


def define_overrides(refusal: str) -> None:
    """Defines `--config.key=value` for the keys of `base`, for a command that chooses the recipe
    itself: `changes` and `change` then give what the user wants otherwise.

    Raises ValueError, with `refusal` as the remedy, for a recipe on the command line, and for a
    key that there is not.
    """
    value, rest = split(flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False))
    if value is not None:
        raise ValueError(f"--config={value}: {refusal}")
    config = load("base")
    for key, text in _overrides(rest):
        check_key(config, key, text)
    note = "Values of the recipe, as --config.optimizer.learning_rate=1e-3."
    config_flags.DEFINE_config_dict("config", config, note, sys_argv=rest)


def changes() -> dict[str, Any]:
    """The values that `--config.key=value` gives on the command line, by key."""
    return dict(config_flags.get_override_values(flags.FLAGS["config"]))


def check_trackers() -> None:
    """Raises ValueError for a tracker that the command line names and that is not installed."""
    names = changes().get("log.trackers", ())
    trackers.check([name for name in names if name in TRACKERS], asked=True)


def change(config: Config, given: Mapping[str, Any] | None = None) -> Config:
    """A config with the values of `given`, by default `changes()`; a length given there is the
    run's, as in `settle`."""
    given = changes() if given is None else given
    config = config.change(given)
    for this, other in (("steps", "epochs"), ("epochs", "steps")):
        if given.get(this) and not given.get(other):
            config = config.change({other: 0})
    warmup = config.optimizer.warmup_steps
    if config.steps > 0 and "optimizer.warmup_steps" not in given and warmup >= config.steps:
        config = config.change({"optimizer.warmup_steps": config.steps // 10})
    return config


def split(argv: Sequence[str], name: str = "config") -> tuple[str | None, list[str]]:
    """The last value of a flag, `--config`, and the command line without it.

    config_flags takes the loaded config as a default; its flag accepts no text.
    """
    value: str | None = None
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--":
            return value, [*rest, argument, *arguments]
        match = re.fullmatch(rf"--?{name}(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            rest.append(argument)
            continue
        given = match[1] if match[1] is not None else next(arguments, "")
        if not given or given.startswith("--"):
            what = dict(config="the name of a recipe, or its file", workdir="the run's folder")
            raise ValueError(f"--{name} needs a value: {what[name]}")
        value = given
    return value, rest


def _overrides(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Key and text of every `--config.key=text` (the text is empty where it follows apart)."""
    for argument in argv:
        if argument == "--":
            return
        match = re.fullmatch(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if match:
            yield match[1], match[2] or ""


def check_key(config: ConfigDict, key: str, text: str = "") -> None:
    """Raises ValueError when `config` has no value named `key`, as `optimizer.learning_rate`.

    An element of a tuple has its index, as `data.sources[0].path`.
    """
    group: Any = config
    done = "--config"
    for part in key.split("."):
        if isinstance(group, (tuple, list)):
            raise ValueError(
                f"--config.{key}={text}: {done[9:]} is a tuple of {len(group)}; an element of it "
                f"is {done}[0]; {_whole(done)}"
            )
        if "[" in part:
            plain = part.split("[")[0]
            held = group.get(plain) if isinstance(group, ConfigDict) else None
            if not isinstance(held, (tuple, list)):
                raise ValueError(
                    f"--config.{key}={text}: {done}.{plain} is no tuple and has no elements"
                )
            problem = "no such element, or it has no such key"
            with contextlib.suppress(AttributeError, LookupError, TypeError, ValueError):
                kind = config_flags.config_flags.GetType(key, config)
                if not key.endswith("]"):
                    return
                problem = "an element of a tuple is not set by itself"
                if kind is dict:
                    problem = f"it is a dict, of which keys are set, as --config.{key}.KEY=VALUE"
            raise ValueError(f"--config.{key}={text}: {problem}; {_whole(f'{done}.{plain}')}")
        if not isinstance(group, ConfigDict):
            raise ValueError(f"--config.{key}={text}: {done} is a value and has no keys")
        if part not in group:
            if is_value(Config, done[9:]):
                raise ValueError(f"--config.{key}={text}: {whole_dict(done, part)}")
            names = next((same for same in SAME if part in same), (part,))
            guess = [f"--config.{k}" for k in keys(config) if k.split(".")[-1] in names][:3]
            near = difflib.get_close_matches(part, group.keys(), n=1, cutoff=0.6)
            if near and (names == (part,) or not guess):
                guess += [f"{done}.{near[0]}"]
            guess = guess or [f"--config.{k}" for k in nearest(part, keys(config))]
            remedy = f"did you mean {' or '.join(guess)}?" if guess else f"{done} has: "
            raise ValueError(
                f"--config.{key}={text}: no key {part!r}; {remedy}"
                + ("" if guess else ", ".join(sorted(group)))
            )
        group, done = group[part], f"{done}.{part}"
    if isinstance(group, (tuple, list)) and re.match(r"[(\[{]", text):
        try:
            ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise ValueError(
                f"--config.{key}={text}: not a Python value, with text in quotes and dicts in "
                f"braces; {_whole(done)}"
            ) from None


def _whole(name: str) -> str:
    """How to give a tuple of the recipe on the command line."""
    if name == "--config.data.sources":
        easy = "--data=PATH does that for own data, or " if "data" in flags.FLAGS else ""
        return f"{easy}give all of it: {name}=\"({{'path': 'data/mine', 'kind': 'caption'}},)\""
    return f'give all of it in quotes: {name}="(...)"'


def keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """The dotted names of all single values of `config`."""
    found: list[str] = []
    for name, value in config.items():
        inner = isinstance(value, ConfigDict)
        found += keys(value, f"{prefix}{name}.") if inner else [prefix + name]
    return found


def settle() -> list[str]:
    """Makes the length of the run follow from what was given on the command line, once it is
    parsed; gives what else it changed, a line each.

    A length given there replaces that of the recipe: steps clear epochs and epochs clear steps. A
    warm-up of the recipe that such a run never ends becomes a tenth of it.
    """
    if not isinstance(flags.FLAGS["config"].value, ConfigDict):
        return []
    config, lines = flags.FLAGS["config"].value, []
    given = config_flags.get_override_values(flags.FLAGS["config"])
    for this, other in (("steps", "epochs"), ("epochs", "steps")):
        if given.get(this) and not given.get(other) and config.get(other):
            lines.append(f"--config.{this}={given[this]} replaces {other}={config[other]}")
            config[other] = type(config[other])(0)
    optimizer = config.get("optimizer", {})
    warmup = optimizer.get("warmup_steps", 0)
    if (
        given.get("steps", 0) > 0
        and "optimizer.warmup_steps" not in given
        and warmup >= config.steps
    ):
        optimizer.warmup_steps = config.steps // 10
        lines.append(
            f"--config.steps={config.steps} is no longer than optimizer.warmup_steps={warmup}; "
            f"warms up for {optimizer.warmup_steps}"
        )
    return lines


def paths_of(name: str) -> list[str]:
    """The keys of the recipe whose last part is `name`: `learning_rate` gives
    `optimizer.learning_rate`. Without a recipe on the command line, those of `base`."""
    config = flags.FLAGS["config"].value
    known = keys(config if isinstance(config, ConfigDict) else load("base"))
    return [key for key in known if key.split(".")[-1] == name]


def explain(text: str) -> str:
    """absl's line for a value of the wrong type, with the type that a key of the recipe has."""
    match = re.match(r"flag --(config\.(\S+?))=(.*?): ", text, re.DOTALL)
    if not match:
        return text
    value = config_flags.config_flags.GetValue(match[2], flags.FLAGS["config"].value)
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(type(value))
    if isinstance(value, ConfigDict):
        if is_value(Config, match[2]):
            return f"--{match[1]}={match[3]}: {whole_dict(f'--{match[1]}')}"
        return f"--{match[1]}={match[3]}: a group of keys; set one: {', '.join(sorted(value))}"
    return f"--{match[1]}={match[3]}: give {wanted}, as {value} in the recipe" if wanted else text
