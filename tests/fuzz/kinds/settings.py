"""Command lines, configurations, and the small files of data and runs, with other contents."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pathlib
import random
import shutil
import sys
from typing import Any

import mutate
import numpy as np
from absl import flags

from coca_jax.checkpoints import manager
from coca_jax.cli import main, report
from coca_jax.data import filters, mixture, prepare
from coca_jax.data.sources.items import Options
from coca_jax.inference import caption_files
from coca_jax.runtime import json_files
from coca_jax.training import recipes
from kinds import Kind, encoded

RECIPES = ("base", "tiny", "scenes", "coca_224", "linear_probe")
VALUES = (
    "", "0", "1", "-1", "2", "3.5", "1e-3", "1e6", "1e308", "1e999", "nan", "inf", "-inf", "true",
    "false", "True", "None", "none", "()", "(1,)", "(1, 2)", "((0.5, 32),)", "[]", "{}", "{'a': 1}",
    "('a', 'b')", "'x'", '"', "'", "(", "((((", "a=b", "__import__('os')", "os.system('x')", "\0",
    "\ud83d", "x" * 5000, "9" * 30, "9" * 5000, "0x10", "1_000", "٣", "softmax", "adamw", "../x",
    "/dev/zero", "[1] * 10", "1 + 1", "(" * 300 + ")" * 300, "[" * 90 + "]" * 90, "lambda: 0",
    "{1}", "b'x'", "1j", "...", "({'path': 'x'},)", "({'weight': -1},)", "-0.0",
    "({'builtin': 'scenes'},)",
)  # fmt: skip


def override_seeds() -> list[bytes]:
    """Command lines that say one thing, as JSON lists of arguments."""
    found = []
    for name in RECIPES:
        if name == "base" or name in recipes.names():
            lines = [
                [f"--config={name}", f"--config.{key}"] for key in recipes.keys(recipes.load(name))
            ]
            found += [json.dumps(line).encode() for line in lines]
    return found


def damage_overrides(rng: random.Random, seed: bytes) -> bytes:
    """Values that may not be, keys that are not there, forms that absl knows."""
    recipe, *arguments = json.loads(seed)
    given = []
    for argument in arguments * rng.choice((1, 1, 2)):
        value = rng.choice(VALUES)
        kind = rng.randrange(12)
        if kind == 0:
            at = rng.randrange(10, len(argument) + 1)
            argument = (
                argument[:at]
                + rng.choice(("", ".", "[0]", "x", "=", "-", "é", "["))
                + argument[at:]
            )
        elif kind == 1:
            argument = argument + rng.choice(("[0]", "[-1]", "[x]", ".x", "[0].path", "[9]", "[]"))
        elif kind == 2:
            argument = argument.replace(
                "--config", rng.choice(("--noconfig", "-config", "--Config"))
            )
        given += [argument, value] if kind == 3 else [f"{argument}={value}"]
    if rng.random() < 0.05:
        recipe += rng.choice((":x", ".", "", "/", "x", ":"))
    return json.dumps([recipe, *given]).encode()


def read_overrides(path: pathlib.Path) -> str:
    """What `train` does with a command line until the configuration is checked."""
    given = [argument.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
             for argument in json.loads(path.read_bytes())]  # fmt: skip
    before = set(flags.FLAGS)
    said = io.StringIO()
    sys.argv = ["coca-jax train", *given]
    try:
        with contextlib.redirect_stderr(said):
            try:
                recipes.define_flag()
            except (flags.Error, ValueError, OSError) as error:
                main.fail(str(error))
            main.parse_flags(sys.argv, sys.modules[__name__])
            if flags.FLAGS.config is None:
                return "no recipe: "
            config = recipes.typed(flags.FLAGS.config)
            config.check()
        digest = hashlib.blake2b(repr(config.to_dict()).encode("utf-8", "replace"), digest_size=6)
        return f"accepted: {digest.hexdigest()}"
    except SystemExit as end:
        lines = said.getvalue().splitlines()
        if end.code != 2 or not lines or not lines[-1].startswith("error: "):
            raise AssertionError(f"status {end.code}, {lines}") from None
        raise ValueError(lines[-1]) from None
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)


def config_seeds() -> list[bytes]:
    """config.json of runs."""
    return [
        json.dumps(recipes.load(name).to_dict() | {"vocabulary_checksum": "0" * 64}).encode()
        for name in ("tiny", "coca_224")
    ]


def damage_config(rng: random.Random, seed: bytes) -> bytes:
    """Other values under a checksum that is right, or one that is wrong."""
    damaged = mutate.tree(rng, json.loads(seed))
    if isinstance(damaged, dict) and rng.random() < 0.8:
        with contextlib.suppress(UnicodeEncodeError, RecursionError):
            damaged = json_files.seal(damaged)
    return mutate.text_of(rng, damaged)


def read_config(path: pathlib.Path) -> str:
    """The configuration of a run, as `load`, `evaluate` and `train` take it."""
    folder = path.with_name("run")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(path.read_bytes())
    config = manager.read_config(str(folder))
    return f"config: {config}"


def _prepared() -> pathlib.Path:
    """A small prepared data set in the current folder."""
    folder = pathlib.Path("prepared").absolute()
    if not folder.exists():
        pictures = pathlib.Path("pictures")
        pictures.mkdir()
        rows = []
        for number in range(6):
            (pictures / f"{number}.png").write_bytes(encoded("PNG"))
            rows.append(
                dict(file_name=f"{number}.png", text=f"text {number}", label="cat", n=number)
            )
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (pictures / "metadata.jsonl").write_text(text)
        prepare.prepare("imagefolder", str(pictures), str(folder), options=Options(), processes=1,
                       progress=False)  # fmt: skip
        for file in folder.iterdir():
            file.rename(folder.with_name(f"good {file.name}"))
    for file in folder.parent.glob("good *"):
        shutil.copyfile(file, folder / file.name.removeprefix("good "))
    shutil.rmtree(folder / "views", ignore_errors=True)
    return folder


def _read_all(folder: pathlib.Path) -> str:
    """Every record that can be read, as training reads them, one by one where that fails."""
    source = filters.open_source(dict(path=str(folder), where={"n": [1, 2, 4]}))
    digest = hashlib.blake2b(digest_size=6)
    bad = 0
    for index in range(len(source)):
        try:
            digest.update(repr(source.read(np.array([index]))).encode("utf-8", "replace"))
        except Exception:  # array_record raises RuntimeError; training steps over the record
            bad += 1
    return f"{bad} bad: {len(source)} {digest.hexdigest()} {source.class_names}"


def shard_seeds() -> list[bytes]:
    """A shard that `prepare` wrote."""
    return [next(_prepared().glob("*.array_record")).read_bytes()]


def damage_shard(rng: random.Random, seed: bytes) -> bytes:
    """As many bytes as before, others: the manifest knows how many there are."""
    return mutate.data(rng, seed)[: len(seed)].ljust(len(seed), b"\0")


def read_shard(path: pathlib.Path) -> str:
    """A data set with this shard."""
    folder = _prepared()
    next(folder.glob("*.array_record")).write_bytes(path.read_bytes())
    return _read_all(folder)


def manifest_seeds() -> list[bytes]:
    """The manifest of a data set."""
    return [(_prepared() / "manifest.json").read_bytes()]


def damage_manifest(rng: random.Random, seed: bytes) -> bytes:
    """Another JSON value."""
    return mutate.text_of(rng, mutate.tree(rng, json.loads(seed)))


def read_manifest(path: pathlib.Path) -> str:
    """A data set with this manifest."""
    folder = _prepared()
    (folder / "manifest.json").write_bytes(path.read_bytes())
    names = mixture.class_names(dict(path=str(folder)), "train")
    return f"data: {names} {_read_all(folder)}"


MARK = "what it is made of"


def index_seeds() -> list[bytes]:
    """The index of a view."""
    whole = filters.Index(np.arange(0, 40, 3), np.arange(14) % 3, ("a", "b"))
    return [
        filters._encode(MARK, whole),
        filters._encode(MARK, filters.Index(np.arange(9))),
    ]


def read_index(path: pathlib.Path) -> str:
    """The index, or one that is made anew where it is damaged."""
    name = f"{hashlib.blake2b(MARK.encode(), digest_size=12).hexdigest()}.npz"
    place = path.with_name("views")
    place.mkdir(exist_ok=True)
    (place / name).write_bytes(path.read_bytes())
    made = filters.Index(np.arange(5))
    found = filters.Indexes().get(str(path.parent), MARK, 40, lambda: made)
    kind = "anew" if found is made else "kept"
    if len(found.rows) and not 0 <= found.rows.min() <= found.rows.max() < 40:
        raise AssertionError(f"rows from {found.rows.min()} to {found.rows.max()} of 40")
    digest = hashlib.blake2b(found.rows.tobytes(), digest_size=6).hexdigest()
    return f"{kind}: {digest} {found.parts is None or found.parts.tolist()} {found.class_names}"


def caption_seeds() -> list[bytes]:
    """What `caption --out` has written."""
    rows = [dict(image=f"{i}.png", caption="a cat", score=-1.5) for i in range(4)]
    return [json.dumps(rows).encode()]


def damage_captions(rng: random.Random, seed: bytes) -> bytes:
    """Lines with other values, cut short, or none."""
    rows = [mutate.tree(rng, row, 1) if rng.random() < 0.4 else row for row in json.loads(seed)]
    written = b"\n".join(mutate.text_of(rng, row) for row in rows) + b"\n"
    return mutate.data(rng, written, 1) if rng.random() < 0.3 else written


def read_captions(path: pathlib.Path) -> str:
    """Which images are done."""
    done, whole = caption_files.read_done(str(path))
    return f"done: {sorted(map(repr, done))} {whole}"


REPORTS = ("config.json", "metrics.jsonl", "evaluations.jsonl", "eval.json", "eval_examples.json")


def report_seeds() -> list[bytes]:
    """The files of a run, the number of each before it."""
    scores = {
        "zero_shot/data/accuracy": 0.5,
        "zero_shot/data/accuracy_low": 0.4,
        "zero_shot/data/accuracy_high": 0.6,
        "zero_shot/data/num_images": 9,
        "step": 20,
    }
    item = dict(image="", truth=["cat"], guesses=[["cat", 0.9], ["dog", 0.1]], key="1")
    classes = {"cat": dict(accuracy=0.5, count=4), "dog": dict(accuracy=1.0, count=5)}
    points = [[0, 500], [1000, 700]]
    drawn = dict(points=points, texts=["cat", "dog"], right=[True, False], sheet="")
    drawn |= dict(columns=16, size=40, share=[0.5, 0.25])
    table = dict(rows=["cat", "dog"], columns=["cat", "dog"], counts=[[2, 2], [0, 5]])
    examples = {
        "zero_shot/data": dict(
            kind="zero_shot",
            items=[item],
            worst=[item],
            per_class=classes,
            confusion=table,
            confused=[dict(truth="cat", guess="dog", count=2)],
            map=drawn,
        )
    }
    rows = [dict(step=n, loss=5.0 / n, time_step=1.0, time_init=2.0) for n in (10, 20)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    config = recipes.load("tiny").to_dict() | {"vocabulary_checksum": "0" * 64}
    history = json.dumps(dict(step=20, scores=scores)) + "\n"
    texts = (json.dumps(config), lines, history, json.dumps(scores), json.dumps(examples))
    return [bytes([number]) + text.encode() for number, text in enumerate(texts)]  # fmt: skip


def damage_report(rng: random.Random, seed: bytes) -> bytes:
    """Other values in each line or the whole of a file."""
    lines = seed[1:].splitlines()
    damaged = [mutate.text_of(rng, mutate.tree(rng, json.loads(line))) for line in lines]
    return seed[:1] + b"\n".join(damaged) + b"\n" * (seed[0] in (1, 2))


def read_report(path: pathlib.Path) -> str:
    """The page of a run with this file."""
    folder = path.with_name("reported")
    folder.mkdir(exist_ok=True)
    for seed in report_seeds():
        (folder / REPORTS[seed[0]]).write_bytes(seed[1:])
    data = path.read_bytes()
    (folder / REPORTS[data[0] % len(REPORTS)]).write_bytes(data[1:])
    page = report.write_report(folder).read_bytes()
    return f"page: {hashlib.blake2b(page, digest_size=6).hexdigest()}"


def _damage(rng: random.Random, seed: bytes) -> bytes:
    return mutate.data(rng, seed)


KINDS: dict[str, Any] = {
    "overrides": Kind(override_seeds, damage_overrides, read_overrides),
    "configs": Kind(config_seeds, damage_config, read_config),
    "shards": Kind(shard_seeds, damage_shard, read_shard),
    "manifests": Kind(manifest_seeds, damage_manifest, read_manifest),
    "indexes": Kind(index_seeds, _damage, read_index),
    "reports": Kind(report_seeds, damage_report, read_report),
    "captions": Kind(caption_seeds, damage_captions, read_captions),
}
