"""The report: self-contained, complete, escaped, and possible from any subset of its files."""

import base64
import html
import html.parser
import io
import json
import math
import re
import shutil
import types

import numpy as np
import pytest
from PIL import Image

from coca_jax.cli import report
from coca_jax.data import scenes, synthetic_source
from coca_jax.evaluation import history, report_charts, report_data
from coca_jax.evaluation.evaluators import caption_match, captioning, results, retrieval, zero_shot
from coca_jax.runtime import metric_log


class Reader(html.parser.HTMLParser):
    """Collects addresses and the text that a person sees."""

    def __init__(self, page):
        super().__init__()
        self.addresses, self.seen, self.hidden = [], [], 0
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href", "data", "action")]
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag):
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data):
        if not self.hidden:
            self.seen.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.seen).split())


class Model:
    """Knows 64-pixel scenes by heart, with some noise: colour+shape embeddings, captions."""

    def __init__(self, records):
        self.records = {r["image"].tobytes(): r["scene"] for r in records}
        rng = np.random.default_rng(0)
        words = [*scenes.COLOURS, *scenes.SHAPES, *scenes.SIZES, *scenes.TEXTURES]
        words += ["top", "bottom", "left", "right", "centre", *scenes.BACKGROUNDS]
        self.words = {w: rng.normal(size=32) for w in words}
        self.rng = rng

    def encode_text(self, texts, *, labels=False):
        rows = [sum(self.words.get(w, np.zeros(32)) for w in t.split()) + 1e-3 for t in texts]
        return zero_shot.normalise(np.stack(rows)).astype(np.float32)

    tokenize_with_mask = staticmethod(lambda texts, labels: [np.eye(len(texts))] * 2)

    def encode_image(self, images):
        found = [self.records[i.tobytes()] for i in images]
        texts = self.encode_text([scenes.full_caption(s) for s in found])
        return zero_shot.normalise(texts + 0.08 * self.rng.normal(size=texts.shape))

    def caption(self, images, **how):
        texts = [scenes.canonical_caption(self.records[i.tobytes()]) for i in images]
        return [t.replace("small", "large") if i % 5 == 4 else t for i, t in enumerate(texts)]

    max_len = 64

    def caption_log_likelihood(self, images, texts):
        return np.full(len(texts), -4.0), np.full(len(texts), 12)


def make_run(folder):
    """Fills a workdir as training and evaluation do, without a model."""
    writer = metric_log.MetricWriter(folder)
    for step in range(10, 4001, 10):
        c, g = 5 * math.exp(-step / 900) + 0.3, 4.6 * math.exp(-step / 600) + 0.5
        values = {"loss": 2 * g + c, "contrastive_loss": c, "captioning_loss": g}
        values |= {"contrastive_loss/label": c * 1.1, "captioning_loss/caption": g * 0.9}
        values |= {"learning_rate": 1e-3 * min(step / 200, 1 - step / 4400)}
        values |= {"pairs_per_second": 900 + step % 70, "temperature": 0.07 - step * 1e-5}
        writer.write(step, values | {"step_seconds": 0.9, "data_wait_seconds": 0.02})
    writer.close()
    one = synthetic_source.Scenes("heldout", objects=(1,)).read(np.arange(120))
    for record in one:
        o = record["scene"]["objects"][0]
        record["labels"] = [f"{o['colour']} {o['shape']}"]
    many = synthetic_source.Scenes("heldout").read(np.arange(200))
    for evaluator, records in (
        (zero_shot.ZeroShot("scenes_heldout", scenes.class_names()), one),
        (retrieval.Retrieval("scenes_heldout"), many),
        (captioning.Captioning("scenes_heldout", scorer=caption_match.score_scene), one),
    ):
        results.save_results(folder, dict(evaluator.run(Model(records), records)))
        results.save_examples(folder, evaluator.name, evaluator.examples)
    config = dict(batch_size=128, model=dict(image_size=64, patch_size=8))
    (folder / "config.json").write_text(json.dumps(config))


def charts(page):
    """What the page's script draws."""
    return [json.loads(html.unescape(x)) for x in re.findall('data-chart="([^"]*)"', page)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("my_run")
    make_run(folder)
    return folder


def test_report_is_one_file_and_shows_every_score(run):
    path = report.write_report(run)
    assert path == run / "report.html"
    page = path.read_text()
    reader = Reader(page)
    assert reader.addresses and all(a.startswith(("data:image/", "#")) for a in reader.addresses)
    script = page.index("<script>")
    assert "http" not in re.sub(r"base64,[^\"]*", "", page[:script]) and "url(" not in page
    scores = json.loads((run / "eval.json").read_text())
    top1 = scores["zero_shot/scenes_heldout/top1"]
    assert f"{100 * top1:.1f}%" in reader.text
    assert "4,000 steps · batch 128 · 64 px, patch 8" in reader.text
    for title in ("Loss", "Throughput", "Time breakdown", "Zero-shot classification"):
        assert title in reader.text
    assert "Image to text R@1" in reader.text and "Perplexity" in reader.text
    bleu = scores["captioning/scenes_heldout/bleu4"]
    assert f"BLEU-4 {100 * bleu:.1f} " in reader.text and "CIDEr-D" in reader.text
    assert page.count("<img") > 60
    curves = [curve for chart in charts(page) for curve in chart["curves"]]
    assert len(curves) == 8 and all(len(curve["x"]) == len(curve["y"]) <= 900 for curve in curves)


def test_what_is_long_can_be_folded_and_is_on_a_phone(run):
    page = report.write_report(run).read_text()
    folds = page.count('<details class="card fold" open><summary><h3>')
    assert folds >= page.count('<section id="scores">') + page.count('<section id="card">') == 2
    assert folds == page.count('class="card fold"')  # none begins closed where there is room
    script = page[page.index("matchMedia('(max-width: 600px)')") :]
    assert "'.fold'" in script[:150] and "fold.open = false" in script[:150]


def test_text_from_data_is_escaped(tmp_path):
    attack = "<script>alert(1)</script>'\""
    item = dict(image="AAAA", caption=attack, references=[attack], exact=False, f1=0.0)
    results.save_examples(tmp_path, f"captioning/{attack}", dict(kind="captioning", items=[item]))
    results.save_results(tmp_path, {f"captioning/{attack}/exact_match": 0.5})
    page = report.write_report(tmp_path).read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page


def test_words_of_captions_carry_their_maps(tmp_path):
    words = [dict(text="<a>", probability=0.25, map="/4AA/w==")]
    item = dict(image="AAAA", caption="<a>", references=["a"], exact=False, f1=0.0)
    items = [item | dict(words=words, fit="crop"), item]  # of an evaluation without words too
    results.save_examples(tmp_path, "captioning/x", dict(kind="captioning", items=items))
    results.save_results(tmp_path, {"captioning/x/exact_match": 0.5})
    page = report.write_report(tmp_path).read_text()
    (button,) = re.findall(r'<button class="word".*?</button>', page)
    assert 'data-map="/4AA/w=="' in button and 'title="25.0%"' in button
    assert button.endswith(">&lt;a&gt;</button>") and page.count('data-fit="crop"') == 1


def test_parts_without_a_file_are_left_out(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        report.write_report(tmp_path / "none")
    with pytest.raises(ValueError, match="no metrics.jsonl or eval.json"):
        report.write_report(tmp_path)
    writer = metric_log.MetricWriter(tmp_path)
    writer.write(1, {"loss": float("nan")})
    writer.write(2, {"loss": 3.0})
    writer.close()
    page = report.write_report(tmp_path).read_text()
    assert "2 steps" in page and "<h2>Scores" not in page and not charts(page)
    writer = metric_log.MetricWriter(tmp_path, start_step=2)
    writer.write(3, {"loss": 3.0})  # a flat curve
    writer.close()
    (chart,) = charts(report.write_report(tmp_path).read_text())
    assert chart["curves"][0]["y"] == [3, 3]


def test_command_prints_one_json_line_and_explains_bad_input(run, commands, tmp_path):
    run = shutil.copytree(run, tmp_path / "\u0635\u0648\u0631\u0629")
    done = commands.run(["report", f"--workdir={run}"], tmp_path)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert json.loads(last) == {"report": str(run / "report.html")} and run.name in last
    bad = commands.run(["report", f"--workdir={tmp_path}"], tmp_path)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "Run train" in bad.stderr


def test_tasks_have_a_headline_each_and_the_worst_examples_come_first(run):
    page = report.write_report(run).read_text()
    assert page.count('<div class="tile">') == 3  # one a task, not one a metric
    text = Reader(page).text
    # The verdict comes first; images come before the charts of training.
    assert text.index("The model is ") < text.index("Zero-shot classification")
    assert page.index("<img") < page.index('<section id="training">')
    assert text.index("Attribute F1") < text.index("CIDEr-D")
    zero_shot_at, retrieval_at = text.index("Zero-shot classification"), text.index("Retrieval")
    assert zero_shot_at < retrieval_at < text.index("Captioning")  # the order of the evaluators
    captions = page[page.index("Captioning: scenes_heldout") :]
    marks = re.findall(r'<b class="(yes|no)"', captions[: captions.index("</section>")])
    assert {"yes", "no"} == set(marks) and marks == sorted(marks)  # "no" before "yes"
    assert {"nats", "pairs/s"} <= {chart["unit"] for chart in charts(page)}
    links = re.findall(r'<a href="#([^"]*)"', page)
    assert links and all(f'id="{link}"' in page for link in links)


def test_the_history_of_evaluations_is_drawn(run, tmp_path):
    scores = json.loads((run / "eval.json").read_text())
    for step in (100, 200, 300):
        grown = {name: value * step / 300 for name, value in scores.items()}
        history.add(tmp_path, step, grown)
    results.save_results(tmp_path, scores)
    page = report.write_report(tmp_path).read_text()
    titles = re.findall("<figcaption>([^<]*)</figcaption>", page)
    found = dict(zip(titles, charts(page), strict=True))
    (curve,) = found["Zero-shot classification: Top-1"]["curves"]
    top1 = 100 * scores["zero_shot/scenes_heldout/top1"]
    assert curve["x"] == [100, 200, 300] and curve["dots"]
    np.testing.assert_allclose(curve["y"], [top1 / 3, top1 * 2 / 3, top1], 1e-4)
    assert "higher is better" in page and sum(len(one["curves"]) for one in charts(page)) == 6


def test_a_metric_of_one_s_own_that_is_no_share_is_drawn_as_it_is():
    """Beside values within 0 and 1 too; one whose values all are is drawn in per cent."""
    scores = [
        {"mine/d/loss_per_token": a, "other/d/found": b} for a, b in ((2.5, 0.5), (0.9, 0.75))
    ]
    rows = [dict(step=step, scores=one) for step, one in enumerate(scores, 1)]
    loss, found = report_charts.evaluations([types.SimpleNamespace(name="a", evaluations=rows)])
    (loss,), (found,) = charts(loss), charts(found)
    assert loss["curves"][0]["y"] == [2.5, 0.9] and "%" not in loss["unit"]
    assert found["curves"][0]["y"] == [50.0, 75.0] and "%" in found["unit"]


def test_an_interval_has_the_scale_of_its_score():
    """Also where it reaches below 0, or above 1."""
    for value, low, high, says in (
        (0.03, -0.01, 0.07, "-1.0\u2009\u2013\u20097.0%"),
        (0.98, 0.95, 1.01, "95.0\u2009\u2013\u2009101.0%"),
        (1.5, 0.5, 2.5, "0.5\u2009\u2013\u20092.5"),
    ):
        scores = {"mine/d/gain": value, "mine/d/gain_low": low, "mine/d/gain_high": high}
        shown = report_data.metric_of("mine", "gain", [value])
        assert report_data.interval(shown, scores, "mine/d/gain") == says


def test_pictures_stand_on_a_map_by_their_embeddings(run):
    found = json.loads((run / "eval_examples.json").read_text())
    scores = json.loads((run / "eval.json").read_text())
    page = report.write_report(run).read_text()
    section = page[page.index("Retrieval: scenes_heldout") :]
    section = section[: section.index("</section>")]
    drawn = found["retrieval/scenes_heldout"]["map"]
    assert section.count("<circle class=") - 2 == len(drawn["points"]) == 200  # 2: the legend's
    r1 = scores["retrieval/scenes_heldout/image_to_text_r1"]
    assert f"correct {round(200 * r1)}<" in section and sum(drawn["right"]) == round(200 * r1)
    width, height = map(int, re.findall(r'<svg viewBox="0 0 (\d+) (\d+)"', section)[0])
    places = re.findall(r'cx="(\d+)" cy="(\d+)" data-text="([^"]*)"', section)
    assert all(40 <= int(x) <= width - 40 and 40 <= int(y) <= height - 40 for x, y, _ in places)
    assert {text for *_, text in places} == set(drawn["texts"])
    top1 = found["zero_shot/scenes_heldout"]["map"]
    assert sum(top1["right"]) == round(120 * scores["zero_shot/scenes_heldout/top1"])


def test_a_map_shows_the_axes_of_most_variance():
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    plain = rng.normal(size=(50, 8)) * [8, 4, *[0.1] * 6]
    plain -= plain.mean(0)
    places, share = results.principal(plain @ turn)
    variance = plain.var(0)
    np.testing.assert_allclose(share, variance[:2] / variance.sum(), atol=1e-2)
    for axis in (0, 1):
        assert abs(np.corrcoef(places[:, axis], plain[:, axis])[0, 1]) > 0.95
    made = results.PictureMap(count=20)
    pictures = [np.full((9, 5, 3), 5 * i, np.uint8) for i in range(50)]
    made.add(pictures, plain @ turn, [str(i) for i in range(50)], [True] * 50)
    found = made.found()
    points = np.asarray(found["points"])
    assert len(points) == 20 and points[:, 0].min() == 0 and points[:, 0].max() == 1000
    kept = [int(text) for text in found["texts"]]
    wide = np.ptp(results.principal((plain @ turn)[kept])[0], axis=0)
    assert np.ptp(points[:, 1]) == pytest.approx(1000 * wide[1] / wide[0], abs=1)  # one scale
    sheet = Image.open(io.BytesIO(base64.b64decode(found["sheet"])))
    assert sheet.size == (16 * 40, 2 * 40)
    assert abs(sheet.getpixel((2 * 40 + 20, 20))[0] - 5 * kept[2]) <= 3
    same = results.PictureMap()
    same.add(pictures, np.ones((50, 8)) / 8**0.5, ["x"] * 50, [False] * 50)
    assert same.found() == {} == results.PictureMap(0).found()


def test_a_damaged_map_is_said_in_a_line(tmp_path):
    drawn = dict(points=[[0, 1], [2, 3]], texts=["a", "b"], right=[True, False], sheet="")
    drawn |= dict(columns=1, size=40, share=[0.5, 0.1])
    results.save_results(tmp_path, {"retrieval/x/mean_recall": 0.5})
    for wrong, said in ((dict(texts=["a"]), "map of 2 points, 1"), (dict(columns=0), "0 thumbn")):
        found = dict(kind="table", head=["a"], rows=[], map=drawn | wrong)
        results.save_examples(tmp_path, "retrieval/x", found)
        with pytest.raises(ValueError, match=f"damaged entry retrieval/x: ValueError: a .*{said}"):
            report.write_report(tmp_path)


def test_a_long_curve_is_thinned(tmp_path):
    writer = metric_log.MetricWriter(tmp_path)
    for step in range(1, 1801):
        writer.write(step, {"loss": float(step)})
    writer.close()
    (chart,) = charts(report.write_report(tmp_path).read_text())
    (curve,) = chart["curves"]
    assert len(curve["x"]) == 900 and (curve["x"][0], curve["y"][0]) == (2, 1.5)  # means of two


@pytest.mark.parametrize(
    "values, top",
    [
        ([0, 0, 50], None),  # recall that begins at none
        ([2, 2, 2, 50, 60], None),
        ([-5, -6, -7, -8], None),
        ([1000, *[2.5 - 0.01 * i for i in range(99)]], 2.46),  # a loss that begins far off
    ],
)
def test_an_axis_leaves_out_first_steps_that_are_far_off(values, top):
    curve = report_charts.Curve("", list(enumerate(map(float, values))), 0)
    assert report_charts.top([curve]) == pytest.approx(top)


def test_several_runs_are_laid_over_each_other(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "config.json").write_text(
        json.dumps(dict(batch_size=64, model=dict(image_size=64, patch_size=8)))
    )
    scores = json.loads((other / "eval.json").read_text())
    results.save_results(other, {"captioning/scenes_heldout/perplexity": 9.0})
    path = report.write_comparison([run, other], tmp_path / "both.html")
    page, text = path.read_text(), Reader(path.read_text()).text
    one = report.write_report(run).read_text()
    assert page.count("&#34;name&#34;") == 2 * one.count("&#34;name&#34;")
    assert "loss · my_run" in page.replace("my_run0", "my_run") and "loss · other" in page
    best = scores["captioning/scenes_heldout/perplexity"]
    assert f"<b>{best:.4g}</b>" in page and ">9 <small>" in page  # lower is better
    assert "batch_size 128 64" in text and "data:image" not in page
    for name in ("a/seed0", "b/seed0"):  # runs of several seeds
        shutil.copytree(run, tmp_path / name)
    page = report.write_comparison(
        [tmp_path / "a/seed0", tmp_path / "b/seed0"], tmp_path / "seeds.html"
    ).read_text()
    assert "loss · a/seed0" in page and "loss · b/seed0" in page
    copies = [shutil.copytree(run, tmp_path / f"copy{number}") for number in range(13)]
    page = report.write_comparison(copies, tmp_path / "many.html").read_text()
    losses = [one for one in charts(page)[0]["curves"] if one["name"].startswith("loss ")]
    lines = [(tuple(one["dash"]), one["width"]) for one in losses]
    assert len(lines) == 13 and len(set(lines[:12])) == 12 and lines[12] == lines[0]
    with pytest.raises(FileNotFoundError, match="not a folder"):
        report.write_comparison([run, tmp_path / "none"], tmp_path / "x.html")


def test_a_layout_of_rows_needs_no_template_of_its_own(tmp_path):
    rows = dict(kind="table", head=["bin", "share"], rows=[["0.1", "3%"]], notes=["of 10 bins"])
    results.save_examples(tmp_path, "calibration/x", rows)
    results.save_results(tmp_path, {"calibration/x/error": 0.25})
    text = Reader(report.write_report(tmp_path).read_text()).text
    assert "calibration: x" in text and "of 10 bins bin share 0.1 3%" in text and "25.0%" in text


def test_time_over_restarts_is_that_of_goodput(run, tmp_path):
    (tmp_path / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    life = dict(seconds=dict(step=60.0, compile=20.0), first_step=100, step=4000)
    parts = dict(step=20.0, lost=40.0, down=60.0)
    found = dict(starts=3, parts=parts, life=life, at=dict(wall=0.0, boot="", since_boot=0.0))
    (tmp_path / "goodput.json").write_text(json.dumps(found))
    text = Reader(report.write_report(tmp_path).read_text()).text
    assert "40.0% of 3 min 20 s spent in steps, over 3 starts" in text
    assert "not running 1 min 00 s (30.0%)" in text and "lost steps 40.0 s" in text
    assert "4,000 steps · 2 min 20 s · " in text  # of which it ran
