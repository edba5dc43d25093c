"""What scores come with: intervals, the items that are shown, results joined and as a table."""

import concurrent.futures
import contextlib
import json
import math
import threading

import numpy as np
import pytest

from coca_jax.evaluation import report_terminal, runner
from coca_jax.evaluation.evaluators import results
from coca_jax.evaluation.evaluators.base import Writing
from coca_jax.evaluation.metrics import intervals


def test_intervals_of_other_figures_agree_with_theory():
    rng = np.random.default_rng(8)
    totals, hits = np.asarray([400, 100]), np.asarray([200, 90])
    low, high = intervals.limits(intervals.mean_of_classes(hits, totals))
    half = 1.96 * 0.5 * math.sqrt(0.25 / 400 + 0.09 / 100)
    assert low == pytest.approx(0.7 - half, abs=0.01) and high == pytest.approx(
        0.7 + half, abs=0.01
    )
    covered = 0
    for _ in range(200):
        low, high = intervals.median_limits(rng.exponential(size=101))
        covered += low <= math.log(2) <= high
    assert 180 <= covered <= 199
    assert intervals.median_limits(np.asarray([2.0, 1.0])) == (1, 2)  # few values: all of them
    assert intervals.median_limits(np.asarray([5.0])) == (5, 5)
    sums = intervals.resampled_sums(np.ones((7, 2)), resamples=130)
    assert sums.shape == (130, 2) and (sums == 7).all()


@pytest.mark.parametrize("each", [1, 2, 5])
def test_the_interval_over_classes_holds_the_truth_with_few_examples_each(each):
    """Of one each the resamples within classes are all alike: an interval without width."""
    rng, held, totals = np.random.default_rng(2), 0, np.full(60, each)
    for seed in range(100):
        right = np.clip(rng.normal(0.7, 0.15, 60), 0, 1)
        hits = rng.binomial(totals, right)
        low, high = intervals.limits(intervals.mean_of_classes(hits, totals, seed=seed))
        held += low <= right.mean() <= high
    assert 89 <= held <= 100
    if each == 1:  # the accuracy, whose interval is the same but for the draws
        _, first, last = intervals.bootstrap(hits)
        assert (low, high) == pytest.approx((first, last), abs=0.03)
    assert intervals.limits(intervals.mean_of_classes(totals, totals)) == (1, 1)


def test_the_interval_of_a_median_holds_the_truth_where_values_of_one_owner_are_alike():
    """Five values each of 100: taken for 500 apart, 95% intervals held the median in 77 of 100."""
    rng, held, owners = np.random.default_rng(3), 0, np.repeat(np.arange(100), 5)
    for _ in range(100):
        values = rng.normal(size=(100, 1)) + rng.normal(size=(100, 5))
        low, high = intervals.median_limits(values.ravel(), owners)
        held += low <= 0 <= high
    assert 89 <= held <= 100
    same = np.repeat(rng.normal(size=100), 5)  # as 100 values, and no more
    low, high = intervals.median_limits(same, owners)
    first, last = intervals.median_limits(same[::5])
    assert (low, high) == pytest.approx((first, last), abs=0.1)
    assert intervals.median_limits(np.zeros(4), np.arange(4)) == (0, 0)


def test_what_is_of_one_owner_is_drawn_together():
    """Four alike of each of fifty say as much as the fifty do."""
    rng = np.random.default_rng(6)
    values = (rng.uniform(size=50) < 0.6).astype(float)
    owners = np.repeat(np.arange(50), 4)
    found = dict(intervals.with_interval("x", np.repeat(values, 4), owners=owners))
    once = dict(intervals.with_interval("x", values))
    assert {k: found[k] for k in ("x", "x_low", "x_high")} == pytest.approx(
        {k: once[k] for k in ("x", "x_low", "x_high")}
    )
    assert (found["x_count"], once["x_count"]) == (200, 50)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_share_of_none_or_all_has_an_interval(value):
    """Draws from equal examples are equal: 8 of 8 were said to be right of 100 to 100%."""

    def room(count, **how):
        owners = np.repeat(np.arange(count), 2)
        values = np.full(2 * count, value * how.get("most", 1.0))
        found = dict(intervals.with_interval("x", values, owners=owners, **how))
        assert found["x"] == value * how.get("most", 1.0)
        assert (found["x"] == found["x_low"]) != (found["x"] == found["x_high"])
        return found["x_high"] - found["x_low"]

    assert room(8) == pytest.approx(1 - 0.025 ** (1 / 8))
    assert room(3, most=10.0) == pytest.approx(10 * (1 - 0.025 ** (1 / 3)))
    assert intervals.bootstrap(np.full(8, value)) == (value, value, value)  # no share, as nats


def test_a_mean_beyond_its_ends_is_refused_and_one_without_ends_has_an_interval():
    """Words a caption taken for a share had an interval that ended at 1."""
    words = np.array([7.0, 9.0, 8.0, 8.0])
    with pytest.raises(ValueError, match=r"^value 7 with weight 1: not between 0 and most=1 "):
        dict(intervals.with_interval("words/x/mean", words))
    found = dict(intervals.with_interval("words/x/mean", words, most=None))
    assert 7 <= found["words/x/mean_low"] < found["words/x/mean"] == 8
    assert 8 < found["words/x/mean_high"] <= 9
    owned = dict(intervals.with_interval("x", np.ones(4), owners=np.array([0, 0, 0, 1])))
    assert owned["x"] == owned["x_high"] == 1


def test_intervals_of_high_shares_hold_the_truth():
    """19 of 20 are right in the long run; all 20 are in 36 sets of 100, which said 100 to 100%."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(300):
        hits = rng.random(20) < 0.95
        _, low, high = intervals.bootstrap(hits, most=1.0, resamples=200)
        held += low <= 0.95 <= high
    assert held >= 0.9 * 300


def test_bootstrap_agrees_with_theory_and_is_deterministic():
    rng = np.random.default_rng(4)
    for n in (400, 20_000):
        hits = rng.uniform(size=n) < 0.7
        mean, low, high = intervals.bootstrap(hits)
        assert mean == pytest.approx(hits.mean())
        half = 1.96 * math.sqrt(mean * (1 - mean) / n)
        assert high - mean == pytest.approx(half, rel=0.15)
        assert mean - low == pytest.approx(half, rel=0.15)
        assert intervals.bootstrap(hits) == (mean, low, high)
    _, low, high = intervals.bootstrap(np.sort(hits))  # neighbours alike: blocks are drawn
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)
    assert intervals.bootstrap(np.ones(5)) == (1, 1, 1)
    assert intervals.bootstrap(np.asarray([1.0, 6.0]), np.asarray([1.0, 2.0]))[0] == 7 / 3
    with pytest.raises(ValueError, match="0 examples"):
        intervals.bootstrap(np.zeros(0))
    with pytest.raises(ValueError, match="3 examples with total weight 0.0"):
        intervals.bootstrap(np.ones(3), np.zeros(3))
    samples = np.append(np.linspace(0, 1, 1001), [np.nan] * 50)  # resamples of no example
    assert intervals.limits(samples) == pytest.approx((0.025, 0.975))


@pytest.mark.parametrize("length", [0, 1, 5, 8, 9, 1000])
def test_shown_items_are_spread(length):
    spread, made = results.Spread(8), []
    for i in range(length):
        spread.offer(lambda i=i: made.append(i) or i)
    items = spread.items()
    assert len(items) == min(8, length) and items == sorted(set(items))
    assert len(made) < 80
    if length == 1000:
        assert items[0] == 0 and items[-1] > 850 and max(np.diff(items)) < 200


def test_the_worst_are_kept_whatever_their_place():
    rng = np.random.default_rng(0)
    badness = np.round(rng.normal(size=500), 1)  # with ties
    worst, made = results.Worst(6), []
    for number, value in enumerate(badness.tolist()):
        worst.offer(value, lambda number=number: made.append(number) or number)
    order = sorted(range(500), key=lambda i: (-badness[i], i))  # of equal ones the first
    assert worst.items() == order[:6] and len(made) < 80
    none = results.Worst(0)
    none.offer(1.0, lambda: pytest.fail("made"))
    assert none.items() == []


def test_results_are_merged(tmp_path):
    results.save_results(tmp_path, {"zero_shot/a/top1": 0.5, "b": float("nan")})
    results.save_results(tmp_path, {"zero_shot/a/top1": np.float32(0.75), "c": 1})
    saved = json.loads((tmp_path / "eval.json").read_text())
    assert saved == {"zero_shot/a/top1": 0.75, "b": None, "c": 1}
    results.save_examples(tmp_path, "zero_shot/a", dict(kind="zero_shot"))
    results.save_examples(tmp_path, "retrieval/a", dict(kind="retrieval"))
    assert list(json.loads((tmp_path / "eval_examples.json").read_text())) == [
        *("zero_shot/a", "retrieval/a")
    ]
    big = np.zeros((300, 200, 3), np.uint8)
    assert results.thumbnail(big).shape == (96, 64, 3)


def test_scores_that_are_written_at_once_are_all_there(tmp_path, monkeypatch):
    found, both = results._read, threading.Barrier(2)

    def read(path):  # as if each read what was there before the other wrote
        there = found(path)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.3)
        return there

    monkeypatch.setattr(results, "_read", read)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: results.save_results(tmp_path / "new", {name: 1}), "ab"))
    assert json.loads((tmp_path / "new/eval.json").read_text()) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize("harm", [b"", b'{"a": 0.5', b"[1, 2]", b"\xff\xfe", b"[" * 99_999])
def test_a_damaged_file_is_set_aside_and_ends_nothing(tmp_path, caplog, harm):
    for name in ("eval.json", "eval_examples.json"):
        (tmp_path / name).write_bytes(harm)
    results.save_results(tmp_path, {"b": 0.25})
    results.save_examples(tmp_path, "retrieval/a", dict(kind="retrieval"))
    results.save_results(tmp_path, {"c": 0.5})
    assert json.loads((tmp_path / "eval.json").read_text()) == {"b": 0.25, "c": 0.5}
    assert (tmp_path / "eval.json.damaged").read_bytes() == harm
    assert (tmp_path / "eval_examples.json.damaged").read_bytes() == harm
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and not any("\n" in line for line in told)
    assert told[0].startswith(f"{tmp_path}/eval.json: damaged (")
    assert told[0].endswith(f"Moved to {tmp_path}/eval.json.damaged; started a new file.")


def test_the_table_of_a_terminal_has_headlines_with_intervals_and_baselines_on_a_screen():
    key = "zero_shot/pets_test/top1"
    scores = {key: 0.348, f"{key}_low": 0.3, f"{key}_high": 0.4, f"{key}_count": 1200.0}
    scores |= {"zero_shot/pets_test/mean_per_class": 0.2, "steps": 100, "report": "a/report.html"}
    scores |= {f"{key}_chance": 0.045, f"{key}_majority": 0.33}
    header, task, row, *_ = report_terminal.score_table(scores)
    assert header.split() == ["score", "95%", "interval", "chance", "majority", "examples"]
    assert task == "Zero-shot, pets_test" or "pets_test" in task
    assert row.split()[-7:] == ["34.8%", "30.0", "to", "40.0%", "4.5%", "33.0%", "1,200"]
    assert "chance" not in report_terminal.score_table({key: 0.348})[0]
    many = {f"zero_shot/set_{n}/{m}": 0.5 for n in range(30) for m in ("top1", "top5")}
    lines = report_terminal.score_table(many)
    assert (
        len(lines) == report_terminal.MOST_ROWS + 2 and lines[-1] == "and 12 more rows in eval.json"
    )
    assert max(map(len, lines)) <= 80 and report_terminal.score_table({"steps": 3}) == []


@pytest.mark.parametrize(
    "text", ['{"request": {"wei', "[]", "{}", '{"request": {"weights": "w"}, "started": 1}', "\xff"]
)
def test_a_damaged_account_of_what_is_finished_is_begun_anew(text, tmp_path, caplog):
    path = tmp_path / "eval_progress.json"
    asked = dict(weights="w")
    begun = runner.Unfinished(str(tmp_path), asked, Writing(True))
    begun.add("task", {"a": 0.5})
    path.write_bytes(text.encode("latin-1"))
    begun.add("other", {"b": 0.5})  # it is not this evaluation's any more
    assert path.read_bytes() == text.encode("latin-1")
    again = runner.Unfinished(str(tmp_path), asked, Writing(True))
    assert again.scores("task") is None and str(path) in caplog.text
    again.add("task", {"a": 0.25})
    found = runner.Unfinished(str(tmp_path), asked, Writing(True))
    assert found.scores("task") == {"a": 0.25}


def test_the_folder_of_a_run_has_its_own_scores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("config.json", "open_clip_config.json"):
        run = tmp_path / name.partition(".")[0]
        run.mkdir()
        (run / name).write_text("{}")
        results.check_checkpoint(str(run), "runs/other")  # no scores yet
        results.save_results(run, {"a/b/r1": 0.5})
        results.save_checkpoint(str(run), f"{run.name}/")
        assert not (run / results.CHECKPOINT).exists()  # it may be moved
        results.check_checkpoint(str(run), run.name)
        with pytest.raises(ValueError, match=f"--out={run}: contains the scores of {run}"):
            results.check_checkpoint(str(run), "runs/other")
    results.save_results("scores", {"a/b/r1": 0.5})  # of an earlier version, which noted none
    results.check_checkpoint("scores", "runs/other")


def test_a_folder_has_the_scores_of_one_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/mine").mkdir(parents=True)
    results.check_checkpoint("scores", "runs/mine")  # of none yet
    results.save_checkpoint("scores", "runs/mine")
    for same in ("runs/mine/", "./runs/mine", str(tmp_path / "runs/mine")):
        results.check_checkpoint("scores", same)
    told = f"--out=scores: contains the scores of {tmp_path}/runs/mine."
    for other in ("runs/mine/checkpoints/400", "coca_ViT-B-32:tag"):
        with pytest.raises(ValueError, match=told):
            results.check_checkpoint("scores", other)
