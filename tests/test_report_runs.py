"""Which folders a report takes, and what of their configs it shows."""

import html

import pytest
from conftest import tiny_config

from coca_jax import metrics, report
from coca_jax.files import out_folder, sealed_json


def make_run(folder, steps):
    writer = metrics.MetricWriter(folder)
    writer.write(1, {"loss": 3.0})
    writer.close()
    sealed_json.write(folder / "config.json", tiny_config().to_dict() | dict(steps=steps))
    return folder


def test_the_checksum_of_a_config_is_no_key_of_the_run(tmp_path):
    first, second = (make_run(tmp_path / str(steps), steps) for steps in (7, 8))
    assert sealed_json.KEY in (first / "config.json").read_text()
    both = report.write_comparison([first, second], tmp_path / "both.html").read_text()
    assert "<td>steps</td>" in both and sealed_json.KEY not in both
    alone = report.write_report(first).read_text()
    assert html.unescape(alone).count('"steps": 7') == 1 and sealed_json.KEY not in alone


def test_a_run_that_is_given_twice_is_refused(tmp_path):
    run = make_run(tmp_path / "run", 7)
    (tmp_path / "link").symlink_to(run)
    for again in (run, f"{run}/", tmp_path / "link"):
        with pytest.raises(ValueError, match="is given twice; give each run once"):
            report.write_comparison([run, again], tmp_path / "both.html")
    assert not (tmp_path / "both.html").exists()


def test_the_folder_of_an_ablation_is_told_with_its_page_and_its_runs(tmp_path):
    sealed_json.write(tmp_path / out_folder.PLAN, dict(minutes=0, variants={}))
    line = f"is the folder of an ablation: its page is {tmp_path}/report.html; a run of it is "
    with pytest.raises(ValueError, match=f"{line}{tmp_path}/VARIANT/seedN$"):
        report.write_report(tmp_path)
