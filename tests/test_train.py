"""The main job on the embedded data: it runs, resumes bit for bit, and refuses bad input early."""

import dataclasses
import functools
import gc
import json
import os
import pathlib
import re
import shutil
import signal
import tarfile
import types
import weakref

import jax
import numpy as np
import pytest
from conftest import scenes_words, tiny_config
from data_cases import write_folder
from one_device import smallest_run, train_alone

from coca_jax.checkpoints import config_file, manager
from coca_jax.cli import prepare as command
from coca_jax.cli.train import train
from coca_jax.config import typed
from coca_jax.data import vocabulary
from coca_jax.data.prepare import prepare
from coca_jax.parallel import sharding
from coca_jax.runtime import goodput, notes, signals
from coca_jax.runtime.metric_log import read_metrics
from coca_jax.training import auto_mesh, losses, memory, setup, trainer

pytestmark = pytest.mark.usefixtures("compile_once")


def tiny_run(steps=4, **changes):
    config = tiny_config(image_size=32, patch_size=16, bias=False)  # half as many arrays to save
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


def test_a_loss_by_a_teacher_that_the_data_lack_is_refused_before_training(tmp_path):
    config = tiny_run()
    config.loss.update(imitation_weight=5.0, teacher_width=config.model.embed_dim)
    with pytest.raises(
        ValueError, match="^loss.imitation_weight=5: no record of scenes.* has a tea"
    ):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


COMPARED = ("loss", "contrastive_loss", "captioning_loss", "gradient_norm", "learning_rate")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of four steps, of which two are traced."""
    workdir = str(tmp_path_factory.mktemp("whole"))
    config = tiny_run()
    config.log.profile_steps = (2, 3)
    summary = train(config, workdir)
    return workdir, summary


def test_a_run_leaves_what_it_promises(whole):
    workdir, summary = whole
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    rates = [row["pairs_per_second"] for row in rows]  # with steps 2 and 4 saves come
    assert rates[1] <= 1.001 * rates[0] and rates[3] <= 1.001 * rates[2]
    assert 0 < rows[-1]["goodput"] < 1 and summary["restarts"] == 0
    shares = [rows[-1][f"time/{part}"] for part in goodput.PARTS if part != "step"]
    assert sum(shares) + rows[-1]["goodput"] == pytest.approx(1)
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
    (trace,) = pathlib.Path(workdir, "profile").rglob("*.xplane.pb")
    assert b"step_num" in trace.read_bytes()


@pytest.fixture
def unwatched(monkeypatch):
    """No command watches this process's signals; one may have been run in it."""
    monkeypatch.setattr(signals, "_current", None)
    watching = signal.set_wakeup_fd(-1)
    yield
    signal.set_wakeup_fd(watching)


@pytest.mark.long
def test_a_run_that_sigterm_stopped_goes_on_as_if_uninterrupted(
    whole, tmp_path, monkeypatch, unwatched
):
    """It saves the step under way and asks for a restart; signals are the program's own again."""
    reached, former = signals.Stop.reached, signal.getsignal(signal.SIGTERM)

    def sent(self, step):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return reached(self, step)

    monkeypatch.setattr(signals.Stop, "reached", sent)
    config = tiny_run()
    config.data.vocabulary = scenes_words()  # what the whole run trained
    with pytest.raises(signals.Preempted, match="step 3 is saved"):
        train(config, str(tmp_path))
    assert signal.getsignal(signal.SIGTERM) is former
    _, step = manager.find_step(str(tmp_path))
    assert step == read_metrics(tmp_path)[-1]["step"] == 3
    monkeypatch.setattr(signals.Stop, "reached", reached)
    train(config, str(tmp_path))
    kept = [pathlib.Path(run, "vocabulary.model").read_bytes() for run in (whole[0], tmp_path)]
    assert kept[0] == kept[1]
    for a, b in zip(read_metrics(whole[0]), read_metrics(tmp_path), strict=True):
        assert [a[name] for name in COMPARED] == [b[name] for name in COMPARED]
    want, _ = manager.load_params(whole[0])
    got, _ = manager.load_params(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.long
def test_a_stored_run_goes_on_with_the_metrics_that_it_had(tmp_path):
    """tests/golden/run_0_2.tar.xz: step 2 of 4, and the metrics of all four."""
    with tarfile.open("tests/golden/run_0_2.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    want = read_metrics(tmp_path)
    params, old = manager.load_params(str(tmp_path))
    assert sum(x.size for x in jax.tree.leaves(params)) == 4_449
    train_alone(smallest_run(bias=True), tmp_path)
    for a, b in zip(read_metrics(tmp_path), want, strict=True):
        for name in COMPARED:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4)
    assert old.vocabulary_checksum == manager.read_config(str(tmp_path)).vocabulary_checksum


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    whole, tmp_path, capfd
):
    workdir = shutil.copytree(whole[0], tmp_path / "run")
    for path in (workdir / "checkpoints/4/opt_state").rglob("d/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)
    train(tiny_run(), str(workdir))
    told = capfd.readouterr().err
    (line,) = [line for line in told.splitlines() if "checkpoint 4 is damaged" in line]
    assert line.startswith("warning: ") and "2 steps are trained again" in line
    assert line in notes.take()  # it is repeated next to the result
    for a, b in zip(read_metrics(whole[0]), read_metrics(workdir), strict=True):
        assert [a[name] for name in COMPARED] == [b[name] for name in COMPARED]
    want, got = (manager.load_params(str(place))[0] for place in (whole[0], workdir))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_run_keeps_its_vocabulary(whole, tmp_path):
    workdir = shutil.copytree(whole[0], tmp_path / "run")
    config = (workdir / "config.json").read_bytes()
    words = ["a red circle", "two blue squares"] * 9
    vocabulary.train(words, 310, str(workdir / "vocabulary.model"))
    with pytest.raises(ValueError, match="vocabulary.model .* is not the vocabulary that the run"):
        train(tiny_run(), str(workdir))
    (workdir / "vocabulary.model").unlink()
    with pytest.raises(ValueError, match="vocabulary.model is missing"):
        train(tiny_run(), str(workdir))
    assert not (workdir / "vocabulary.model").exists()
    assert (workdir / "config.json").read_bytes() == config


class Endless(losses.Captioning):
    """A loss whose gradients are infinite."""

    @classmethod
    def of(cls, config, ops):
        return dataclasses.replace(super().of(config, ops), weight=float("inf"))


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.long
def test_a_run_that_learns_nothing_stops_and_keeps_its_checkpoints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(losses, "OBJECTIVES", (Endless,))
    config = tiny_run(steps=100)
    config.data.vocabulary, config.optimizer.ema = scenes_words(), 0.0
    config.checkpoint.update(every_steps=2, keep=1, max_skipped=5)
    with pytest.raises(ValueError, match=r"of 5 steps in a row \(1 to 5\) are not finite") as error:
        train_alone(config, tmp_path)
    assert all(one in str(error.value) for one in ("optimizer.learning_rate=0.001", "scenes"))
    rows = json.loads((tmp_path / "skipped_step_1.json").read_text())
    assert len(rows) == 16 and {"source", "index", "key", "text"} <= set(rows[0])
    assert os.listdir(tmp_path / "checkpoints") == []
    config.steps = 3  # which end before that
    train_alone(config, tmp_path / "short")
    assert "warning: 3 of 3 steps changed nothing, as their grad" in capsys.readouterr().err


def test_a_refused_run_removes_its_files_and_leaves_what_was_there(tmp_path, monkeypatch, caplog):
    config, refused = smallest_run(), ValueError("refused")
    config.batch_size = 8
    vocabulary.load(scenes_words()).save(str(tmp_path / "words.model"))
    config.data.vocabulary = str(tmp_path / "words.model")
    config.data.sources = (dict(builtin="scenes", kind="caption", limit=50),)

    def refuse(*of):
        raise refused

    for place in ("memory.check", "callbacks.Evaluate.catch_up", "trainer.Trainer.open_batches"):
        with monkeypatch.context() as patch:
            patch.setattr(f"coca_jax.training.{place}", refuse)
            with pytest.raises(ValueError, match="refused"):
                trainer.train(typed(config), str(tmp_path / "run"))
        assert not (tmp_path / "run").exists(), place
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/notes.txt").write_text("mine")
    monkeypatch.setattr("coca_jax.training.memory.check", refuse)
    with pytest.raises(ValueError, match="refused"):
        trainer.train(typed(config), str(tmp_path / "kept"))
    assert os.listdir(tmp_path / "kept") == ["notes.txt"]
    assert "no run began here" not in caplog.text


def test_a_run_that_is_over_frees_its_memory_at_once(tmp_path, monkeypatch):
    """Of several runs of a process, the next one needs it."""
    one = functools.partial(auto_mesh.make, devices=jax.devices()[:1])
    monkeypatch.setattr(auto_mesh, "make", one)
    config = smallest_run()
    config.steps, config.loss.captioning_weight = 2, 0.0
    config.data.vocabulary = scenes_words()
    run = trainer.Trainer(config, str(tmp_path))
    run.fit()
    state = weakref.ref(jax.tree.leaves(run.state.params)[0])
    gc.disable()
    try:
        del run
        assert state() is None
    finally:
        gc.enable()


def test_a_workdir_refuses_another_config(whole):
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
        train(tiny_run(seed=1), whole[0])


def test_a_longer_run_continues_a_finished_one_by_the_schedule_of_its_new_length(
    whole, tmp_path, capfd
):
    workdir = shutil.copytree(whole[0], tmp_path / "run")
    summary = train(tiny_run(steps=6), str(workdir))
    assert summary["steps"] == 6 and not summary["skipped_steps"]
    said = capfd.readouterr().err
    rate = tiny_run().optimizer.learning_rate
    assert "training longer: 6 steps, 4 before" in said
    assert f"{0.4 * rate:.3g} at step 4, where the schedule of 4 has 0" in said
    rows = read_metrics(workdir)
    assert rows[:4] == read_metrics(whole[0]) and [row["step"] for row in rows] == [*range(1, 7)]
    rates = [row["learning_rate"] for row in rows[4:]]
    np.testing.assert_allclose(rates, [0.4 * rate, 0.2 * rate], rtol=1e-6)
    assert manager.find_step(str(workdir))[1] == 6
    assert manager.read_run(str(workdir))["steps"] == 6
    train(tiny_run(steps=6), str(workdir))  # it is finished, and nothing is announced again
    assert "training longer" not in capfd.readouterr().err
    with pytest.raises(ValueError, match="holds a run of 6 steps, more than the 4 of this one"):
        train(tiny_run(steps=4), str(workdir))


@pytest.mark.long
def test_a_longer_run_with_growing_batches_equals_one_whose_stages_have_that_length(tmp_path):
    """With a constant rate the first steps of both are the same; the data go on, too."""

    def config(steps, **changes):
        found = smallest_run()
        found.update(steps=steps, batch_sizes=((0.5, 8),), batch_size=16, **changes)
        found.data.vocabulary, found.optimizer.schedule = scenes_words(), "constant"
        return typed(found)

    train_alone(config(2), tmp_path / "longer")
    train_alone(config(4), tmp_path / "longer")
    train_alone(config(4, stage_steps=2), tmp_path / "direct")
    for a, b in zip(*(read_metrics(tmp_path / name) for name in ("longer", "direct")), strict=True):
        assert [a[name] for name in COMPARED] == [b[name] for name in COMPARED]
    want, got = (manager.load_params(str(tmp_path / name))[0] for name in ("direct", "longer"))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    train_alone(config(5), tmp_path / "longer")
    assert manager.read_run(str(tmp_path / "longer"))["stage_steps"] == 2


@pytest.mark.long
def test_missing_weights_are_refused_before_anything_is_made_and_not_missed_later(tmp_path, whole):
    config = tiny_run(init_from=str(tmp_path / "typo"))
    with pytest.raises(FileNotFoundError, match="no checkpoint under .*typo"):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    there = str(tmp_path / "there")  # a run that has saved a step goes on without them
    shutil.copytree(whole[0], there)
    config_file.write(manager.read_run(there) | {"init_from": config.init_from}, there)
    setup.check(typed(config), there)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"batch_size": 24}, "--config.accumulate_steps=2 --config.remat=named"),
        ({"batch_size": 18, "accumulate_steps": 2}, "--config.accumulate_steps=6 --config.remat"),
        ({"batch_size": 21, "accumulate_steps": 3}, "--config.accumulate_steps=7 --config.remat"),
        ({"batch_size": 6, "accumulate_steps": 3, "text_parts": 2}, "--config.remat=named, or"),
        (
            {"batch_size": 24, "batch_sizes": ((0.5, 18),), "accumulate_steps": 2},
            "--config.accumulate_steps=6 --config.remat=named",
        ),
    ],
)
def test_what_is_advised_where_memory_ends_is_a_run_that_can_be(changes, advice):
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    config = typed(tiny_run()).change({"text_lengths": (8,)} | changes)
    config_file.check_batch(config, 1)
    told = memory.less(config, mesh)
    assert told.startswith(advice) and told.endswith("or a smaller batch_size")
    given = re.findall(r"accumulate_steps=(\d+)", told)
    for number in map(int, given):
        config_file.check_batch(config.change({"accumulate_steps": number}), 1)


def test_a_run_from_before_a_key_was_there_resumes_at_the_key_s_default():
    config = tiny_run()
    old = json.loads(json.dumps(config.to_dict(), default=list))
    del old["model"]["qk_norm"], old["model"]["implementation"]
    config_file.check_resumable(config, old, "runs/old")
    config.model.qk_norm = True
    with pytest.raises(ValueError, match="model.qk_norm: False there, True here"):
        config_file.check_resumable(config, old, "runs/old")
    config.model.qk_norm = False
    before, config.steps = config.steps, config.steps + 100
    config_file.check_resumable(config, old, "runs/old")
    longer, steps = config_file.continue_longer(typed(config), old, 10, "runs/old")
    assert longer == typed(config) and steps == before
    config.steps = before - 1
    with pytest.raises(ValueError, match=f"a run of {before} steps, more than the {before - 1}"):
        config_file.continue_longer(typed(config), old, 10, "runs/old")


def test_data_that_are_not_seen_from_another_folder_are_no_other_data(tmp_path, monkeypatch):
    config, workdir = smallest_run(), str(tmp_path / "run")
    config.data.sources = (dict(builtin="scenes"), dict(path="d/mine"))
    config.batch_size, words = 16, types.SimpleNamespace(checksum="")
    config = typed(config)
    config_file.write(config_file.contents(config, workdir, words), workdir)
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "d/mine").mkdir(parents=True)
    (here / "d/mine/manifest.json").write_text("{}")
    there.mkdir()
    monkeypatch.chdir(here)
    setup.check(config, workdir)
    monkeypatch.chdir(there)
    with pytest.raises(FileNotFoundError, match=f"source d/mine is not there, seen from {there};"):
        setup.check(config, workdir)
    with pytest.raises(FileNotFoundError, match=f"source d/mine is not there, seen from {there};"):
        command.inspect_run(workdir, 1)


def test_a_run_does_not_go_on_with_data_that_were_prepared_anew(tmp_path):
    """Also of as many examples, of which a caption was corrected."""
    raw, out = write_folder(tmp_path / "raw", 12), str(tmp_path / "my data")
    prepare("imagefolder", str(raw), out, progress=False)
    config = smallest_run()
    config.data.vocabulary = scenes_words()
    config.data.sources = (
        dict(path=(tmp_path / "my data").as_uri(), kind="caption", limit=5),
        dict(builtin="scenes"),
    )
    workdir = str(tmp_path / "run")

    def started():
        found = trainer.Trainer(config, workdir)
        found.mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
        found.open_data()
        return found

    told = started().mixture.data_digests
    assert told[0]["examples"] == 12 and told[1] is None
    words = types.SimpleNamespace(checksum=vocabulary.load(scenes_words()).checksum)
    config_file.write(config_file.contents(typed(config), workdir, words, (), told), workdir)
    started()
    rows = (raw / "metadata.jsonl").read_text()
    for corrected, count in ((rows.replace("picture 3", "picture three"), 12), (rows, 11)):
        (raw / "metadata.jsonl").write_text(corrected)
        if count == 11:
            (raw / "0011.png").unlink()
        prepare("imagefolder", str(raw), out, overwrite=True, progress=False)
        with pytest.raises(ValueError, match=rf"data, was .* began: 12 examples .*, {count} ex"):
            started()
    config_file.write(config_file.contents(typed(config), workdir, words), workdir)
    started()  # a run from before this was kept


@pytest.mark.parametrize(
    "before, now",
    [
        ("runs/ref", "{here}/runs/ref"),
        ("{here}/runs/ref", "runs/../runs/ref/"),
        ("runs/ref", "/elsewhere/moved"),
        ("gs://bucket/runs/ref", "/mnt/runs/ref"),
    ],
)
def test_a_workdir_may_be_spelled_otherwise_and_moved(before, now, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run_in(workdir, data, other):
        config = tiny_run()
        paths = (f"{workdir}/data/{data}", other)
        config.data.sources = tuple(dict(path=path, kind="caption") for path in paths)
        return typed(config)

    before, now = before.format(here=tmp_path), now.format(here=tmp_path)
    words = types.SimpleNamespace(checksum="")
    old = config_file.contents(run_in(before, "tux", "data/tux"), before, words)
    config_file.check_resumable(run_in(now, "tux", f"{tmp_path}/data/tux"), old, now)
    for data, other in (("gimp", "data/tux"), ("tux", "data/gimp"), ("tux", f"{now}/data/tux")):
        with pytest.raises(ValueError, match=r"data.sources\[\d\].path: .* there, .* here"):
            config_file.check_resumable(run_in(now, data, other), old, now)
    del old["workdir"]  # of a run from before it was kept
    config_file.check_resumable(run_in(before, "tux", "data/tux"), old, before)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(batch_size=15), "batch_size=15 is not a multiple of 8"),
        (dict(steps=0), "set exactly one$"),
        (dict(epochs=1.0), "set exactly one; --config.steps=0 leaves the epochs"),
        (dict(checkpoint=dict(every="10")), "checkpoint.every='10': give one of 'steps'"),
        (dict(epochs=1e-9, steps=0), "is no step of batch_size=16"),
        (dict(remat="some"), "config.remat='some'"),
        (dict(optimizer=dict(learning_rate=float("nan"))), "optimizer.learning_rate=nan"),
        (dict(optimizer=dict(learning_rate=1e6)), "optimizer.learning_rate=1000000.0"),
        (dict(checkpoint=dict(max_skipped=-1)), "checkpoint.max_skipped=-1"),
        (
            dict(loss=dict(min_temperature=0.1)),
            "min_temperature=0.1 is above model.temperature=0.07",
        ),
    ],
)
def test_bad_configs_are_refused_before_any_work(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(tiny_run(**changes), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_missing_data_is_named(tmp_path):
    config = tiny_run()
    config.data.sources = (dict(path=str(tmp_path / "nowhere"), kind="caption"),)
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()  # by someone else
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        train(config, str(tmp_path / "mine"))
    assert not list((tmp_path / "mine").iterdir())


def test_epochs_become_steps():
    config = typed(tiny_run(steps=0, epochs=2.5))
    assert config_file.num_steps(config, 64) == 10
    config = config.change({"optimizer.warmup_steps": 10})
    line = r"not below the run's 10 steps; shorten it \(config.epochs=2.5 of 64 examples"
    with pytest.raises(ValueError, match=line):
        config_file.num_steps(config, 64)


def test_unknown_keys_are_refused_by_the_command(commands, tmp_path):
    recipe = pathlib.Path(__file__).parent.parent / "configs/demo.py"
    command = ["train", f"--config={recipe}", f"--workdir={tmp_path}", "--config.batch_sise=8"]
    result = commands.run(command, tmp_path)
    assert result.returncode == 2
    assert "batch_sise" in result.stderr and "batch_size" in result.stderr
