"""The page: what a run left behind, put into the templates of this folder."""

from __future__ import annotations

import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from etils import epath

from coca_jax import image_shape
from coca_jax.config.section import flatten
from coca_jax.files import storage
from coca_jax.report import charts, examples, numbers, run_files, scores, verdict
from coca_jax.report.run_files import RunFiles
from coca_jax.training import goodput as training

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
    run = run_files.read(workdir)
    tasks = scores.tasks_of(run.scores)
    path = storage.place(out) if out else run.folder / "report.html"
    context: dict[str, Any] = dict(
        title=run.name,
        summary=summary(run),
        verdict=verdict.of_run(run),
        headlines=scores.headlines(run.scores, tasks),
        tables=scores.tables(run.scores, tasks, run),
        evaluations=[*charts.evaluations([run]), *charts.blended(run.blend.get("curve", []))],
        training=charts.training([run]),
        goodput=goodput(run),
        examples=examples.sections(run.examples, layouts()),
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
    runs = run_files.read_several(workdirs)
    context: dict[str, Any] = dict(
        title=" \u00b7 ".join(run.name for run in runs),
        runs=[
            dict(
                name=run.name,
                summary=summary(run),
                goodput=goodput(run),
                line=charts.line_of(place),
            )
            for place, run in enumerate(runs)
        ],
        tables=scores.side_by_side(runs),
        evaluations=charts.evaluations(runs),
        training=charts.training(runs),
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
    made.filters["duration"] = numbers.duration
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
        size, patch = (image_shape.words(model.get(k, "?")) for k in ("image_size", "patch_size"))
        parts.append(f"{size} px, patch {patch}")
    seconds = sum(spent for part, spent in time_totals(run).items() if part != "down")
    if seconds:
        parts.append(numbers.duration(seconds))
    if isinstance(last.get("loss"), float):
        parts.append(f"final loss {numbers.number(last['loss'])}")
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
            label=f"{TIMES.get(name, name)} {numbers.duration(seconds)} ({seconds / whole:.1%})",
        )
        for number, (name, seconds) in enumerate(totals.items())
        if seconds > 0
    ]
    share = f"{totals.get('step', 0.0) / whole:.1%}"
    return dict(share=share, whole=numbers.duration(whole), parts=parts, starts=starts)


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
        "Model": f"CoCa, {image_shape.words(model.get('image_size'))} px, "
        f"patch {image_shape.words(model.get('patch_size'))}",
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
