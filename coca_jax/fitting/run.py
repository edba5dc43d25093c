"""The acts of a fit: look, hold out, choose, measure, write the recipe, train, show, export."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from coca_jax import inference, recipes
from coca_jax.config import Config
from coca_jax.data import files, kinds, vocabulary
from coca_jax.data.mixture import Mixture
from coca_jax.data.prepared import read_manifest
from coca_jax.evaluators.records import Records
from coca_jax.files import out_folder
from coca_jax.fitting import choose, look, measure, recipe, sizes, tell, weights
from coca_jax.fitting.kept import RECIPE, Kept, Request
from coca_jax.fitting.machine import look as look_at_machine
from coca_jax.importers import asked, indexes, own_data
from coca_jax.importers.items import Options, read_class_names
from coca_jax.importers.metadata import MANIFEST
from coca_jax.inference import export_programs
from coca_jax.machine import compile_cache
from coca_jax.report import run_files, verdict
from coca_jax.training import lease, memory, setup, stopping
from coca_jax.training import run as training

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

    Returns workdir and recipe, and unless it is a dry run export and what `training.run.train`
    returns. Raises ValueError or OSError for data that cannot be read or cannot train, and for a
    workdir that holds something else; Preempted when it was asked to stop and saved.
    """
    out_folder.check_apart(workdir, request.folder)
    compile_cache.use()  # measuring, training and captions share programs
    path = pathlib.Path(workdir) / RECIPE
    with out_folder.gone_if_refused(workdir):
        kept = Kept(workdir, request)
        with lease.held(workdir):  # whoever trains there, or fits, has its vocabulary there too
            if path.exists():
                place = kept.get("data")["path"]
                if place != request.folder and files.exists(request.folder):
                    # A fit is of its folder, so its index cannot be named in place of that.
                    go_on = f"`coca-jax train --config={path} --workdir={workdir}`"
                    own_data.refuse_changed(request.folder, place, options_of(request), go_on)
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
        weights.check(request.init_from)
    facts, place, splits, name = bring_in(request, workdir, kept, say)
    for line in tell.warnings(facts, request, workdir):
        say(line)
    start = None
    if request.init_from:
        into = os.path.join(os.path.abspath(workdir), "pretrained")
        kept.imports(into)
        start = weights.read(request.init_from, into, say)
    kept.put("facts", dataclasses.asdict(facts))
    kept.put("data", dict(path=place, train=splits[0], held=splits[1], name=name))
    config, why = decide(request, facts, (place, splits, name), start, workdir, kept, change, say)
    named = f"{request.folder}:{request.kind}" if request.kind else request.folder
    folder = shlex.quote(named)
    title = f"{name}: the choice of `coca-jax fit {folder} --minutes={request.minutes:g}`."
    new = path.with_suffix(".py.new")
    new.write_text(recipe.source(config, title, why))
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
    steps = max(config.steps, choose.steps_in(request.minutes, speed["step"], speed["compile"]))
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
    examples = choose.training(facts_of(kept)).train
    passes = steps * config.batch_size / max(examples, 1)
    if passes > choose.PASSES:
        say(f"warning: {passes:,.0f} passes over {examples:,} images: most are learned by heart")


def bring_in(
    request: Request, workdir: str, kept: Kept, say: Say
) -> tuple[look.Facts, str, tuple[str, str], str]:
    """Looks at the data and prepares them: (facts, of whose pictures those count that train;
    prepared folder, its splits to train on and held out, a name)."""
    options = options_of(request)
    name = indexes.folder_names([request.folder])[0]
    layout = own_data.layout(request.folder, options)
    stopping.current().stage("looking at the data")
    say(f"{request.folder}: looking at it, as {layout.format}")
    scan = look.Scan(layout.items(options), show="looking")
    facts = only(scan.facts, request.kind)
    choose.check(facts)
    in_place = own_data.is_prepared(request.folder) and layout.held and not request.fields
    if in_place:
        place, splits = request.folder, (layout.train, layout.held)
    else:
        place, splits = files.join(os.path.abspath(workdir), f"data/{name}"), ("train", "test")
        check_place(request.folder, workdir, place)
        kept.imports(place)
        share = kept.get("holdout")
        if share is None and not layout.held:
            share = look.holdout(scan.places)
            kept.put("holdout", share)
        with asked.within("--workdir", workdir):
            own_data.bring_in(layout, place, holdout=share or own_data.HOLDOUT, options=options)
    there = read_manifest(place)["splits"]
    facts = look.with_counts(facts, there[splits[0]], there[splits[1]])
    facts = only(facts, request.kind)
    choose.check(facts)
    for line in tell.facts_in_words(facts, request.folder):
        say(line)
    return choose.training(facts), place, splits, f"{name}_{splits[1]}"


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


def only(facts: look.Facts, kind: str) -> look.Facts:
    """The facts as if there were texts of one kind alone; '': as they are."""
    wanted = kinds.KINDS[kind].wanted if kind else ""
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
    facts: look.Facts,
    data: tuple[str, tuple[str, str], str],
    start: choose.Weights | None,
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
    candidates = sizes.sizes_for(facts, machine, request.minutes)
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
        draft = choose.choose(facts, machine, request.minutes, size, **keywords)
        kernels = setup.begin_kernels(draft.config, machine.platform)
        tokens = token_lengths(draft.config, facts, size, workdir, say)
        setup.wait_for_kernels(kernels, stopping.current())
        measured_facts = dataclasses.replace(facts, tokens=tokens)
        keywords |= dict(bytes_needed=memory.needed, change=change)
        choice = choose.choose(measured_facts, machine, request.minutes, size, **keywords)
        seconds = measure.seconds_for(request.minutes)
        speed = measure.measure(change(choice.config), least_seconds=seconds)
        last = number == len(candidates) - 1 or start is not None
        if last or 60 * request.minutes / speed.step >= choose.ENOUGH_STEPS:
            break
        say(f"{size.name}: {speed.step:.2f} s a step are too slow; trying a smaller model")
    kept.put("speed", dict(step=speed.step, compile=speed.compile))  # for a longer run
    plain, wanted = (
        choose.with_steps(one, facts, request.minutes, speed.step, speed.compile)
        for one in (choice, dataclasses.replace(choice, config=change(choice.config)))
    )
    config = change(wanted.config)
    why = (*wanted.why, *tell.changed(plain.config, config, change(plain.config)))
    say("the choice:")
    for line in why:
        say(f"  {line}")
    left = config.steps * speed.step / 60  # what was timed is compiled
    say(f"about {left:.1f} minutes of training follow, then the scores, captions and the export")
    return config, why


def token_lengths(
    config: Config, facts: look.Facts, size: sizes.Size, workdir: str, say: Say
) -> tuple[int, int, int]:
    """Tokens of a text with begin and end, (75%, 99%, most), by the config's vocabulary, which is
    learned from the data first where it is not there."""
    texts = list(Mixture(config).sample_texts(_SAMPLE))
    if not os.path.exists(config.data.vocabulary):
        say("learning the vocabulary from the texts")
        wanted = sizes.vocabulary_size(facts, size)
        words = vocabulary.train(texts, wanted, config.data.vocabulary, config.seed, kind="bpe")
    else:
        words = vocabulary.load(config.data.vocabulary)
    counts = [len(ids) + 2 + config.data.label_token for ids in words.encode_many(texts)]
    return tuple(int(x) for x in np.quantile(counts, (0.75, 0.99, 1.0)))  # type: ignore


def finish(workdir: str, kept: Kept, scores: dict[str, Any], say: Say) -> dict[str, Any]:
    """Shows captions and scores, writes the export, says what comes next; returns a summary."""
    data = kept.get("data")
    model = inference.load(workdir, narrow=False)  # an export has the weights as they are
    stopping.current().stage("captioning and exporting")
    say("the first pictures that were held out, and what the model writes of them:")
    for line in tell.shown_captions(list(captions(model, data))):
        say(line)
    say("writing the export: weights and programs that need none of this package")
    place = os.path.join(workdir, "export")
    try:
        export_programs.export(model, place)
    except Exception as error:  # of any kind: the run is trained, and its scores follow
        command = f"coca-jax export --checkpoint={shlex.quote(workdir)} --out={shlex.quote(place)}"
        say(f"export: {error}. The run itself is complete; retry with `{command}`")
        place = ""
    for line in tell.score_table(scores, data["name"]):
        say(line)
    if sentence := verdict.of_run(run_files.read(workdir)):
        say(sentence)
    page = os.path.join(workdir, "report.html")
    report = f"report: {page}   " if os.path.exists(page) else ""  # `train` said why it is not
    export = f"   export: {place}" if place else ""
    say(f"{report}recipe: {workdir}/{RECIPE}{export}")
    for line in tell.next_commands(workdir, data["path"]):
        say(line)
    return dict(export=place or None)


def facts_of(kept: Kept) -> look.Facts:
    """The facts that an earlier act kept."""
    found: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in kept.get("facts").items()
    }
    return look.Facts(**found)


def captions(model: Any, data: dict[str, Any], count: int = 8) -> Iterator[tuple[str, str, list]]:
    """(key, what the model writes, its own captions or labels) of the first held-out pictures."""
    if not data["held"]:
        return
    records = list(Records(dict(path=data["path"], split=data["held"]), limit=count))
    written = model.caption([record["image"] for record in records])
    for record, text in zip(records, written):
        yield record["key"], text, record["text"] or record["labels"]
