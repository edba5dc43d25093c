"""Which folders a report takes, and what of their configs it shows."""

import html
import json
import tracemalloc

import pytest
from conftest import tiny_config

from coca_jax.cli import report
from coca_jax.evaluation import report_data
from coca_jax.runtime import json_files, metric_log


def make_run(folder, steps):
    writer = metric_log.MetricWriter(folder)
    writer.write(1, {"loss": 3.0})
    writer.close()
    json_files.write_sealed(folder / "config.json", tiny_config().to_dict() | dict(steps=steps))
    return folder


def test_the_checksum_of_a_config_is_no_key_of_the_run(tmp_path):
    first, second = (make_run(tmp_path / str(steps), steps) for steps in (7, 8))
    assert json_files.SEAL_KEY in (first / "config.json").read_text()
    both = report.write_comparison([first, second], tmp_path / "both.html").read_text()
    assert "<td>steps</td>" in both and json_files.SEAL_KEY not in both
    alone = report.write_report(first).read_text()
    assert html.unescape(alone).count('"steps": 7') == 1 and json_files.SEAL_KEY not in alone


def test_a_run_that_is_given_twice_is_refused(tmp_path):
    run = make_run(tmp_path / "run", 7)
    (tmp_path / "link").symlink_to(run)
    for again in (run, f"{run}/", tmp_path / "link"):
        with pytest.raises(ValueError, match="given twice"):
            report.write_comparison([run, again], tmp_path / "both.html")
    assert not (tmp_path / "both.html").exists()


def test_what_a_long_run_logged_is_kept_by_columns(tmp_path):
    names = [f"metric{number}" for number in range(30)]
    lines = []
    for step in range(1, 4001):
        row = dict(step=step, step_seconds=0.5, **{name: step / 3 for name in names})
        if step % 2:
            row |= dict(loss=None, goodput=step / 4000)
        lines.append(json.dumps(row | dict(eval_seconds=0.25) if step > 2 else row))
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:9], "{cut", *lines[9:], '{"st']))
    tracemalloc.start()
    logged = report_data.read(tmp_path).logged
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4000 * 36 * 8 * 2 + 1e6  # 8 bytes a number and some to grow by; as dicts 12 MB
    assert len(logged) == 4000 and logged.last["step"] == 4000
    assert list(logged.points("metric7"))[-1] == (4000, 4000 / 3)
    assert list(logged.points("goodput"))[1] == (3, 3 / 4000)
    assert not list(logged.points("loss")) and not list(logged.points("nothing"))
    assert logged.seconds() == dict(step=2000.0, eval=999.5)
