"""What a --data flag says, PATH[:KIND[:WEIGHT]], and what the data that it names train."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from coca_jax.config import Config, Entry
from coca_jax.config.data import PLACES
from coca_jax.config.evaluation import GUARDED
from coca_jax.data import filters, holdout, mixture, prepare, quarantine, source_index, supervision
from coca_jax.data.sources import files, formats, in_place, manifest, registry
from coca_jax.data.sources.items import Item, Options

_LOOKED_AT = 256  # records, for a field that lists questions
_FAR = 1.5  # times as many rows as were asked for, or as few
_ASKED = ("questions", "answers")  # keys of an entry


@dataclasses.dataclass(frozen=True)
class Named:
    """What one flag says. kind '': as the data tell."""

    path: str
    kind: str = ""
    weight: float = 1.0


def parse(text: str) -> Named:
    """PATH, PATH:KIND or PATH:KIND:WEIGHT; read from the right, as URLs and paths have colons.

    Raises ValueError for an unknown kind behind a path that is there, for several paths with commas
    between them, or a weight that is not above 0, or not finite.
    """
    path, kind, weight = text, "", 1.0
    if text.startswith("hf://"):
        return _of_hub(text)
    before, _, last = text.rpartition(":")
    earlier, _, middle = before.rpartition(":")
    if middle in supervision.KINDS and _is_number(last):
        path, kind, weight = earlier, middle, float(last)
    elif last in supervision.KINDS:
        path, kind = before, last
    elif before and files.exists(before) and not files.exists(text):
        raise ValueError(
            f"--data={text}: {last!r} is none of {', '.join(supervision.KINDS)}; write PATH, "
            "PATH:KIND or PATH:KIND:WEIGHT"
        )
    if not path:
        raise ValueError(f"--data={text}: it names no path; write PATH, PATH:KIND:WEIGHT ...")
    several = [one for one in text.split(",") if one]
    if len(several) > 1 and (path.count("://") > 1 or not files.exists(path)):
        if all(files.exists(parse(one).path) for one in several):
            each = " ".join(f"--data={one}" for one in several)
            raise ValueError(f"--data={text}: a flag names one place; write {each}")
    if not 0 < weight < float("inf"):
        raise ValueError(f"--data={text}: the weight is a share of the batch, above 0 and finite")
    return Named(path, kind, weight)


def _of_hub(text: str) -> Named:
    """hf://OWNER/NAME[/CONFIG][:SPLIT][:KIND[:WEIGHT]]: its Arrow files, downloaded now."""
    head, *behind = text.removeprefix("hf://").split(":")
    number = next((n for n, word in enumerate(behind) if word in supervision.KINDS), len(behind))
    kind, *weight = [*behind[number:], ""][:2] if behind[number:] else ["", ""]
    place = ":".join([f"hf://{head}", *behind[:number]])
    if weight and weight[0] and not _is_number(weight[0]):
        raise ValueError(f"--data={text}: write hf://OWNER/NAME[/CONFIG][:SPLIT][:KIND[:WEIGHT]]")
    found = float(weight[0]) if weight and weight[0] else 1.0
    if not 0 < found < float("inf"):
        raise ValueError(f"--data={text}: the weight is a share of the batch, above 0 and finite")
    return Named(formats.from_hub(place), kind, found)


def _is_number(text: str) -> bool:
    try:
        return float(text) == float(text)
    except ValueError:
        return False


def kind_of(one: Named, path: str, split: str, fields: Mapping[str, str]) -> str:
    """The kind that the flag names; else 'caption' where at least as many examples of a prepared
    split have a text as a label, and 'label' where not.

    fields: of the records, of which texts or labels are taken.

    Raises ValueError where the flag names one of which no example has what trains.
    """
    entry, kind = manifest.read_manifest(path)["splits"][split], supervision.KINDS.get(one.kind)
    if kind and kind.counted and not fields and entry.get(f"with_{kind.wanted}") == 0:
        raise ValueError(
            f"--data={one.path}:{one.kind}: none of its {entry['count']} examples has a "
            f"{kind.wanted}; leave out :{one.kind}, or name the field with --{kind.wanted}_field"
        )
    if one.kind or not fields:
        return one.kind or ("caption" if entry["with_text"] >= entry["with_label"] else "label")
    return "caption" if "text_field" in fields else "label"


@contextlib.contextmanager
def naming_one(fields: Mapping[str, str], count: int) -> Iterator[None]:
    """Adds to an error that names one of the fields, where it goes for `count` data, how it is
    given for some of them."""
    try:
        yield
    except ValueError as error:
        given = [f"--{n}={field}" for n, field in fields.items() if f"{field!r}" in str(error)]
        if count < 2 or not given:
            raise
        raise ValueError(
            f"{error}; {given[0]} goes for every --data: for those that have the field alone leave "
            f"it out, and give --data=DIR that `coca-jax prepare {given[0]} --input=... --out=DIR` "
            "writes"
        ) from error


def entries_of(
    one: Named, path: str, split: str, kind: str, recipe: Sequence[Entry]
) -> list[dict[str, Any]]:
    """dict(kind, weight) of the source that a flag is, with what else its kind says. Questions are
    looked for, and chosen by their answers, as in those sources of the recipe whose field a
    prepared split has: one for each of those, which share the weight.

    Raises ValueError naming a field that lists questions where the recipe has no such source.
    """
    if not supervision.KINDS[kind].asks:
        return [dict(kind=kind, weight=one.weight)]
    fields = _lists_of_questions(path, split)
    like = [e for e in recipe if e.kind == kind and e.questions in (fields or [""])]
    if fields and not like:
        there = f"{{'path': {one.path!r}, 'kind': {kind!r}, 'questions': {fields[0]!r}}}"
        raise ValueError(
            f"--data={one.path}:{kind}: its records list questions and answers in the field "
            f"{fields[0]!r}, which the recipe does not name; in place of --data give "
            f'--config.data.sources="({there},)"'
        )
    whole = sum(entry.weight for entry in like)
    return [
        dict(
            kind=kind,
            weight=one.weight * entry.weight / whole,
            **{key: value for key in _ASKED if (value := getattr(entry, key))},
        )
        for entry in like
    ] or [dict(kind=kind, weight=one.weight)]


def _lists_of_questions(path: str, split: str) -> list[str]:
    """The fields in which records of a prepared split list {question, answer}."""
    source = filters.open_whole(Entry(path=path, split=split))
    found: dict[str, None] = {}
    for record in source.read_texts(range(min(len(source), _LOOKED_AT))):
        for name, value in json.loads(record.extra or "{}").items():
            first = value[0] if isinstance(value, list) and value else None
            if isinstance(first, dict) and {"question", "answer"} <= first.keys():
                found[name] = None
    return list(found)


def classes_of(source: Mapping[str, Any]) -> list[str]:
    """The class names of a prepared source whose kind trains on them; [] of other kinds and
    sources, and where they are not known without a look at the records."""
    kind = supervision.KINDS[source["kind"]]
    by_label = kind.has_classes and kind.declared
    if not by_label or "path" not in source or "label_field" in source:
        return []
    return manifest.read_manifest(source["path"])["class_names"]


def check_classes(texts: Sequence[str], sources: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError where all that trains is one class name: no loss learns anything of that,
    and its scores want two.

    texts: of the flags; sources: their entries of path and kind.
    """
    found = [classes_of(source) for source in sources]
    names = {name for classes in found for name in classes}
    if all(found) and len(names) == 1:
        flags = " ".join(f"--data={text}" for text in texts)
        raise ValueError(
            f"{flags}: all labels are {min(names)!r}: with one class there is nothing to tell "
            "apart; give pictures of two classes or more, or captions"
        )


def described(
    one: Named,
    path: str,
    source: Mapping[str, Any],
    train: str,
    held: str,
    left: Mapping[str, str],
    scored: bool = True,
) -> str:
    """A line for people: what trains, as what, and what is held out. source: of `entries_of`;
    left: the fields of the records of which texts or labels are taken, and not counted;
    scored: whether the run has evaluations."""
    entries = manifest.read_manifest(path)["splits"]
    entry, of, field = entries[train], supervision.KINDS[source["kind"]], source.get("questions")
    line = f"{one.path}: {entry['count']} examples of split '{train}' train"
    line += of.counted_as({} if left else entry)
    line += f" with the questions of their field {field!r}" if field else ""
    line += ", of which its `answers` in the recipe choose" if source.get("answers") else ""
    for other in () if one.kind or left else supervision.KINDS.values():
        if other.counted and other is not of and entry[f"with_{other.wanted}"]:
            line += f"; --data={one.path}:{other.name} trains on its {other.name}s"
    if held:
        line += f"; {entries[held]['count']} of '{held}' are held out"
        names = classes_of({**source, **left, "path": path})
        if scored and len(names) == 1:
            line += f", and not scored, as all labels are {names[0]!r}"
        elif scored:
            line += " for the scores"
    else:
        line += (
            "; nothing of it is held out for the scores: `prepare --holdout=SHARE` writes a split "
            "'test' as well"
        )
    bad = sum((Counter(e["quarantined"]) for e in entries.values()), Counter[str]())
    if bad:
        reasons = ", ".join(f"{count} {reason}" for reason, count in bad.most_common())
        line += f"; left out: {reasons}, listed in {path}/*-quarantine.jsonl"
    return line


def check_rows(count: int, batch_size: int) -> None:
    """Raises ValueError where a batch has not a row for each of `count` sources."""
    if count > batch_size:
        raise ValueError(
            f"--data: {count} data sets for a batch of {batch_size} rows, of which each "
            f"takes one at least; give --config.batch_size={count} or more, or fewer data sets: a "
            "glob or a folder above several is one"
        )


def log_shares(weights: Sequence[float], rows: Sequence[int]) -> None:
    """Says where the rows of a batch are far from the weights that were asked for."""
    exact = [weight / sum(weights) * sum(rows) for weight in weights]
    if any(max(one / all_of, all_of / one) >= _FAR for one, all_of in zip(exact, rows)):
        given, taken = (":".join(f"{one:g}" for one in found) for found in (weights, rows))
        print(
            f"--data: the weights {given} are {taken} rows of a batch of {sum(rows)}, as each has "
            "one at least; a larger batch_size comes nearer",
            file=sys.stderr,
        )


# Data that a user names in one go, PATH[:KIND[:WEIGHT]]: indexed on the way, to be read in place,
# with a held-out split, a kind told from what it holds, and evaluations that suit it.


HOLDOUT = 0.1  # of data that come as one split
_AT_MOST = 5000  # examples of an evaluation that is set up here


def apply(
    config: Config,
    texts: Sequence[str],
    workdir: str,
    *,
    fields: Mapping[str, str] | None = None,
    keep_tasks: bool = False,
    main_process: bool = True,
) -> Config:
    """The config with the named data in place of its sources, and evaluations on what is held out
    in place of those on other data, but for the probe of eval.guard; says on stderr what it found.

    Of data that are not prepared an index (or, see `bring_in`, a copy) is made in
    workdir/data/NAME, by the main process; the others wait for it. A second call finds them there.
    fields: text_field, label_field and image_field, where the data call them otherwise.
    keep_tasks: the evaluations stay those of the config.

    Raises ValueError or OSError for data that cannot be used, in one line.
    """
    found = [parse(text) for text in texts]
    check_rows(len(found), config.batch_size)
    for one in found:  # before the first of them is imported
        if one.path != "scenes" and not is_prepared(one.path):
            formats.guess(one.path)
    _check_run(config, found, workdir)
    names = source_index.folder_names([one.path for one in found])
    outs = source_index.places(workdir, [(one.path,) for one in found])
    sources, tasks, kept_tasks = [], [], []
    named: dict[str, Any] = {name: field for name, field in (fields or {}).items() if field}
    for one, name, out in zip(found, names, outs):
        if one.path == "scenes":
            place: dict[str, Any] = {"builtin": "scenes"}
            entries = [dict(kind=one.kind or "caption", weight=one.weight)]
            train, held = "train", "test"
        else:
            path = _prepared_of(one.path, out, named, outs, wait=not main_process)
            train, held = choose_splits(path)
            left = _not_taken(named, path, train)
            place = {"path": path} | left
            kind = kind_of(one, path, train, left)
            entries = entries_of(one, path, train, kind, config.data.sources)
            if main_process:
                scored = not keep_tasks or bool(config.eval.tasks)
                line = described(one, path, entries[0], train, held, left, scored)
                print(line, file=sys.stderr)
        sources += [dict(place, split=train, **entry) for entry in entries]
        kept_tasks += [t for t in config.eval.tasks if t["data"].items() >= place.items()]
        if held:
            of_all = {k: v for k, v in entries[0].items() if k in ("kind", "questions")}
            tasks += evaluations(config, dict(place, split=held, **of_all), f"{name}_{held}")
    check_classes(texts, sources)
    check_rows(len(sources), config.batch_size)  # questions may be several of one flag
    weights = [source["weight"] for source in sources]
    shares = mixture.nearest_shares(weights, config.batch_size)
    if main_process:
        log_shares(weights, shares)
    sources = [dict(source, weight=float(rows)) for source, rows in zip(sources, shares)]
    probes = [] if keep_tasks else _probes(config, kept_tasks, main_process)
    tasks_of_run = config.eval.tasks if keep_tasks else (*probes, *(kept_tasks or tasks))
    return config.change({"data.sources": tuple(sources), "eval.tasks": tuple(tasks_of_run)})


def _probes(
    config: Config, kept_tasks: Sequence[Mapping[str, Any]], tell: bool
) -> list[Mapping[str, Any]]:
    """Where eval.guard is set, the tasks that it watches on other data than the recipe's sources:
    what the model could do before. Those that are `kept` anyway are not among them, nor those whose
    data are not here, which is told."""
    if not config.eval.guard:
        return []
    sources = [tuple(getattr(entry, k) for k in PLACES) for entry in config.data.sources]
    found = []
    for task in config.eval.tasks:
        place = [task["data"].get(k, "") for k in PLACES]
        if task["kind"] in GUARDED and task not in kept_tasks and tuple(place) not in sources:
            if (path := task["data"].get("path")) is None or files.exists(path):
                found.append(task)
            elif tell:
                name = f"{task['kind']}/{task['name']}"
                line = f"eval.guard: the recipe's probe {name} is left out, as {path} is not there"
                print(line, file=sys.stderr)
    return found


def _check_run(config: Config, found: Sequence[Named], workdir: str) -> None:
    """Raises ValueError where `workdir` holds a run of another config or of other data, in which
    nothing is indexed then."""
    from coca_jax.checkpoints import (
        config_file,  # it knows models, whose libraries others do not need here
    )

    places: list[dict[str, str]] = []
    for one in found:
        ready = one.path == "scenes" or is_prepared(one.path)
        place = one.path if ready else source_index.planned(one.path, workdir)
        places.append({"builtin" if one.path == "scenes" else "path": place})
    config_file.check_before_data(config.change({"data.sources": tuple(places)}), workdir)


def _prepared_of(
    path: str, out: str, named: Mapping[str, Any], outs: Sequence[str], wait: bool
) -> str:
    """`prepared` of one of the data that go to `outs`, by the named fields."""
    with naming_one(named, len(outs)):
        options = Options(check=False, **named)
        return prepared(path, out, options, wait=wait, or_whole=len(set(outs)) > 1)


def _not_taken(fields: Mapping[str, str], path: str, split: str) -> dict[str, str]:
    """The fields that are to be read in the records of a prepared split, which was not made by
    them. Raises ValueError for another image, which records do not have."""
    made_by = manifest.request(path, split).get("options", {})
    left = {name: field for name, field in fields.items() if made_by.get(name) != field}
    if "image_field" in left:
        raise ValueError(
            f"--image_field={left['image_field']}: the images in {path} are of another field; give "
            "the data themselves, and a new --workdir"
        )
    return left


def of_command(
    config: Config,
    texts: Sequence[str],
    workdir: str,
    *,
    check: Callable[[Config], object],
    fields: Mapping[str, str] | None = None,
    keep_tasks: bool = False,
    main_process: bool = True,
) -> Config:
    """`apply` for the texts of a `--data` flag, which may be none. Raises as it does, and before
    anything is indexed as `check` does for a config that cannot be."""
    if not texts:
        for name, field in (fields or {}).items():
            if field:
                raise ValueError(f"--{name}={field} is of --data; give --data=PATH as well")
        return config
    places = tuple(dict(path=parse(text).path) for text in texts)
    check(config.change({"data.sources": places}))
    how: dict[str, Any] = dict(fields=fields, keep_tasks=keep_tasks, main_process=main_process)
    return apply(config, texts, workdir, **how)


def is_prepared(path: str) -> bool:
    """Whether `prepare` wrote the folder."""
    return files.exists(files.join(path, manifest.MANIFEST))


@dataclasses.dataclass(frozen=True)
class Layout:
    """How some data lie there.

    Attributes:
        format: a name that `prepare --format` takes.
        input: what it reads, absolute where it is a path here.
        train, held: the splits to train on and to hold out; '' where the data tell none.
        by_field: what the field `split` tells, where the splits are its, not names of files or
            folders.
    """

    format: str
    input: str
    train: str = ""
    held: str = ""
    by_field: holdout.SplitField | None = None

    def options(self, split: str, options: Options) -> Options:
        """The options with which one of the two splits is read."""
        return self.by_field.options(split, options) if self.by_field else options

    def items(self, options: Options) -> Iterator[Item]:
        """The examples of the split to train on, as they are found."""
        format = registry.find(self.format)
        options = self.options(self.train, options)
        read_split = "" if self.by_field else self.train
        for unit in format.joined(format.plan(self.input, read_split, options)):
            for item in format.read(unit, options):
                if item.problem or not quarantine.wanted(item, options):
                    yield item


def layout(path: str, options: Options | None = None) -> Layout:
    """How the data at `path` lie: a folder, glob, archive or list, or 'tfds:NAME'.

    Raises:
        FileNotFoundError, ValueError: nothing there, or nothing that can be read.
    """
    format, input = _format_and_input(path)
    names, by_field = holdout.of_data(format, input, options or Options())
    train, held = _of_names(names) if names else ("", "")
    return Layout(format, input, train, held, by_field)


def _format_and_input(path: str) -> tuple[str, str]:
    format = formats.guess(path)
    if format == "tfds":
        return format, path.removeprefix("tfds:")
    return format, files.absolute(path)


def prepared(
    path: str,
    out: str,
    options: Options | None = None,
    *,
    wait: bool = False,
    or_whole: bool = False,
) -> str:
    """The prepared folder of some data: `path` itself where it is one, else `out`, written now.

    options: how it is read where it is not there yet. wait: another process writes; wait until it
    has. or_whole: as of `bring_in`. Raises as `layout` and `bring_in`.
    """
    if is_prepared(path):
        return path
    if wait:
        source_index.wait_for(out, "train")
        return out
    there = _is_there(_format_and_input(path)[1], out)
    if there:
        refuse_changed(path, out, options)
    whole = "train" in there and not there["train"]["request"]["options"].get("holdout")
    if "train" not in there or not (whole or "test" in there):
        bring_in(layout(path, options), out, options=options, or_whole=or_whole)
    return out


def refuse_changed(path: str, out: str, options: Options | None = None, go_on: str = "") -> None:
    """Raises ValueError where some data have changed since they were brought into `out`. go_on: as
    `indexes.refuse_changed` takes it."""
    format, input = _format_and_input(path)
    now = source_index.state_of_input(format, input, out, options or Options())
    source_index.refuse_changed(input, out, now, go_on)


def bring_in(
    found: Layout,
    out: str,
    *,
    holdout: float = HOLDOUT,
    options: Options | None = None,
    or_whole: bool = False,
) -> None:
    """Indexes data, to be read in place, as the splits 'train' and 'test'; copies those that cannot
    be read in place, and says so. What an earlier call finished stays.

    Splits that the data tell are kept; data of one split get a held-out one, chosen by the images'
    bytes.

    Args:
        holdout: share of the images that is held out of data of one split.
        options: how to read and what to keep.
        or_whole: where that share leaves none to hold out, all are 'train', as a line says.

    Raises ValueError where nothing can be used, `out` holds other data, or the data have changed
    since an earlier call; no empty folder stays.
    """
    try:
        _bring_in(found, out, holdout, options or Options(), or_whole)
        source_index.check_losses(found.input, out)
    except prepare.EmptySide as error:
        manifest.remove_empty(out)
        items = list(found.items(options or Options()))
        lost = [
            dict(key=one.key, reason=one.problem, detail=one.detail) for one in items if one.problem
        ]
        if 2 * len(lost) > len(items):
            raise source_index.too_many_lost(
                found.input, out, lost, len(items) - len(lost)
            ) from None
        raise ValueError(
            f"{found.input}: a share of {holdout:.3g} of the pictures is held out for the scores, which leaves none of {error.read} for the split {error.split!r}"
            f"{error.why}; give more pictures, or what `coca-jax prepare --holdout=0.3 --out=DIR "
            f"--input={shlex.quote(found.input)}` writes"
        ) from None
    except (ValueError, OSError):
        manifest.remove_empty(out)
        raise


def _bring_in(found: Layout, out: str, holdout: float, options: Options, or_whole: bool) -> None:
    state = source_index.state_of_input(found.format, found.input, out, options)
    there = _is_there(found.input, out)
    source_index.refuse_changed(found.input, out, state)
    if found.by_field and not there:
        if line := found.by_field.unused((found.train, found.held)):
            print(f"{found.input}: {line}", file=sys.stderr)
    options = _in_place_where_possible(found, out, options)
    where = (found.format, found.input, out)
    of_all: dict[str, Any] = dict(state=lambda units: state)
    if not found.held:
        keywords = of_all | dict(read_split=found.train, options=options)
        try:
            prepare.prepare_with_holdout(*where, holdout, **keywords)
        except prepare.EmptySide as error:
            if not or_whole or error.split != "test":
                raise
            line = f"a share of {holdout:.3g} of its {error.read} pictures is none"
            print(f"{found.input}: {line}: all train, and none is scored", file=sys.stderr)
            # In the place of what a kill left of a split without what is held out.
            prepare.prepare(*where, split="train", overwrite=True, **keywords)
        return
    for name, split in (("test", found.held), ("train", found.train)):
        read_split = "" if found.by_field else split
        options_here = found.options(split, options)
        keywords = of_all | dict(split=name, read_split=read_split, options=options_here)
        prepare.prepare(*where, **keywords)


def _in_place_where_possible(found: Layout, out: str, options: Options) -> Options:
    """The options with which data come into `out`; says what is done where nothing is there yet."""
    there = _is_there(found.input, out)
    if there:
        indexed = any("root" in split for split in there.values())
        made_by = next(iter(there.values()))["request"]["options"]
        return dataclasses.replace(options, in_place=indexed, check=made_by["check"])
    units = []
    if found.format == "webdataset" or files.is_remote(found.input):
        units = registry.find(found.format).plan(found.input, "", options)
    why = in_place.obstacle(found.format, units, options)
    if files.is_remote(out) and not files.is_remote(found.input):
        why = f"{found.input} lies on this machine, and the run in a bucket"
    line = f"{found.input} is read in place, as {found.format}: making an index of it in {out}"
    if why:
        line = f"{why}: importing it into {out}, as `coca-jax prepare` does"
    unread = ""
    if not options.check and not found.held and not why:
        unread = (
            "; images are checked as training reads them, and the held-out share is chosen by their "
            "names (`coca-jax prepare --holdout` checks all first and keeps equal images together)"
        )
    print(f"{line}{unread}", file=sys.stderr, flush=True)
    return dataclasses.replace(options, in_place=not why)


def _is_there(input: str, out: str) -> dict[str, Any]:
    """The splits of these data that `out` holds. Raises ValueError where it holds others."""
    there = manifest.read_manifest(out)["splits"]
    for split in there.values():
        if split["request"]["input"] != input:
            raise ValueError(
                f"{out} holds data of {split['request']['input']}, not of {input}; use "
                "another --workdir, or give data of another name"
            )
    return there


def _of_names(names: Sequence[str]) -> tuple[str, str]:
    """(split to train on, held-out split or '') of those that some data have.

    Raises ValueError where none of several is for training.
    """
    train = "train" if "train" in names or not names else names[0]
    others = [name for name in names if name != train]
    if others and train != "train":
        raise ValueError(f"the data have the splits {', '.join(names)} and none called 'train'")
    held = next((name for name in ("test", *files.VALIDATION) if name in others), "")
    return train, held


def choose_splits(path: str) -> tuple[str, str]:
    """(split to train on, held-out split or '') of a prepared folder.

    Raises ValueError where it has several splits and none is for training.
    """
    found = sorted(manifest.read_manifest(path)["splits"])
    try:
        return _of_names(found)
    except ValueError as error:
        raise ValueError(f"--data={path}: {error}; name one in config.data.sources") from None


def evaluations(config: Config, data: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Tasks for `config.eval.tasks` on held-out data, of one class none: what these losses teach.

    data: an entry of path, split and kind; name: of the data set in the scores.
    """
    if not config.head.kind and len(classes_of(data)) == 1:
        return []
    by_head = [dict(kind="classification")]
    tasks = (
        by_head
        if config.head.kind
        else supervision.KINDS[data["kind"]].tasks(config.loss, config.data)
    )
    return [dict(name=name, data=data, limit=_AT_MOST) | task for task in tasks]
