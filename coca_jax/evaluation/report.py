"""Renders the HTML report of a run, or of several runs side by side, from the files in its workdir."""

from __future__ import annotations

import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
from absl import logging
from etils import epath

from coca_jax.config import shapes
from coca_jax.config.base import flatten
from coca_jax.evaluation import report_charts, report_data, verdict
from coca_jax.evaluation.report_data import RunFiles
from coca_jax.runtime import goodput as training
from coca_jax.runtime import storage

# Embedding map: a scatter plot of the evaluated images. Without JavaScript it shows only dots;
# templates/maps.js adds the thumbnail of the selected dot.


MARGIN = 40  # around the points, whose coordinates run from 0 to 1000
THUMBNAIL = 56  # width of a thumbnail in units of the plot


def map_layout(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Returns the geometry of an embedding map, or None if `found` is empty.

    found: the "map" entry of eval_examples.json.

    The result's `dots` are sorted from left to right. (sheet_x, sheet_y) is the position of a dot's
    thumbnail in the sprite sheet, in pixels; (near_x, near_y) is its corner on the plot.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: the entry is damaged.
    """
    if not found:
        return None
    points, texts, right, size = found["points"], found["texts"], found["right"], found["size"]
    if not len(points) == len(texts) == len(right):
        raise ValueError(f"a map of {len(points)} points, {len(texts)} texts, {len(right)} marks")
    columns = found["columns"]
    if not all(isinstance(n, int) and 0 < n <= 4096 for n in (columns, size)):
        raise ValueError(f"a sheet with {columns!r} thumbnails per row, {size!r} pixels each")
    low, high = min(y for _, y in points), max(y for _, y in points)
    dots = []
    for number, (x, y) in enumerate(points):
        line, column = divmod(number, columns)
        # SVG's y axis points down.
        at = dict(x=MARGIN + x, y=MARGIN + high - y, right=bool(right[number]))
        half = THUMBNAIL // 2
        near = dict(near_x=at["x"] - half, near_y=at["y"] - half)
        sheet = dict(sheet_x=column * size, sheet_y=line * size)
        dots.append(at | near | sheet | dict(text=str(texts[number])))
    dots.sort(key=lambda dot: (dot["x"], dot["y"]))
    lines = -(-len(points) // columns)
    return dict(
        width=1000 + 2 * MARGIN,
        height=high - low + 2 * MARGIN,
        dots=dots,
        thumbnail=THUMBNAIL,
        size=size,
        sheet=str(found["sheet"]),
        sheet_width=columns * size,
        sheet_height=lines * size,
        share=[f"{share:.0%}" for share in found["share"]],
        right=sum(dot["right"] for dot in dots),
    )


# Example images of each evaluation, worst first, and the geometry of the confusion matrix.


Found = Mapping[str, Any]
CELL = 18  # pixels per cell of the confusion matrix


def sections(examples: Mapping[str, Found], layouts: set[str]) -> list[dict[str, Any]]:
    """Returns dict(id, title, data, layout, found, map) for each evaluation in eval_examples.json.
    Skips an evaluation with an unknown layout, with a warning."""
    made = []
    for number, (name, found) in enumerate(examples.items()):
        evaluator, _, data = name.partition("/")
        layout = found.get("kind", "") if isinstance(found, Mapping) else ""
        if isinstance(layout, str) and layout in layouts:
            title = report_data.title_of(evaluator)
            try:
                shown = _ORDERS.get(layout, dict)(found)
                drawn = map_layout(found.get("map"))
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                text = f"eval_examples.json: damaged entry {name}: {type(error).__name__}: {error}"
                raise ValueError(f"{text}. Run evaluate again.") from None
            about = dict(id=f"e{number}", title=title, data=data, layout=layout)
            made.append(dict(**about, found=shown, map=drawn))
        elif layout:
            logging.warning(
                "eval_examples.json: skipped the examples of %s: unknown layout %r. Layouts in "
                "coca_jax/evaluation/templates/layouts: %s",
                *(name, layout, ", ".join(sorted(layouts))),
            )
    return made


def _worst_first(found: Found, sort_key: Callable[[Found], Any]) -> list[Found]:
    """The worst examples and an even sample of the others, sorted by `sort_key`."""
    worst = list(found.get("worst", ()))
    return sorted(worst + [item for item in found["items"] if item not in worst], key=sort_key)


def _marks(right: Iterable[bool]) -> list[str]:
    """'yes' for correct guesses, 'no' for wrong ones before the first correct one, '' after it."""
    marks, found = [], False
    for correct in right:
        found = found or correct
        marks.append("yes" if correct else "" if found else "no")
    return marks


def _by_class(found: Found) -> dict[str, Any]:
    """Sorts wrong guesses first, by decreasing confidence, and classes by increasing accuracy."""
    shown = dict(found)

    def sort_key(item: Found) -> tuple[bool, float]:
        best = item["guesses"][0]
        right = best[0] in item["truth"]
        return right, best[1] if right else -best[1]

    shown["items"] = [
        dict(item, marks=_marks(name in item["truth"] for name, _ in item["guesses"]))
        for item in _worst_first(found, sort_key)
    ]
    classes = sorted(found["per_class"].items(), key=lambda item: item[1]["accuracy"])
    shown["hardest"] = classes[:12]
    shown["all_classes"] = sorted(found["per_class"].items()) if len(classes) > 12 else []
    table = found.get("confusion")  # missing with too many classes or no examples
    shown["grid"] = confusion(table) if table and table["rows"] else None
    return shown


def _captions(found: Found) -> dict[str, Any]:
    """Sorts wrong captions first, by increasing F1 against the references."""
    shown = dict(found)
    shown["items"] = _worst_first(found, lambda item: (item["exact"], item.get("f1", 0.0)))
    return shown


def _retrieval(found: Found) -> dict[str, Any]:
    """Sorts queries by decreasing rank of their first correct match."""

    def sort_key(hits: list[Found]) -> int:
        # Older files store no rank: a match outside the stored hits counts as one rank later.
        right = [hit.get("rank", n) for n, hit in enumerate(hits, 1) if hit["correct"]]
        return -(right[0] if right else len(hits) + 1)

    shown = dict(found)
    shown["items"] = []
    for item in sorted(found["items"], key=lambda item: sort_key(item["texts"])):
        texts = _with_correct(item["texts"], 4)
        marks = _marks(hit["correct"] for hit in texts)
        spare = 2 if marks[2:] == ["no", "yes"] else 3  # hidden on narrow screens
        shown["items"].append(dict(item, texts=texts, marks=marks, spare=spare))
    shown["text_items"] = sorted(found["text_items"], key=lambda item: sort_key(item["images"]))
    return shown


def _with_correct(hits: list[Found], count: int) -> list[Found]:
    """The first `count` hits; if all are wrong, a later correct hit replaces the last of them."""
    first = hits[:count]
    later = [hit for hit in hits[count:] if hit["correct"]][:1]
    return first if any(hit["correct"] for hit in first) or not later else first[:-1] + later


_ORDERS = dict(zero_shot=_by_class, captioning=_captions, retrieval=_retrieval)


def confusion(table: Found) -> dict[str, Any]:
    """Pixel positions of the labels and cells of a confusion matrix (rows: true class, columns:
    predicted class). table: {"rows": names, "columns": names, "counts": [rows, columns]}."""
    rows, columns, counts = table["rows"], table["columns"], table["counts"]
    left, top = 8 + 7 * max(map(len, rows)), 8 + 6 * max(map(len, columns))
    heads = [dict(x=left + CELL * j + CELL / 2 + 4, name=name) for j, name in enumerate(columns)]
    lines = []
    for i, name in enumerate(rows):
        total, cells = max(sum(counts[i]), 1), []
        for j, guess in enumerate(columns):
            share = counts[i][j] / total
            cells.append(
                dict(
                    x=left + CELL * j,
                    kind="hit" if name == guess else "miss",
                    opacity=f"{0.15 + 0.85 * share:.2f}" if share else "",
                    note=f"{name} classified as {guess}: {counts[i][j]} of {total}",
                )
            )
        lines.append(dict(y=top + CELL * i, name=name, cells=cells))
    return dict(
        width=left + CELL * len(columns) + 4 * top // 5,
        height=top + CELL * len(rows) + 4,
        left=left,
        top=top,
        size=CELL - 1,
        columns=heads,
        rows=lines,
    )


TIMES = dict(  # labels for the parts of a run's time
    init="start-up",
    compile="compilation",
    data_wait="waiting for data",
    step="steps",
    eval="evaluation",
    save="checkpoint saves",
    lost="lost steps",
    down="not running",
)
# Identifies our reports, in every version: base.html ends the title with it.
TITLE_END = " \u00b7 coca_jax</title>".encode()
_HEAD = 1 << 16  # the title ends within this many bytes
TEMPLATES = pathlib.Path(__file__).parent / "templates"


def write_report(
    workdir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None
) -> epath.Path:
    """Writes the report of a run, by default to `workdir`/report.html, and returns its path.

    Raises FileNotFoundError if `workdir` doesn't exist, ValueError if it contains neither metrics
    nor evaluations.
    """
    run = report_data.read(workdir)
    tasks = report_data.tasks_of(run.scores)
    path = storage.place(out) if out else run.folder / "report.html"
    context: dict[str, Any] = dict(
        title=run.name,
        summary=summary(run),
        verdict=verdict.of_run(run),
        headlines=report_data.headlines(run.scores, tasks),
        tables=report_data.tables(run.scores, tasks, run),
        evaluations=report_charts.evaluations([run]),
        training=report_charts.training([run]),
        goodput=goodput(run),
        examples=sections(run.examples, layouts()),
        card=model_card(run),
        config=json.dumps(run.config, indent=2) if run.config else "",
    )
    storage.write_text(path, _render("report.html", context, run.folder))
    return path


def check_out(out: str | os.PathLike[str]) -> None:
    """Raises ValueError if `out` doesn't end with .html, is a folder, or would overwrite a file
    that is not one of our reports."""
    stem, suffix = os.path.splitext(str(out))
    if suffix.lower() != ".html":
        raise ValueError(
            f"--out={out}: not an .html file. Use --out={stem if suffix else out}.html."
        )
    path = storage.place(out)
    if not path.exists():
        return
    if path.is_dir():
        raise ValueError(f"--out={out}: this is a folder. Use --out={out}/report.html.")
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head and TITLE_END not in head:
        raise ValueError(f"--out={out}: the file exists and is not a report. Use another name.")


def _render(template: str, context: dict[str, Any], folder: epath.Path) -> str:
    """Raises ValueError if eval_examples.json lacks a field that its layout needs."""
    try:
        return _environment().get_template(template).render(context)
    except (jinja2.UndefinedError, LookupError, TypeError, AttributeError) as error:
        file, why = folder / "eval_examples.json", f"{type(error).__name__}: {error}"
        name, layout = _unrenderable(context)
        if not name:
            raise ValueError(f"{file}: damaged: {why}. Run evaluate again.") from None
        raise ValueError(
            f"{file}: {name} lacks a field that layouts/{layout}.html needs: {why}. Run evaluate "
            "again, or correct `examples` in your evaluator."
        ) from None


def _unrenderable(context: dict[str, Any]) -> tuple[str, str]:
    """(name, layout) of the first evaluation whose layout fails to render; ('', '') if all do."""
    parts = _environment().get_template("parts.html").module
    for section in context.get("examples", ()):
        template = _environment().get_template(f"layouts/{section['layout']}.html")
        try:
            template.render(context | dict(parts=parts, section=section, found=section["found"]))
        except (jinja2.UndefinedError, LookupError, TypeError, AttributeError):
            return f"{section['title']} of {section['data']}", section["layout"]
    return "", ""


def write_comparison(
    workdirs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]
) -> epath.Path:
    """Writes a report that compares several runs (curves, scores, config differences) to `out`, and
    returns its path. Raises the errors of `write_report`."""
    runs = report_data.read_several(workdirs)
    context: dict[str, Any] = dict(
        title=" \u00b7 ".join(run.name for run in runs),
        runs=[
            dict(
                name=run.name,
                summary=summary(run),
                goodput=goodput(run),
            )
            for run in runs
        ],
        tables=report_data.side_by_side(runs),
        evaluations=report_charts.evaluations(runs),
        training=report_charts.training(runs),
        differences=differences(runs),
    )
    path = storage.place(out)
    storage.write_text(path, render_page("comparison.html", context))
    return path


def render_page(template: str, context: dict[str, Any]) -> str:
    """Renders a template of this package."""
    return _environment().get_template(template).render(context)


@functools.cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters["duration"] = report_data.duration
    return made


def layouts() -> set[str]:
    """Names of the layouts for the example images of an evaluator."""
    return {path.stem for path in (TEMPLATES / "layouts").glob("*.html")}


def summary(run: RunFiles) -> str:
    """A one-line summary of the run: steps, batch size, model, time, final loss."""
    config, last, parts = run.config, run.logged.last, []
    if run.last_step:
        parts.append(f"{run.last_step:,} steps")
    if "batch_size" in config:
        parts.append(f"batch {batch(config)}")
    model = config.get("model", {})
    if "image_size" in model:
        size, patch = (shapes.words(model.get(k, "?")) for k in ("image_size", "patch_size"))
        parts.append(f"{size} px, patch {patch}")
    seconds = sum(spent for part, spent in time_totals(run).items() if part != "down")
    if seconds:
        parts.append(report_data.duration(seconds))
    if isinstance(last.get("loss"), float):
        parts.append(f"final loss {report_data.number(last['loss'])}")
    return " \u00b7 ".join(parts)


def batch(config: Mapping[str, Any]) -> str:
    """The batch sizes of a run, in the order of its schedule."""
    sizes = [*(size for _, size in config.get("batch_sizes", ())), config.get("batch_size", 0)]
    return ", then ".join(f"{size:,}" for size in sizes)


def time_totals(run: RunFiles) -> dict[str, float]:
    """Seconds per part of a run, longest first: from goodput.json, which spans restarts, or else
    from metrics.jsonl."""
    if "life" not in run.goodput:
        return run.logged.seconds()
    found = training.fold(run.goodput, run.goodput["life"]["step"], 0.0)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def goodput(run: RunFiles) -> dict[str, Any]:
    """How the run spent its time: dict(share, whole, parts, starts), where `share` is the fraction
    spent in steps; {} if unknown."""
    totals, starts = time_totals(run), run.goodput["starts"] if "life" in run.goodput else 0
    whole = sum(totals.values())
    if not whole:
        return {}
    parts = [
        dict(
            colour=number,  # style.css defines one color per part
            width=f"{100 * seconds / whole:.2f}",
            label=f"{TIMES.get(name, name)} {report_data.duration(seconds)} ({seconds / whole:.1%})",
        )
        for number, (name, seconds) in enumerate(totals.items())
        if seconds > 0
    ]
    share = f"{totals.get('step', 0.0) / whole:.1%}"
    return dict(share=share, whole=report_data.duration(whole), parts=parts, starts=starts)


def model_card(run: RunFiles) -> list[tuple[str, str]]:
    """(label, value) rows that describe the model and its training, from config.json."""
    config = run.config
    model = config.get("model", {})
    if not model:
        return []
    image, text, data = model.get("image", {}), model.get("text", {}), config.get("data", {})
    optimizer, loss = config.get("optimizer", {}), config.get("loss", {})
    sources = [
        str(entry.get("path") or entry.get("tfds") or entry.get("builtin") or entry.get("seqio"))
        + f" [{entry.get('split') or 'train'}]"
        for entry in data.get("sources", ())
    ]
    found = {
        "Model": f"CoCa, {shapes.words(model.get('image_size'))} px, "
        f"patch {shapes.words(model.get('patch_size'))}",
        "Image encoder": (
            f"width {image.get('width', '?')}, depth {image.get('depth', '?')}" if image else ""
        ),
        "Text decoder": (
            f"width {text.get('width', '?')}, {text.get('unimodal_depth', '?')} unimodal and "
            f"{text.get('multimodal_depth', '?')} multimodal layers, "
            f"{text.get('vocab_size', 0):,} tokens, captions of up to {text.get('max_len', '?')}"
            if text
            else ""
        ),
        "Task head": _head(config),
        "Trained on": ", ".join(sources),
        "Initialized from": config.get("init_from") or ("random weights" if sources else ""),
        "Losses": ", ".join(
            f"{name.removesuffix('_weight')} x {loss[name]:g}"
            for name in loss
            if name.endswith("_weight") and loss[name]
        ),
        "Optimizer": (
            f"{optimizer.get('name', '?')}, learning rate {optimizer.get('learning_rate', 0):g}, "
            f"{optimizer.get('schedule', '')}, weight decay {optimizer.get('weight_decay', 0):g}"
            if optimizer
            else ""
        ),
        "Steps": f"{run.last_step:,} with batch {batch(config)}",
        "Precision": model.get("dtype", ""),
        "Seed": str(config.get("seed", "")),
    }
    return [(name, str(value)) for name, value in found.items() if value]


def _head(config: dict[str, Any]) -> str:
    kind, classes = config.get("head", {}).get("kind", ""), config.get("class_names", ())
    return f"{kind}, {len(classes):,} classes" if kind else ""


def differences(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """dict(key, values) for each config key whose value differs between the runs."""
    flat = [flatten(run.config) for run in runs]
    found = []
    for key in sorted(set().union(*flat)):
        values = [json.dumps(one[key]) if key in one else "" for one in flat]
        if len(set(values)) > 1:
            found.append(dict(key=key, values=values))
    return found
