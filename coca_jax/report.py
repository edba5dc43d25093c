"""Writes one page, report.html, of a run and its evaluations into its workdir.

The page is a single file without links to anything: charts are inline SVG, pictures base64 PNG.
It reads what the run left behind: config.json, metrics.jsonl, eval.json, eval_examples.json; a part
whose file is missing is left out. `train` writes it at its end; this command writes it anew, after
an evaluation for instance.

Examples:
  coca-jax report --workdir=runs/mine
"""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath

from coca_jax import cli, storage
from coca_jax.metrics import read_metrics

Row = Mapping[str, Any]

_CHARTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (  # title, unit, keys of metrics.jsonl
    ("Loss", "nats", ("loss", "contrastive_loss", "captioning_loss", "head_loss")),
    ("Accuracy of the task head in training", "", ("head_accuracy",)),
    (
        "Loss by kind of text",
        "nats",
        (
            *("contrastive_loss/caption", "contrastive_loss/label"),
            *("captioning_loss/caption", "captioning_loss/label"),
        ),
    ),
    ("Learning rate", "", ("learning_rate",)),
    ("Throughput", "pairs/s", ("pairs_per_second",)),
    ("Gradient norm", "", ("grad_norm", "gradient_norm")),
    ("Temperature", "", ("temperature",)),
)
_EVALUATORS = {
    "zeroshot": "Zero-shot classification",
    "generative": "Classification by caption likelihood",
    "retrieval": "Retrieval",
    "captioning": "Captioning",
    "classification": "Classification by the task head",
    "answers": "Written answers",
    "linear_probe": "Linear probe",
    "knn": "Nearest neighbours",
}
_HEADLINES = (
    *("top1", "image_to_text_r1", "text_to_image_r1", "exact_match", "attribute_f1", "cider_d"),
)
_CAPTION_METRICS = {
    "bleu4": "BLEU-4",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "cider_d": "CIDEr-D",
    "spice": "SPICE",
}
_SUFFIXES = ("_low", "_high", "_count")
_COUNTS = ("num_examples", "num_images", "num_texts", "num_classes")
_POINTS = 300  # of a curve; more would only weigh


def write_report(workdir: str | os.PathLike[str]) -> epath.Path:
    """Writes `workdir`/report.html and returns its path.

    Raises FileNotFoundError when there is no such folder, ValueError when it holds neither metrics
    nor evaluations.
    """
    folder = storage.place(workdir)
    if not folder.is_dir():
        raise FileNotFoundError(f"workdir {str(folder)!r} is not a folder; give that of a run")
    rows = read_metrics(folder)
    scores = _read_json(folder / "eval.json")
    examples = _read_json(folder / "eval_examples.json")
    if not rows and not scores:
        raise ValueError(f"workdir {str(folder)!r} holds no metrics.jsonl or eval.json: run train")
    config = _read_json(folder / "config.json")
    body = [
        f"<header><h1>{_text(folder.name)}</h1>{_summary(config, rows, scores)}</header>",
        _headlines(scores),
        _section("Training", _charts(rows) + _time_bar(rows)),
        _section("Scores", _score_tables(scores)),
        *(_example_section(name, found) for name, found in examples.items()),
        _section("Configuration", _configuration(config)),
    ]
    page = _PAGE.format(title=_text(folder.name), style=_STYLE, script=_SCRIPT)
    path = folder / "report.html"
    storage.write_text(path, page.replace("<!--body-->", "\n".join(body)))
    return path


def _read_json(path: epath.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _text(value: Any) -> str:
    return html.escape(str(value))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>" if content else ""


def _number(value: float) -> str:
    """Returns about four significant digits, without exponents where a person needs none."""
    size = abs(value)
    if value == round(value) and size < 1e15:
        return f"{value:,.0f}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 0.001:
        return f"{value:.4g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def _score(metric: str, value: float) -> str:
    """Returns a share as per cent; perplexities, ranks and counts as they are.

    Caption metrics are given times 100, as papers give them.
    """
    if metric in _CAPTION_METRICS:
        return f"{100 * value:.1f}"
    plain = "perplexity" in metric or "rank" in metric or not 0 <= value <= 1
    return _number(value) if plain else f"{100 * value:.1f}%"


# ---- Head of the page


def _summary(config: Row, rows: Sequence[Row], scores: Row) -> str:
    parts = []
    if rows:
        parts.append(f"{rows[-1]['step']:,} steps")
    elif scores.get("step"):
        parts.append(f"{scores['step']:,.0f} steps")
    if config.get("batch_size"):
        parts.append(f"batch {config['batch_size']:,}")
    model = config.get("model", {})
    if model.get("image_size"):
        parts.append(f"{model['image_size']} px, patch {model.get('patch_size', '?')}")
    seconds = sum(_time_totals(rows).values())
    if seconds:
        parts.append(_duration(seconds))
    if rows and isinstance(rows[-1].get("loss"), float):
        parts.append(f"final loss {_number(rows[-1]['loss'])}")
    return f"<p>{_text(' · '.join(parts))}</p>"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _headlines(scores: Row) -> str:
    tiles = []
    for name, value in scores.items():
        evaluator, data, metric = _split_name(name)
        if metric not in _HEADLINES or value is None:
            continue
        interval = _interval(scores, name, metric)
        note = f"<small>{interval}</small>" if interval else ""
        tiles.append(
            f"<div class=tile><span>{_text(_metric_title(metric))}</span>"
            f"<b>{_score(metric, value)}</b>{note}"
            f"<small>{_text(f'{evaluator} · {data}')}</small></div>"
        )
    return f"<div class=tiles>{''.join(tiles)}</div>" if tiles else ""


def _split_name(name: str) -> tuple[str, str, str]:
    parts = name.split("/")
    return (parts[0], "/".join(parts[1:-1]), parts[-1]) if len(parts) >= 3 else ("", "", name)


def _metric_title(metric: str) -> str:
    if metric in _CAPTION_METRICS:
        return _CAPTION_METRICS[metric]
    words = metric.replace("_", " ")
    for k in ("1", "5", "10"):
        words = words.replace(f" r{k}", f" R@{k}") if words.endswith(f" r{k}") else words
    words = words.replace("top1", "top-1").replace("top5", "top-5").replace("f1", "F1")
    return words[0].upper() + words[1:]


def _interval(scores: Row, name: str, metric: str) -> str:
    low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
    if low is None or high is None:
        return ""
    return f"{_score(metric, low).rstrip('%')}&thinsp;–&thinsp;{_score(metric, high)}"


# ---- Scores


def _score_tables(scores: Row) -> str:
    groups: dict[tuple[str, str], list[str]] = {}
    for name in scores:
        evaluator, data, metric = _split_name(name)
        if evaluator and not (metric.endswith(_SUFFIXES) and _is_companion(name, scores)):
            groups.setdefault((evaluator, data), []).append(name)
    tables = []
    for (evaluator, data), names in sorted(groups.items()):
        sizes = [
            f"{scores[n]:,.0f} {m.removeprefix('num_')}"
            for n in names
            if (m := _split_name(n)[2]) in _COUNTS and scores[n] is not None
        ]
        lines = []
        for name in sorted(names, key=_metric_order):
            metric, value = _split_name(name)[2], scores[name]
            if metric in _COUNTS:
                continue
            count = scores.get(f"{name}_count")
            lines.append(
                f"<tr><td>{_text(_metric_title(metric))}</td>"
                f"<td class=n>{'not finite' if value is None else _score(metric, value)}</td>"
                f"<td class=n>{_interval(scores, name, metric)}</td>"
                f"<td class=n>{'' if count is None else f'{count:,.0f}'}</td></tr>"
            )
        title = f"{_EVALUATORS.get(evaluator, evaluator)} <small>{_text(data)}</small>"
        tables.append(
            f"<div class=card><h3>{title}</h3><table><thead><tr><th>Metric<th class=n>Value"
            f"<th class=n>95% interval<th class=n>Examples</tr></thead>"
            f"<tbody>{''.join(lines)}</tbody></table>"
            f"<p class=note>{_text(', '.join(sizes))}</p></div>"
        )
    return f"<div class=grid>{''.join(tables)}</div>" if tables else ""


def _metric_order(name: str) -> tuple[str, int, str]:
    """Sorts R@1, R@5, R@10 by number, not by letter."""
    metric = _split_name(name)[2]
    head = metric.rstrip("0123456789")
    return head, int(metric[len(head) :] or 0), metric


def _is_companion(name: str, scores: Row) -> bool:
    return any(name.removesuffix(s) in scores for s in _SUFFIXES if name.endswith(s))


# ---- Charts


def _charts(rows: Sequence[Row]) -> str:
    during = sorted(
        {k for row in rows for k in row if k.split("/")[0] in _EVALUATORS}
        - {k for row in rows for k in row if k.endswith(_SUFFIXES)}
    )
    headline = tuple(k for k in during if k.split("/")[-1] in _HEADLINES)
    charts = []
    for title, unit, keys in (*_CHARTS, ("Scores during training", "", headline)):
        curves = {}
        for key in keys:
            points = [(r["step"], r[key]) for r in rows if isinstance(r.get(key), float | int)]
            if len(points) > 1:
                curves[key] = _thin(points)
        if curves:
            charts.append(_chart(title, unit, curves))
    return f"<div class=grid>{''.join(charts)}</div>" if charts else ""


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns at most _POINTS points, means over neighbours."""
    size = math.ceil(len(points) / _POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups]


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= min((1, 2, 5, 10), key=lambda m: abs((high - low) / (m * step) - count))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _chart(title: str, unit: str, curves: Mapping[str, list[tuple[float, float]]]) -> str:
    width, height, left, right, top, bottom = 560, 260, 56, 24, 10, 30
    xs = [x for points in curves.values() for x, _ in points]
    ys = sorted(y for points in curves.values() for _, y in points)
    x0, x1 = min(xs), max(xs)
    # The first steps can be far off the rest: then the axis ends at the 99th percentile.
    y1 = ys[-1] if ys[-1] < 20 * ys[len(ys) // 2] else ys[int(0.99 * (len(ys) - 1))]
    y0 = 0.0 if ys[0] >= 0 and ys[0] < 0.5 * y1 else ys[0]
    if y1 - y0 < 1e-9 * max(1.0, abs(y1)):
        y0, y1 = y0 - 0.5 * abs(y0 or 1), y1 + 0.5 * abs(y1 or 1)
    y1 += 0.04 * (y1 - y0)

    def px(x: float) -> float:
        return left + (x - x0) / max(x1 - x0, 1e-12) * (width - left - right)

    def py(y: float) -> float:
        return top + (1 - (min(y, y1) - y0) / (y1 - y0)) * (height - top - bottom)

    parts = []
    for y in _ticks(y0, y1):
        parts.append(f"<line class=g x1={left} x2={width - right} y1={py(y):.1f} y2={py(y):.1f} />")
        parts.append(f"<text x={left - 8} y={py(y) + 4:.1f} text-anchor=end>{_number(y)}</text>")
    for x in _ticks(x0, x1) if x1 > x0 else [x0]:
        parts.append(f"<text x={px(x):.1f} y={height - 10} text-anchor=middle>{_number(x)}</text>")
    legend, data = [], []
    for i, (name, points) in enumerate(curves.items()):
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="c s{i % 6}" points="{path}" />')
        shown = name.replace("_", " ").replace("/", " · ")
        legend.append(f'<span><i class="k s{i % 6}"></i>{_text(shown)} <b></b></span>')
        data.append([[round(px(x), 1), x, float(f"{y:.5g}")] for x, y in points])
    suffix = f" <small>{_text(unit)}</small>" if unit else ""
    return (
        f"<figure class='card chart' data-points='{json.dumps(data, separators=(',', ':'))}'>"
        f"<figcaption>{_text(title)}{suffix}<em></em></figcaption>"
        f"<svg viewBox='0 0 {width} {height}' role=img aria-label='{_text(title)} by step'>"
        f"{''.join(parts)}<line class=cursor y1={top} y2={height - bottom} x1=-9 x2=-9 /></svg>"
        f"<div class=legend>{''.join(legend)}</div></figure>"
    )


def _time_totals(rows: Sequence[Row]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            if key.endswith("_seconds") and isinstance(value, float | int):
                name = key.removesuffix("_seconds").replace("_", " ")
                totals[name] = totals.get(name, 0.0) + value
    return {name: s for name, s in totals.items() if s > 0}


def _time_bar(rows: Sequence[Row]) -> str:
    totals = _time_totals(rows)
    whole = sum(totals.values())
    if not whole:
        return ""
    bars, legend = [], []
    for i, (name, seconds) in enumerate(sorted(totals.items(), key=lambda item: -item[1])):
        share = seconds / whole
        label = f"{name} {_duration(seconds)} ({share:.1%})"
        bars.append(
            f'<i class="s{i % 6}" style="width:{100 * share:.2f}%" title="{_text(label)}"></i>'
        )
        legend.append(f'<span><i class="k s{i % 6}"></i>{_text(label)}</span>')
    return (
        "<div class=card><h3>Where the time went</h3>"
        f"<div class=bar>{''.join(bars)}</div><div class=legend>{''.join(legend)}</div></div>"
    )


# ---- Examples


def _example_section(name: str, found: Row) -> str:
    makers: dict[str, Callable[[Row], str]] = dict(
        zeroshot=_zeroshot_examples, retrieval=_retrieval_examples, captioning=_caption_examples
    )
    evaluator, _, data = name.partition("/")
    maker = makers.get(found.get("kind", ""))
    title = f"{_EVALUATORS.get(evaluator, evaluator)}: {data}"
    return _section(title, maker(found)) if maker else ""


def _picture(item: Row) -> str:
    return f'<img alt="" src="data:image/png;base64,{_text(item["image"])}">'


def _mark(right: bool) -> str:
    return "<b class=yes>✓</b>" if right else "<b class=no>✗</b>"


def _cards(cards: Iterable[str]) -> str:
    return f"<div class=pictures>{''.join(cards)}</div>"


def _zeroshot_examples(found: Row) -> str:
    cards = []
    for item in found["items"]:
        lines = "".join(
            f"<li>{_mark(name in item['truth'])} {_text(name)} <small>{score:.2f}</small></li>"
            for name, score in item["guesses"]
        )
        truth = _text(", ".join(item["truth"]))
        cards.append(f"<div class=pic>{_picture(item)}<p>{truth}</p><ul>{lines}</ul></div>")
    parts = [_cards(cards)]
    tables = []
    worst = sorted(found["per_class"].items(), key=lambda item: item[1]["accuracy"])[:12]
    if worst:
        lines = "".join(
            f"<tr><td>{_text(name)}<td class=n>{c['accuracy']:.1%}<td class=n>{c['count']:,}</tr>"
            for name, c in worst
        )
        tables.append(
            f"<div class=card><h3>Hardest classes</h3><table><thead><tr><th>Class"
            f"<th class=n>Accuracy<th class=n>Examples</tr></thead>"
            f"<tbody>{lines}</tbody></table></div>"
        )
    rest = sorted(found["per_class"].items()) if len(found["per_class"]) > len(worst) else []
    if found["confused"]:
        lines = "".join(
            f"<tr><td>{_text(c['truth'])}<td>{_text(c['guess'])}<td class=n>{c['count']:,}</tr>"
            for c in found["confused"][:12]
        )
        tables.append(
            f"<div class=card><h3>Most confused</h3><table><thead><tr><th>Truth<th>Guess"
            f"<th class=n>Times</tr></thead><tbody>{lines}</tbody></table></div>"
        )
    parts.append(f"<div class=grid>{''.join(tables)}</div>")
    if found.get("confusion"):
        parts.append(_confusion(found["confusion"]))
    if rest:
        lines = "".join(
            f"<tr><td>{_text(name)}<td class=n>{c['accuracy']:.1%}<td class=n>{c['count']:,}</tr>"
            for name, c in rest
        )
        parts.append(
            f"<details class=card><summary>All {len(rest):,} classes</summary><table><thead><tr>"
            f"<th>Class<th class=n>Accuracy<th class=n>Examples</tr></thead><tbody>{lines}</tbody>"
            "</table></details>"
        )
    return "".join(parts)


def _confusion(confusion: Row) -> str:
    rows, columns, counts = confusion["rows"], confusion["columns"], confusion["counts"]
    cell, left, top = 18, 8 + 7 * max(map(len, rows)), 8 + 6 * max(map(len, columns))
    parts = []
    for j, name in enumerate(columns):
        x = left + cell * j + cell / 2 + 4
        parts.append(f"<text transform='translate({x},{top - 6}) rotate(-60)'>{_text(name)}</text>")
    for i, name in enumerate(rows):
        y = top + cell * i
        parts.append(f"<text x={left - 6} y={y + 13} text-anchor=end>{_text(name)}</text>")
        total = max(sum(counts[i]), 1)
        for j, guess in enumerate(columns):
            share = counts[i][j] / total
            kind = "hit" if name == guess else "miss"
            label = f"{name} taken for {guess}: {counts[i][j]} of {total}"
            parts.append(
                f"<rect class=cell x={left + cell * j} y={y} width={cell - 1} height={cell - 1} />"
            )
            if share:
                parts.append(
                    f"<rect class={kind} x={left + cell * j} y={y} width={cell - 1} "
                    f"height={cell - 1} opacity={0.15 + 0.85 * share:.2f}>"
                    f"<title>{_text(label)}</title></rect>"
                )
    width, height = left + cell * len(columns) + 4 * top // 5, top + cell * len(rows) + 4
    return (
        "<div class='card wide'><h3>Confusion <small>a row is a true class, a column the guess"
        f"</small></h3><svg width={width} height={height} role=img "
        f"aria-label='confusion of classes'>{''.join(parts)}</svg></div>"
    )


def _retrieval_examples(found: Row) -> str:
    cards = []
    for item in found["items"]:
        lines = "".join(
            f"<li>{_mark(t['correct'])} {_text(t['text'])} <small>{t['score']:.2f}</small></li>"
            for t in item["texts"][:4]
        )
        cards.append(f"<div class='pic beside'>{_picture(item)}<ul>{lines}</ul></div>")
    queries = []
    for item in found["text_items"]:
        pictures = "".join(
            f"<span class={'right' if i['correct'] else 'wrong'} title='{i['score']:.2f}'>"
            f"{_picture(i)}</span>"
            for i in item["images"]
        )
        queries.append(f"<div class=query><p>{_text(item['text'])}</p><div>{pictures}</div></div>")
    return (
        f"<h3>Texts found for an image</h3><div class=rows>{''.join(cards)}</div>"
        f"<h3>Images found for a text <small>best first, framed where right; among "
        f"{_text(found['searched'])}</small></h3><div class=rows>{''.join(queries)}</div>"
    )


def _caption_examples(found: Row) -> str:
    cards = []
    for item in found["items"]:
        references = "".join(
            f"<li><small>{_text(text)}</small></li>" for text in item["references"]
        )
        cards.append(
            f"<div class=pic>{_picture(item)}<p>{_mark(item['exact'])} {_text(item['caption'])}</p>"
            f"<ul>{references}</ul></div>"
        )
    notes = ["Above: the model's caption. Below it: the references.", *found.get("notes", ())]
    return "".join(f"<p class=note>{_text(note)}</p>" for note in notes) + _cards(cards)


def _configuration(config: Row) -> str:
    if not config:
        return ""
    return (
        "<details class=card><summary>config.json</summary>"
        f"<pre>{_text(json.dumps(config, indent=2))}</pre></details>"
    )


_PAGE = """<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width">
<meta name=color-scheme content="light dark"><title>{title} · coca_jax</title>
<style>{style}</style></head><body><!--body--><script>{script}</script></body></html>
"""

_STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1b2330;--soft:#5c6675;--line:#e3e7ec;
--s0:#2563c9;--s1:#d2660a;--s2:#0b8160;--s3:#8a46c7;--s4:#b3325e;--s5:#5b6b7d;--yes:#0b8160;
--no:#c2303f}
@media(prefers-color-scheme:dark){:root{--bg:#11151b;--card:#1a2029;--ink:#e6eaf0;--soft:#9aa5b4;
--line:#2b3440;--s0:#6aa5ff;--s1:#f79a4b;--s2:#3fc79a;--s3:#c08cf5;--s4:#f07ba3;--s5:#9fb0c3;
--yes:#3fc79a;--no:#ff7a85}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1200px;padding:28px 20px 60px;background:var(--bg);color:var(--ink);
font:14px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:26px;margin:0}h2{font-size:19px;margin:34px 0 12px}h3{font-size:15px;margin:0 0 8px}
section>h3{margin:18px 0 8px}header p,.note,small{color:var(--soft)}header p{margin:4px 0 18px}
small{font-size:12px;font-weight:400}.note{font-size:12px;margin:8px 0 0}
.card,.pic,.tile,.query{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:14px 16px}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:14px;
margin-bottom:14px;align-items:start}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:14px}
.tile{display:flex;flex-direction:column}.tile b{font-size:28px;line-height:1.25}
.tile span{font-weight:600}
figure{margin:0}figcaption{font-weight:600;font-size:15px;display:flex;gap:8px;align-items:baseline}
figcaption em{margin-left:auto;font:12px system-ui,sans-serif;color:var(--soft)}
svg{display:block;max-width:none}.chart svg{width:100%;height:auto}
svg text{font-size:11px;fill:var(--soft)}svg .g{stroke:var(--line)}
.c{fill:none;stroke-width:1.8;stroke-linejoin:round}.cursor{stroke:var(--soft);stroke-dasharray:3 3}
.cell{fill:var(--line);opacity:.45}.hit{fill:var(--s0)}.miss{fill:var(--s1)}
.wide{overflow-x:auto;margin-top:14px}
polyline.s0{stroke:var(--s0)}polyline.s1{stroke:var(--s1)}polyline.s2{stroke:var(--s2)}
polyline.s3{stroke:var(--s3)}polyline.s4{stroke:var(--s4)}polyline.s5{stroke:var(--s5)}
i.s0{background:var(--s0)}i.s1{background:var(--s1)}i.s2{background:var(--s2)}
i.s3{background:var(--s3)}i.s4{background:var(--s4)}i.s5{background:var(--s5)}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:12px;color:var(--soft);margin-top:6px}
.legend b{color:var(--ink);font-variant-numeric:tabular-nums}
.k{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px}
.bar{display:flex;height:18px;border-radius:6px;overflow:hidden;gap:1px}.bar i{min-width:1px}
table{border-collapse:collapse;width:100%}th{text-align:left;font-size:12px;color:var(--soft)}
th,td{padding:4px 8px 4px 0;border-bottom:1px solid var(--line)}tbody tr:last-child td{border:0}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(170px,1fr));gap:14px;
margin:10px 0 14px}
.pic{padding:10px}.pic p{margin:8px 0 4px;font-weight:600;overflow-wrap:anywhere}
.pic ul{margin:0;padding:0;list-style:none}.pic li{overflow-wrap:anywhere}
img{width:128px;height:128px;object-fit:contain;border-radius:6px;background:#fff;
image-rendering:auto;display:block}
.pic>img{width:100%;height:auto;aspect-ratio:1}
.rows{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:14px}
.beside{display:flex;gap:14px}.beside>img{width:104px;height:104px;flex:none}
.query p{margin:0 0 8px;font-weight:600}.query div{display:flex;gap:8px;flex-wrap:wrap}
.query img{width:78px;height:78px}.query span{border:3px solid transparent;border-radius:9px}
.query .right{border-color:var(--yes)}.query .wrong{opacity:.75}
.yes{color:var(--yes)}.no{color:var(--no)}
details pre{overflow:auto;max-height:480px;font-size:12px}summary{cursor:pointer;font-weight:600}
"""

_SCRIPT = """
for (const figure of document.querySelectorAll('.chart')) {
  const curves = JSON.parse(figure.dataset.points), svg = figure.querySelector('svg');
  const cursor = svg.querySelector('.cursor'), step = figure.querySelector('em');
  const values = figure.querySelectorAll('.legend b');
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    curves.forEach((points, i) => {
      const near = points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
      values[i].textContent = near[2];
      if (i === 0) {
        cursor.setAttribute('x1', near[0]); cursor.setAttribute('x2', near[0]);
        step.textContent = 'step ' + near[1].toLocaleString();
      }
    });
  });
  svg.addEventListener('pointerleave', () => {
    cursor.setAttribute('x1', -9); cursor.setAttribute('x2', -9);
    step.textContent = ''; values.forEach(v => v.textContent = '');
  });
}
"""


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    flags.DEFINE_string("workdir", None, "The run to report on; report.html goes there.")


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Command-line entry."""
    workdir = flags.FLAGS.workdir
    if len(argv) > 1 or not workdir:
        raise ValueError("give --workdir=DIR, the folder of a run, and nothing else")
    path = write_report(workdir)
    print(f"wrote {path} ({path.stat().length / 1024:,.0f} KiB)")
    return {"report": str(path)}


if __name__ == "__main__":
    cli.command("report")
