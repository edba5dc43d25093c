"""The acts of a fit: look, hold out, choose, measure, write the recipe, train, show, export."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import operator
import os
import pathlib
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from coca_jax import inference
from coca_jax.apps import fit_choice
from coca_jax.apps.fit_choice import Facts, kinds, training_facts
from coca_jax.apps.fit_choice import look as look_at_machine
from coca_jax.config import Config, keys
from coca_jax.data import feature_cache, prepare, source_index, supervision, vocabulary
from coca_jax.data.batch_schedule import rest
from coca_jax.data.batches import open_stream
from coca_jax.data.evaluation_data import Records
from coca_jax.data.mixture import Mixture, head_classes
from coca_jax.data.sources import files
from coca_jax.data.sources.array_record import read_manifest
from coca_jax.data.sources.fields import read_class_names
from coca_jax.data.sources.items import Options
from coca_jax.data.sources.manifest import MANIFEST
from coca_jax.data.vocabulary import load
from coca_jax.evaluation import report_data, report_terminal, verdict
from coca_jax.evaluation.verdict import FEW_IMAGES, PRETRAINED
from coca_jax.inference import export_programs
from coca_jax.runtime import (
    bounded_json,
    extras,
    lease,
    machine,
    metric_log,
    out_folder,
    signals,
    storage,
)
from coca_jax.training import auto_mesh, data_flag, memory, recipes, setup
from coca_jax.training import trainer as training
from coca_jax.training.feed import Feed
from coca_jax.training.programs import Programs
from coca_jax.training.state import build_model, init_state

# What a fit keeps in its workdir, so that the same command goes on after a kill: fit.json.


FILE = "fit.json"
RECIPE = "recipe.py"


@dataclasses.dataclass(frozen=True)
class Request:
    """What a fit was asked for.

    Attributes:
        folder: the data, absolute where it is a path here.
        kind: 'caption' or 'label' where only these shall train, '' for what there is.
        minutes: of training.
        init_from: weights to start from, '' for none.
        fields: text_field, label_field, image_field and class_names as they were given.
        overrides: 'key=value' of the config.
        allow_paths: folders and URLs from which rows may name images, in addition to `folder`.
    """

    folder: str
    kind: str = ""
    minutes: float = 30.0
    init_from: str = ""
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    allow_paths: tuple[str, ...] = ()


class Kept:
    """The state of a fit: the request, and facts that were found on the way.

    It is written with the first fact, when the data have been found good: a mistake claims no
    workdir. Until there is a recipe the same data may be asked for otherwise, and what was imported
    is imported again: see `drop_imported`.

    Raises ValueError for a workdir that holds a fit of other data or with a recipe made otherwise,
    or a run or a recipe that is no fit's, or that cannot be written, and for a damaged fit.json.
    """

    def __init__(self, workdir: str, request: Request):
        self._path = pathlib.Path(workdir) / FILE
        wanted = json.loads(json.dumps(dataclasses.asdict(request)))
        self._state: dict[str, Any] = {"request": wanted}
        self._imported: list[str] = []
        self.longer = False  # than the recipe there was chosen for, and nothing else has changed
        if not self._path.exists():
            if (self._path.parent / RECIPE).exists():
                raise ValueError(
                    f"--workdir={workdir} holds a {RECIPE} that fit did not write there; give "
                    f"another, or coca-jax train --config={workdir}/{RECIPE} --workdir=DIR"
                )
            if (self._path.parent / "config.json").exists():
                raise ValueError(
                    f"--workdir={workdir} holds a run that fit did not begin; give another, or go "
                    "on with coca-jax train"
                )
            storage.check_writable(workdir)
            return
        state = _read(self._path)
        there = state["request"]
        if there["folder"] != wanted["folder"]:
            raise ValueError(
                f"--workdir={workdir} holds a fit of {there['folder']}, and this one is of "
                f"{wanted['folder']}; give another --workdir"
            )
        other = [key for key in wanted if there.get(key) != wanted[key]]
        chosen = (self._path.parent / RECIPE).exists()
        self.longer = bool(other) and chosen and _is_longer(there, wanted)
        if other and chosen and not self.longer:
            told = "; ".join(
                f"{key} {there.get(key)!r} there, {wanted[key]!r} here" for key in other
            )
            raise ValueError(
                f"--workdir={workdir} holds a fit of the same data that was asked otherwise "
                f"({told}); give the same flags to go on, or another --workdir"
            )
        self._imported = state.get("imported", [])
        if not other or self.longer:
            self._state = state
            self._imported = []

    def imports(self, path: str) -> None:
        """Notes a folder or file that this fit is about to make, on disk when this returns. One
        that somebody else has made stays theirs."""
        made = self._state.setdefault("imported", [])
        path = os.path.relpath(path, self._path.parent)  # a workdir may be moved or copied
        there = self._path.parent / path
        empty = not there.exists() or (there.is_dir() and not os.listdir(there))
        if path not in made and empty:
            made.append(path)
            self._write()

    def drop_imported(self) -> None:
        """Removes what a fit that was asked otherwise has made here, and nothing else."""
        for path in (self._path.parent / name for name in self._imported):
            if self._path.parent.resolve() not in path.resolve().parents:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self._imported = []

    def get(self, key: str) -> Any:
        """What was kept under a name, else None."""
        return self._state.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keeps a value that JSON can hold, on disk when this returns."""
        self._state[key] = value
        self._write()

    def _write(self) -> None:
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self._state, indent=1) + "\n")
        os.replace(new, self._path)


def _is_longer(there: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a request differs from that of a fit in more minutes or a larger steps=N alone."""
    minutes = (there.get("minutes", 0.0), wanted["minutes"])
    (old, old_steps), (new, new_steps) = map(_without_steps, (there, wanted))
    return old == new and minutes[0] <= minutes[1] and old_steps <= new_steps


def _without_steps(request: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """A request without what says how long it trains, and the N of its steps=N, 0 without."""
    overrides = request.get("overrides", [])
    steps = [int(one.removeprefix("steps=")) for one in overrides if one.startswith("steps=")]
    rest = [one for one in overrides if not one.startswith("steps=")]
    return request | dict(minutes=0, overrides=rest), max(steps, default=0)


def _read(path: pathlib.Path) -> dict[str, Any]:
    """The state in a fit.json. Raises ValueError for a file that holds none."""
    try:
        state = bounded_json.loads(path.read_bytes())
        state["request"]["folder"]
        return state
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} is damaged, or no fit wrote it; restore it, or give another --workdir"
        ) from None


# What `fit` says to people: the data in a line or two, the scores beside chance.


def facts_in_words(facts: Facts, where: str) -> list[str]:
    """What was found, a sentence a line."""
    total = facts.train + facts.test
    lines = [
        f"{where}: {total:,} pictures, {facts.width} x {facts.height} px, "
        + ("drawings or screens" if facts.drawn else "photographs")
        + (f", {facts.repeated:,} of them twice" if facts.repeated else "")
    ]
    if facts.captions:
        median, _, most = facts.words
        lines.append(
            f"captions: {facts.captions + facts.test_captions:,} pictures have one, "
            f"{facts.distinct_captions:,} different ones of {median} words as a rule and {most} at "
            f"most, {facts.distinct_words:,} different words"
        )
    if facts.labels:
        shown = ", ".join(facts.classes[:4]) + (", ..." if len(facts.classes) > 4 else "")
        lines.append(
            f"labels: {facts.labels + facts.test_labels:,}, of {len(facts.classes):,} classes "
            f"({shown}), the largest {facts.largest_class:.0%}"
        )
    if facts.left_out:
        lines.append(f"left out: {facts.problems}")
    trained = training_facts(facts).train
    lines += _left_aside(facts, facts.train - trained)
    lines.append(f"held out for the scores: {facts.test:,}; to train on: {trained:,}")
    return lines


def _left_aside(facts: Facts, pictures: int) -> list[str]:
    """The kind of texts that does not train, and so many pictures that have no other."""
    found, lines = kinds(facts), []
    for kind, count, other, same in (
        ("caption", facts.captions, "label", False),
        ("label", facts.labels, "caption", len(facts.classes) == 1),
    ):
        if count and kind not in found:
            few = f"at most a quarter as many pictures have one as have a {other}"
            lines.append(f"{kind}s do not train: {'all are the same' if same else few}")
    if pictures:
        lines.append(f"{pictures:,} pictures have no {found[0]}, and do not train")
    return lines


def warnings(facts: Facts, request: Request, workdir: str) -> list[str]:
    """What to expect of such data, and what would help; a paragraph a line."""
    lines = []
    if facts.train < FEW_IMAGES and not request.init_from:
        lines += [
            f"Few images: {facts.train:,}. With fewer than about {FEW_IMAGES:,}, a model trained "
            "from scratch learns most of them by heart: after 795 Tux Paint images it put the "
            "right caption first of 156 for 8.3% of new images (chance 0.6%). Start from "
            "pretrained weights instead:",
            f"  {_pretrained_command(request, workdir)}",
        ]
        if importlib.util.find_spec("huggingface_hub") is None:
            lines.append(f"  (downloading them needs: {extras.remedy('hf')})")
    if facts.classes and all(name.isdigit() for name in facts.classes) and "label" in kinds(facts):
        lines.append(
            f"The classes are numbers ({', '.join(facts.classes[:3])}, ...), and become texts such "
            f"as 'a photo of the {facts.classes[0]}': --class_names=FILE, one name a line in the "
            "order of the numbers, would say more."
        )
    return lines


def _pretrained_command(request: Request, workdir: str) -> str:
    """The same fit from pretrained weights, in a workdir of its own."""
    folder = f"{request.folder}:{request.kind}" if request.kind else request.folder
    fields = [f"--{name}={value}" for name, value in request.fields.items()]
    fields += [f"--allow_paths={one}" for one in request.allow_paths]
    place = f"--workdir={workdir.rstrip('/')}-pretrained"
    return shlex.join(["coca-jax", "fit", folder, place, f"--init_from={PRETRAINED}", *fields])


def changed(chosen: Config, config: Config, wanted: Config) -> list[str]:
    """What the user wants otherwise than it was chosen, a value a line. config: what came of it;
    wanted: the choice with the user's values alone, without what follows of them."""
    lines = []
    for key, _ in keys(Config):
        value_of = operator.attrgetter(key)
        if value_of(wanted) != (first := value_of(chosen)):
            lines.append(f"as you wish: {key} {value_of(config)!r} in place of {first!r}")
    return lines


def next_commands(workdir: str, data: str) -> list[str]:
    """What may follow a fit, to paste into a shell. data: the prepared folder."""
    place = json.dumps(workdir, ensure_ascii=False)
    program = f'import coca_jax; print(coca_jax.load({place}).caption(["a.jpg"]))'
    run = shlex.quote(workdir)
    return [
        "next:",
        f"  coca-jax caption --checkpoint={run} PICTURE_OR_FOLDER",
        f"  coca-jax evaluate --checkpoint={run} --data={shlex.quote(data)}",
        f"  python -c {shlex.quote(program)}",
    ]


def shown_captions(pairs: Sequence[tuple[str, str, Sequence[str]]]) -> list[str]:
    """(picture, written, references) as lines."""
    return [
        f"  {picture}: {written!r}" + (f" (its own: {own[0]!r})" if own else "")
        for picture, written, own in pairs
    ]


# How long a step takes: real steps on real batches, before a run is begun.


@dataclasses.dataclass(frozen=True)
class Speed:
    """Attributes:
    step: seconds of a step, waiting for data included.
    compile: seconds of compiling all programs that the steps needed.
    start: seconds from nothing to the first batch.
    """

    step: float
    compile: float
    start: float


def seconds_for(minutes: float) -> float:
    """Seconds of steps that are timed before a run of so many minutes: a twentieth, at most 4."""
    return min(4.0, 60 * minutes / 20)


def measure(config: Config, *, least_seconds: float) -> Speed:
    """Takes steps by `config`, nothing of which is kept; the run begins anew.

    At each size of images that the run has, 4 steps at least and until `least_seconds` have passed.
    Steps that compile do not count.
    """
    buckets = metric_log.TimeBuckets()
    begun = time.perf_counter()
    mesh = auto_mesh.make(config).mesh
    with jax.set_mesh(mesh):
        mixture = Mixture(config)
        classes = head_classes(config, mixture)
        steps = 100 * (config.optimizer.warmup_steps + 10)  # longer than any warm-up
        model = build_model(config, mesh, len(classes))
        stop = signals.current()
        setup.begin(stop, "making the model, to see how long a step takes")
        state = init_state(model, config, mesh)
        kept: Any = [Blank(config)] * len(mixture.sources) if config.data.features else ()
        words = load(config.data.vocabulary)
        batches = open_stream(config, words, mixture, class_names=classes, features=kept)
        feed = Feed(batches, config, mesh, buckets)
        step_fn = Programs(config, model, mesh, steps, buckets, stop)
        total = 0.0
        try:
            batch = next(feed)
            start = time.perf_counter() - begun
            for share, step in stages(config, steps):
                times: list[float] = []
                compiled = buckets.total()["compile_seconds"]
                while len(times) < 4 or sum(times) < least_seconds:
                    tick = time.perf_counter()
                    state, values = step_fn(step, state, batch)
                    jax.block_until_ready(values)
                    batch = next(feed)
                    taken = time.perf_counter() - tick
                    now = buckets.total()["compile_seconds"]
                    if now > compiled:
                        compiled = now
                    else:
                        times.append(taken)
                total += share * sum(times) / len(times)
        finally:
            feed.close()
            batches.close()
    return Speed(total, compiled, start)


class Blank:
    """Stands for what `data.features` keeps of a source, which the run computes of the weights that
    it starts from: a step on zeros takes as long."""

    def __init__(self, config: Config):
        self._tokens = np.zeros(feature_cache.shape(config), config.model.dtype)

    def read(self, row: int, record: Any) -> np.ndarray:
        """See `Features.read`."""
        del row, record
        return self._tokens


def stages(config: Config, steps: int) -> list[tuple[float, int]]:
    """(share of the run, a step in it) of each size of images that the run goes through."""
    shares = [share for share, _ in config.image_sizes]
    begins = [sum(shares[:i]) for i in range(len(shares) + 1)]
    return [
        (share, round(begin * steps) + 1) for share, begin in zip([*shares, rest(shares)], begins)
    ]


# A config as a recipe file: Python that starts from the base config and sets what differs.


def source(config: Config, title: str, why: Sequence[str]) -> str:
    """The text of a recipe whose get_config() gives `config`.

    title: the first line of its docstring; why: the reasons, which follow it.
    """
    doc = "\n".join([title, "", *(f"- {line}" for line in why)])
    doc = doc.replace("\\", "\\\\").replace('"""', "'''")
    lines = [f'"""{doc}', '"""', "", "from ml_collections import ConfigDict", ""]
    lines += ["from coca_jax.recipes import base", "", "", "def get_config() -> ConfigDict:"]
    lines += ['    """The choice that `coca-jax fit` made; change what you like."""']
    lines += ["    config = base.get_config()"]
    default = Config()
    for key, _ in keys(Config):
        value_of = operator.attrgetter(key)
        if value_of(config) != value_of(default):
            *sections, name = key.split(".")
            tree = config.to_dict()  # in which the sections of a list are dicts too
            for section in sections:
                tree = tree[section]
            value = tree[name]
            text = repr(value)
            if isinstance(value, tuple) and value and isinstance(value[0], dict):
                text = "".join(["(\n", *(f"        {one!r},\n" for one in value), "    )"])
            lines.append(f"    config.{key} = {text}")
    return "\n".join([*lines, "    return config"]) + "\n"


Say = Callable[[str], None]
Change = Callable[[Config], Config]
_SAMPLE = 20_000  # texts that the vocabulary and the lengths are taken from, at most


def fit(
    request: Request,
    workdir: str,
    *,
    change: Change = lambda config: config,
    dry_run: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """From data to a trained model in `workdir`, or goes on with what is there.

    Args:
        request: what is asked for.
        change: gives the config that is chosen with the user's own values.
        dry_run: ends with the recipe.
        say: takes lines for people.

    Returns workdir and recipe, and unless it is a dry run export and what `training.trainer.train`
    returns. Raises ValueError or OSError for data that cannot be read or cannot train, and for a
    workdir that holds something else; Preempted when it was asked to stop and saved.
    """
    out_folder.check_apart(workdir, request.folder)
    machine.use()  # measuring, training and captions share programs
    path = pathlib.Path(workdir) / RECIPE
    with out_folder.gone_if_refused(workdir):
        kept = Kept(workdir, request)
        with lease.held(workdir):  # whoever trains there, or fits, has its vocabulary there too
            if path.exists():
                place = kept.get("data")["path"]
                if place != request.folder and files.exists(request.folder):
                    # A fit is of its folder, so its index cannot be named in place of that.
                    go_on = f"`coca-jax train --config={path} --workdir={workdir}`"
                    data_flag.refuse_changed(request.folder, place, options_of(request), go_on)
                say(f"{path} holds the choice that was made before")
                if kept.longer:
                    train_longer(path, request, kept, change, say)
            else:
                kept.drop_imported()
                write_recipe(path, request, workdir, kept, change, say)
    result = dict(workdir=str(workdir), recipe=str(path))
    if dry_run:
        return result
    scores = training.train(recipes.load(str(path)), workdir)
    return result | scores | finish(workdir, kept, scores, say)


def write_recipe(
    path: pathlib.Path, request: Request, workdir: str, kept: Kept, change: Change, say: Say
) -> None:
    """Looks, holds out, chooses and measures; the recipe is there when all of it is done."""
    if request.init_from:
        fit_choice.check_weights(request.init_from)
    facts, place, splits, name = bring_in(request, workdir, kept, say)
    for line in warnings(facts, request, workdir):
        say(line)
    start = None
    if request.init_from:
        into = os.path.join(os.path.abspath(workdir), "pretrained")
        kept.imports(into)
        start = fit_choice.read(request.init_from, into, say)
    kept.put("facts", dataclasses.asdict(facts))
    kept.put("data", dict(path=place, train=splits[0], held=splits[1], name=name))
    config, why = decide(request, facts, (place, splits, name), start, workdir, kept, change, say)
    named = f"{request.folder}:{request.kind}" if request.kind else request.folder
    folder = shlex.quote(named)
    title = f"{name}: the choice of `coca-jax fit {folder} --minutes={request.minutes:g}`."
    new = path.with_suffix(".py.new")
    new.write_text(source(config, title, why))
    os.replace(new, path)


def train_longer(
    path: pathlib.Path, request: Request, kept: Kept, change: Change, say: Say
) -> None:
    """Gives the recipe the steps of a request for more minutes or steps. Training then continues
    with the state of its optimizer.

    Raises ValueError for a recipe whose steps somebody has written otherwise.
    """
    config = recipes.typed(recipes.load(str(path)))
    before = kept.get("request")["minutes"]
    speed = kept.get("speed") or dict(step=60 * before / config.steps, compile=0.0)
    steps = max(config.steps, fit_choice.steps_in(request.minutes, speed["step"], speed["compile"]))
    steps = change(config.change({"steps": steps})).steps
    text, line = path.read_text(), f"    config.steps = {config.steps}\n"
    if text.count(line) != 1:
        raise ValueError(
            f"{path} does not set config.steps as fit wrote it; set it there to {steps}, and run "
            f"`coca-jax train --config={path} --workdir={path.parent}`"
        )
    why = f"- trained longer: {steps:,} steps in place of {config.steps:,}"
    if request.minutes != before:
        why += f", as --minutes={request.minutes:g} after {before:g} allows"
    say(why.removeprefix("- "))
    text = text.replace(line, f"    config.steps = {steps}\n").replace(
        f" --minutes={before:g}`", f" --minutes={request.minutes:g}`", 1
    )
    new = path.with_suffix(".py.new")
    new.write_text(text.replace('\n"""\n', f'\n{why}\n"""\n', 1))
    os.replace(new, path)
    kept.put("request", dataclasses.asdict(request))
    examples = fit_choice.training_facts(facts_of(kept)).train
    passes = steps * config.batch_size / max(examples, 1)
    if passes > fit_choice.PASSES:
        say(f"warning: {passes:,.0f} passes over {examples:,} images: most are learned by heart")


def bring_in(
    request: Request, workdir: str, kept: Kept, say: Say
) -> tuple[fit_choice.Facts, str, tuple[str, str], str]:
    """Looks at the data and prepares them: (facts, of whose pictures those count that train;
    prepared folder, its splits to train on and held out, a name)."""
    options = options_of(request)
    name = source_index.folder_names([request.folder])[0]
    layout = data_flag.layout(request.folder, options)
    signals.current().stage("looking at the data")
    say(f"{request.folder}: looking at it, as {layout.format}")
    scan = fit_choice.Scan(layout.items(options), show="looking")
    facts = only(scan.facts, request.kind)
    fit_choice.check_facts(facts)
    in_place = data_flag.is_prepared(request.folder) and layout.held and not request.fields
    if in_place:
        place, splits = request.folder, (layout.train, layout.held)
    else:
        place, splits = files.join(os.path.abspath(workdir), f"data/{name}"), ("train", "test")
        check_place(request.folder, workdir, place)
        kept.imports(place)
        share = kept.get("holdout")
        if share is None and not layout.held:
            share = fit_choice.holdout(scan.places)
            kept.put("holdout", share)
        with prepare.within("--workdir", workdir):
            data_flag.bring_in(layout, place, holdout=share or data_flag.HOLDOUT, options=options)
    there = read_manifest(place)["splits"]
    facts = fit_choice.with_counts(facts, there[splits[0]], there[splits[1]])
    facts = only(facts, request.kind)
    fit_choice.check_facts(facts)
    for line in facts_in_words(facts, request.folder):
        say(line)
    return fit_choice.training_facts(facts), place, splits, f"{name}_{splits[1]}"


def check_place(folder: str, workdir: str, place: str) -> None:
    """Raises ValueError where the data would be brought into a folder that they are in, or that
    holds something else."""
    if f"{os.path.realpath(folder)}/".startswith(f"{os.path.realpath(place)}/"):
        raise ValueError(
            f"--workdir={workdir}: data are brought into its {place}, and {folder} is there; give "
            "another --workdir"
        )
    names = os.listdir(place) if os.path.isdir(place) else []
    if names and MANIFEST not in names and not any(n.startswith(".unfinished-") for n in names):
        raise ValueError(
            f"--workdir={workdir}: data are brought into its {place}, which holds other files; "
            "give another --workdir"
        )


def only(facts: fit_choice.Facts, kind: str) -> fit_choice.Facts:
    """The facts as if there were texts of one kind alone; '': as they are."""
    wanted = supervision.KINDS[kind].wanted if kind else ""
    if wanted == "text":
        return dataclasses.replace(facts, labels=0, test_labels=0, classes=())
    if wanted == "label":
        return dataclasses.replace(facts, captions=0, test_captions=0)
    return facts


def options_of(request: Request) -> Options:
    """How the data are read."""
    given: dict[str, Any] = dict(request.fields)
    names = given.pop("class_names", "")
    return Options(
        **given,
        class_names=read_class_names(names) if names else (),
        allow_paths=tuple(request.allow_paths),
    )


def decide(
    request: Request,
    facts: fit_choice.Facts,
    data: tuple[str, tuple[str, str], str],
    start: fit_choice.Weights | None,
    workdir: str,
    kept: Kept,
    change: Change,
    say: Say,
) -> tuple[Config, tuple[str, ...]]:
    """The recipe and its reasons: the largest size whose measured steps suffice."""
    place, splits, name = data
    machine = look_at_machine()
    say(
        f"this machine: {machine.devices} {machine.platform} device(s), {machine.cores} cores, "
        f"{machine.flops / 1e9:,.0f} GFLOP/s, {machine.memory / 2**30:.1f} GiB free"
    )
    candidates = fit_choice.sizes_for(facts, machine, request.minutes)
    for number, size in enumerate(candidates):
        words = f"{workdir}/data/vocabulary-{size.pieces}.model"
        kept.imports(os.path.abspath(words))
        keywords: dict[str, Any] = dict(
            path=place,
            splits=splits,
            name=name,
            vocabulary=os.path.abspath(words),
            weights=start,
        )
        draft = fit_choice.choose(facts, machine, request.minutes, size, **keywords)
        kernels = setup.begin_kernels(draft.config, machine.platform)
        tokens = token_lengths(draft.config, facts, size, workdir, say)
        setup.wait_for_kernels(kernels, signals.current())
        measured_facts = dataclasses.replace(facts, tokens=tokens)
        keywords |= dict(bytes_needed=memory.needed, change=change)
        choice = fit_choice.choose(measured_facts, machine, request.minutes, size, **keywords)
        seconds = seconds_for(request.minutes)
        speed = measure(change(choice.config), least_seconds=seconds)
        last = number == len(candidates) - 1 or start is not None
        if last or 60 * request.minutes / speed.step >= fit_choice.ENOUGH_STEPS:
            break
        say(f"{size.name}: {speed.step:.2f} s a step are too slow; trying a smaller model")
    kept.put("speed", dict(step=speed.step, compile=speed.compile))  # for a longer run
    plain, wanted = (
        fit_choice.with_steps(one, facts, request.minutes, speed.step, speed.compile)
        for one in (choice, dataclasses.replace(choice, config=change(choice.config)))
    )
    config = change(wanted.config)
    why = (*wanted.why, *changed(plain.config, config, change(plain.config)))
    say("the choice:")
    for line in why:
        say(f"  {line}")
    left = config.steps * speed.step / 60  # what was timed is compiled
    say(f"about {left:.1f} minutes of training follow, then the scores, captions and the export")
    return config, why


def token_lengths(
    config: Config, facts: fit_choice.Facts, size: fit_choice.Size, workdir: str, say: Say
) -> tuple[int, int, int]:
    """Tokens of a text with begin and end, (75%, 99%, most), by the config's vocabulary, which is
    learned from the data first where it is not there."""
    texts = list(Mixture(config).sample_texts(_SAMPLE))
    if not os.path.exists(config.data.vocabulary):
        say("learning the vocabulary from the texts")
        wanted = fit_choice.vocabulary_size(facts, size)
        words = vocabulary.train(texts, wanted, config.data.vocabulary, config.seed, kind="bpe")
    else:
        words = vocabulary.load(config.data.vocabulary)
    counts = [len(ids) + 2 + config.data.label_token for ids in words.encode_many(texts)]
    return tuple(int(x) for x in np.quantile(counts, (0.75, 0.99, 1.0)))  # type: ignore


def finish(workdir: str, kept: Kept, scores: dict[str, Any], say: Say) -> dict[str, Any]:
    """Shows captions and scores, writes the export, says what comes next; returns a summary."""
    data = kept.get("data")
    model = inference.load(workdir, narrow=False)  # an export has the weights as they are
    signals.current().stage("captioning and exporting")
    say("the first pictures that were held out, and what the model writes of them:")
    for line in shown_captions(list(captions(model, data))):
        say(line)
    say("writing the export: weights and programs that need none of this package")
    place = os.path.join(workdir, "export")
    try:
        export_programs.export(model, place)
    except Exception as error:  # of any kind: the run is trained, and its scores follow
        command = f"coca-jax export --checkpoint={shlex.quote(workdir)} --out={shlex.quote(place)}"
        say(f"export: {error}. The run itself is complete; retry with `{command}`")
        place = ""
    table = report_terminal.score_table(scores)
    for line in table or ["no data was held out, so there are no scores"]:
        say(line)
    if sentence := verdict.of_run(report_data.read(workdir)):
        say(sentence)
    page = os.path.join(workdir, "report.html")
    report = f"report: {page}   " if os.path.exists(page) else ""  # `train` said why it is not
    export = f"   export: {place}" if place else ""
    say(f"{report}recipe: {workdir}/{RECIPE}{export}")
    for line in next_commands(workdir, data["path"]):
        say(line)
    return dict(export=place or None)


def facts_of(kept: Kept) -> fit_choice.Facts:
    """The facts that an earlier act kept."""
    found: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in kept.get("facts").items()
    }
    return fit_choice.Facts(**found)


def captions(model: Any, data: dict[str, Any], count: int = 8) -> Iterator[tuple[str, str, list]]:
    """(key, what the model writes, its own captions or labels) of the first held-out pictures."""
    if not data["held"]:
        return
    records = list(Records(dict(path=data["path"], split=data["held"]), limit=count))
    written = model.caption([record["image"] for record in records])
    for record, text in zip(records, written):
        yield record["key"], text, record["text"] or record["labels"]
