"""The main job on the embedded data: it runs, resumes bit for bit, and refuses bad input early."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import tiny_config

from coca_jax import checkpointing, run_config
from coca_jax.metrics import read_metrics
from coca_jax.train import train
from coca_jax.training import stopping
from coca_jax.training.stopping import Preempted


def tiny_run(steps=4, **changes):
    config = tiny_config(image_size=32, patch_size=16)
    config.model.text.update(vocab_size=320, max_len=12)
    config.batch_size, config.steps = 16, steps
    config.data.sources = (
        dict(builtin="scenes", split="train", kind="caption"),
        dict(builtin="scenes", split="train", kind="label"),
    )
    config.data.augment = "crop"
    config.optimizer.ema = 0.9
    config.log.every_steps, config.checkpoint.every_steps = 1, 2
    config.update(changes)
    return config


COMPARED = ("loss", "contrastive_loss", "captioning_loss", "gradient_norm", "learning_rate")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of four steps."""
    workdir = str(tmp_path_factory.mktemp("whole"))
    summary = train(tiny_run(), workdir)
    return workdir, summary


def test_a_run_leaves_what_it_promises(whole):
    workdir, summary = whole
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for name in (*COMPARED, "pairs_per_second", "data_wait_seconds", "captioning_loss/label"):
        assert np.isfinite(rows[-1][name]), name
    assert summary["steps"] == 4 and summary["skipped_steps"] == 0
    assert set(os.listdir(workdir)) >= {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "vocabulary.model",
        "report.html",
    }
    assert json.load(open(f"{workdir}/config.json"))["model"]["text"]["vocab_size"] == 320


def test_a_resumed_run_equals_an_uninterrupted_one(whole, tmp_path, monkeypatch):
    reached = stopping.Stop.reached
    monkeypatch.setattr(stopping.Stop, "reached", lambda self, step: step == 3)
    with pytest.raises(Preempted, match="saved step 3"):
        train(tiny_run(), str(tmp_path))
    monkeypatch.setattr(stopping.Stop, "reached", reached)
    train(tiny_run(), str(tmp_path))
    for a, b in zip(read_metrics(whole[0]), read_metrics(tmp_path), strict=True):
        assert [a[name] for name in COMPARED] == [b[name] for name in COMPARED]
    want, _ = checkpointing.load_params(whole[0])
    got, _ = checkpointing.load_params(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_sigterm_saves_and_asks_for_a_restart(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from test_train import tiny_run\n"
        "from coca_jax import train\nfrom coca_jax.training import stopping\n"
        "try:\n"
        f"  train.train(tiny_run(steps=100_000), {str(tmp_path)!r})\n"
        "except stopping.Preempted:\n"
        "  sys.exit(stopping.EXIT_PREEMPTED)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == stopping.EXIT_PREEMPTED == 75
    _, step = checkpointing.find_step(str(tmp_path))
    assert step == read_metrics(tmp_path)[-1]["step"] > 0


def test_a_workdir_refuses_another_config(whole):
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
        train(tiny_run(seed=1), whole[0])


def test_a_run_from_before_a_key_was_there_resumes_at_the_key_s_default(tmp_path):
    config = tiny_run()
    old = config.to_dict()
    del old["model"]["qk_norm"], old["model"]["implementation"]
    (tmp_path / "config.json").write_text(json.dumps(old, default=list))
    run_config.check_resumable(config, str(tmp_path))
    config.model.qk_norm = True
    with pytest.raises(ValueError, match="model.qk_norm: False there, True here"):
        run_config.check_resumable(config, str(tmp_path))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(batch_size=15), "batch_size=15 is not a multiple of 8"),
        (dict(steps=0), "set exactly one"),
        (dict(epochs=1e-9, steps=0), "is no step of batch_size=16"),
        (dict(remat="some"), "config.remat='some'"),
    ],
)
def test_bad_configs_are_refused_before_any_work(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_run(**changes), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_missing_data_is_named(tmp_path):
    config = tiny_run()
    config.data.sources = (dict(path=str(tmp_path / "nowhere"), kind="caption"),)
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        train(config, str(tmp_path / "run"))


def test_epochs_become_steps():
    config = tiny_run(steps=0, epochs=2.5)
    assert run_config.num_steps(config, 64) == 10


def test_unknown_keys_are_refused_by_the_command(tmp_path):
    command = [sys.executable, "-m", "coca_jax.train", "--config=configs/demo.py"]
    command += [f"--workdir={tmp_path}", "--config.batch_sise=8"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "batch_sise" in result.stderr and "batch_size" in result.stderr
