"""The page: what a run left behind, put into the templates of this folder."""

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

# The map of an evaluation's pictures: where each stands on the drawing, and in the sheet of
# thumbnails. Without a script it shows its dots; templates/maps.js adds the picture of the dot.


MARGIN = 40  # around the places, which run from 0 to 1000
THUMBNAIL = 56  # units of the drawing a thumbnail is wide there


def placed(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """dict(width, height, dots, sheet, texts, share, right) of what `evaluators.picture_map` found;
    None where it found nothing.

    dots: dict(x, y, right, sheet_x, sheet_y, near) from the left to the right; near: the corner of
    its thumbnail on the drawing.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: it is damaged.
    """
    if not found:
        return None
    points, texts, right, size = found["points"], found["texts"], found["right"], found["size"]
    if not len(points) == len(texts) == len(right):
        raise ValueError(f"a map of {len(points)} points, {len(texts)} texts, {len(right)} marks")
    columns = found["columns"]
    if not all(isinstance(one, int) and 0 < one <= 4096 for one in (columns, size)):
        raise ValueError(f"a sheet of {columns!r} thumbnails a row, {size!r} pixels each")
    low, high = min(y for _, y in points), max(y for _, y in points)
    dots = []
    for number, (x, y) in enumerate(points):
        line, column = divmod(number, columns)
        # The drawing's y runs downwards.
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


# What evaluations showed of single pictures: the worst first, and the geometry of a confusion.


Found = Mapping[str, Any]
CELL = 18  # pixels of a confusion


def sections(examples: Mapping[str, Found], layouts: set[str]) -> list[dict[str, Any]]:
    """dict(id, title, data, layout, found, map) of each evaluation whose layout is known; a warning
    names another."""
    made = []
    for number, (name, found) in enumerate(examples.items()):
        evaluator, _, data = name.partition("/")
        layout = found.get("kind", "") if isinstance(found, Mapping) else ""
        if isinstance(layout, str) and layout in layouts:
            title = report_data.title_of(evaluator)
            try:
                shown = _ORDERS.get(layout, dict)(found)
                drawn = placed(found.get("map"))
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                text = f"eval_examples.json is damaged: {name}: {type(error).__name__}: {error}"
                raise ValueError(f"{text}; run evaluate again") from None
            about = dict(id=f"e{number}", title=title, data=data, layout=layout)
            made.append(dict(**about, found=shown, map=drawn))
        elif layout:
            logging.warning(
                "eval_examples.json: the pictures of %s are left out: there is no layout %r among "
                "report/templates/layouts: %s",
                *(name, layout, ", ".join(sorted(layouts))),
            )
    return made


def _worst_first(found: Found, place: Callable[[Found], Any]) -> list[Found]:
    """The worst of all examples, then those spread over all, by `place`."""
    worst = list(found.get("worst", ()))
    return sorted(worst + [one for one in found["items"] if one not in worst], key=place)


def _marks(right: Iterable[bool]) -> list[str]:
    """'yes' for right guesses, 'no' for those that stand before the first of them, '' behind it."""
    marks, found = [], False
    for one in right:
        found = found or one
        marks.append("yes" if one else "" if found else "no")
    return marks


def _by_class(found: Found) -> dict[str, Any]:
    """Wrong guesses first, the surest of them at the top; classes from the hardest on."""
    shown = dict(found)

    def place(item: Found) -> tuple[bool, float]:
        best = item["guesses"][0]
        right = best[0] in item["truth"]
        return right, best[1] if right else -best[1]

    shown["items"] = [
        dict(item, marks=_marks(name in item["truth"] for name, _ in item["guesses"]))
        for item in _worst_first(found, place)
    ]
    classes = sorted(found["per_class"].items(), key=lambda item: item[1]["accuracy"])
    shown["hardest"] = classes[:12]
    shown["all_classes"] = sorted(found["per_class"].items()) if len(classes) > 12 else []
    table = found.get("confusion")  # not there where classes are too many, or none was seen
    shown["grid"] = confusion(table) if table and table["rows"] else None
    return shown


def _captions(found: Found) -> dict[str, Any]:
    """Wrong ones first, the least like their references at the top."""
    shown = dict(found)
    shown["items"] = _worst_first(found, lambda item: (item["exact"], item.get("f1", 0.0)))
    return shown


def _retrieval(found: Found) -> dict[str, Any]:
    """Queries whose match comes late first; files of before ranks stood in them do not say how late
    one comes that is not among the first five."""

    def place(hits: list[Found]) -> int:
        right = [hit.get("rank", n) for n, hit in enumerate(hits, 1) if hit["correct"]]
        return -(right[0] if right else len(hits) + 1)

    shown = dict(found)
    shown["items"] = []
    for item in sorted(found["items"], key=lambda item: place(item["texts"])):
        texts = _with_right(item["texts"], 4)
        marks = _marks(hit["correct"] for hit in texts)
        spare = 2 if marks[2:] == ["no", "yes"] else 3  # left out where there is little room
        shown["items"].append(dict(item, texts=texts, marks=marks, spare=spare))
    shown["text_items"] = sorted(found["text_items"], key=lambda item: place(item["images"]))
    return shown


def _with_right(hits: list[Found], count: int) -> list[Found]:
    """The first hits, of which the last gives its place to a right one that comes later."""
    first = hits[:count]
    later = [hit for hit in hits[count:] if hit["correct"]][:1]
    return first if any(hit["correct"] for hit in first) or not later else first[:-1] + later


_ORDERS = dict(zero_shot=_by_class, captioning=_captions, retrieval=_retrieval)


def confusion(table: Found) -> dict[str, Any]:
    """Places of a confusion's names and cells, in pixels: a row is a true class, a column the
    guess. table: rows, columns (names) and counts."""
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
                    note=f"{name} taken for {guess}: {counts[i][j]} of {total}",
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


TIMES = dict(  # parts of a run's time, as people call them
    init="start-up",
    compile="compilation",
    data_wait="waiting for data",
    step="steps",
    eval="evaluation",
    save="saves",
    lost="steps that were lost",
    down="not running",
)
# By which a page is known, of every version: base.html has it behind the title.
TITLE_END = " \u00b7 coca_jax</title>".encode()
_HEAD = 1 << 16  # bytes of a page in which its title ends
TEMPLATES = pathlib.Path(__file__).parent / "templates"


def write_report(
    workdir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None
) -> epath.Path:
    """Writes the page of a run, `workdir`/report.html by default, and returns its path.

    Raises FileNotFoundError when there is no such folder, ValueError when it holds neither metrics
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
    """Raises ValueError where a page may not be written to `out`: its name is not that of a page,
    or something is there that is no page of this library."""
    begin, end = os.path.splitext(str(out))
    if end.lower() != ".html":
        raise ValueError(
            f"--out={out}: a report is a page; give a name that ends with .html, "
            f"{begin if end else out}.html"
        )
    path = storage.place(out)
    if not path.exists():
        return
    if path.is_dir():
        raise ValueError(
            f"--out={out} is a folder; give the name of a page: --out={out}/report.html"
        )
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head and TITLE_END not in head:
        raise ValueError(f"--out={out} is there and no report; give another name")


def _render(template: str, context: dict[str, Any], place: epath.Path) -> str:
    """Raises ValueError where what evaluations showed lacks what its layout asks for."""
    try:
        return _environment().get_template(template).render(context)
    except (jinja2.UndefinedError, LookupError, TypeError, AttributeError) as error:
        file, why = place / "eval_examples.json", f"{type(error).__name__}: {error}"
        name, layout = _misfit(context)
        if not name:
            raise ValueError(f"{file} is damaged: {why}; run evaluate again") from None
        raise ValueError(
            f"{file} is damaged: {name} has not what layouts/{layout}.html asks for: {why}; run "
            "evaluate again, or mend `examples` of an evaluator of your own"
        ) from None


def _misfit(context: dict[str, Any]) -> tuple[str, str]:
    """The first evaluation whose pictures lack what their layout asks for, and that layout; ''
    where it is none of them."""
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
    """Writes one page of several runs to `out`, and returns its path: their curves in the same
    charts, their scores side by side, and where their configs differ. Raises as `write_report`."""
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
    """A template of this folder, filled with what it asks for."""
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
    """The layouts that evaluators can name for their pictures."""
    return {path.stem for path in (TEMPLATES / "layouts").glob("*.html")}


def summary(run: RunFiles) -> str:
    """The run in a line: steps, batch, model, time, last loss."""
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
    """The batch sizes of a run's config.json, in their order."""
    sizes = [*(size for _, size in config.get("batch_sizes", ())), config.get("batch_size", 0)]
    return ", then ".join(f"{size:,}" for size in sizes)


def time_totals(run: RunFiles) -> dict[str, float]:
    """Seconds of each part of a run, the longest first, over all of its starts where goodput.json
    says, else as its rows of metrics.jsonl have it."""
    if "life" not in run.goodput:
        return run.logged.seconds()
    found = training.fold(run.goodput, run.goodput["life"]["step"], 0.0)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def goodput(run: RunFiles) -> dict[str, Any]:
    """Where the time went: dict(share of the steps, whole, parts, starts); {} where nothing says
    it."""
    totals, starts = time_totals(run), run.goodput["starts"] if "life" in run.goodput else 0
    whole = sum(totals.values())
    if not whole:
        return {}
    parts = [
        dict(
            colour=number,  # the style has one for each part
            width=f"{100 * seconds / whole:.2f}",
            label=f"{TIMES.get(name, name)} {report_data.duration(seconds)} ({seconds / whole:.1%})",
        )
        for number, (name, seconds) in enumerate(totals.items())
        if seconds > 0
    ]
    share = f"{totals.get('step', 0.0) / whole:.1%}"
    return dict(share=share, whole=report_data.duration(whole), parts=parts, starts=starts)


def model_card(run: RunFiles) -> list[tuple[str, str]]:
    """(what, value) of the model and how it was trained, from config.json."""
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
        "Began from": config.get("init_from") or ("fresh weights" if sources else ""),
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
        "Steps": f"{run.last_step:,} of batch {batch(config)}",
        "Precision": model.get("dtype", ""),
        "Seed": str(config.get("seed", "")),
    }
    return [(name, str(value)) for name, value in found.items() if value]


def _head(config: dict[str, Any]) -> str:
    kind, classes = config.get("head", {}).get("kind", ""), config.get("class_names", ())
    return f"{kind}, {len(classes):,} classes" if kind else ""


def differences(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """dict(key, values) of the config keys whose values differ between runs."""
    flat = [flatten(run.config) for run in runs]
    found = []
    for key in sorted(set().union(*flat)):
        values = [json.dumps(one[key]) if key in one else "" for one in flat]
        if len(set(values)) > 1:
            found.append(dict(key=key, values=values))
    return found
