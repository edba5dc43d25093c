"""Batch sizes that grow over a run: the rows of each step, resumed and split at will."""

import json

import jax
import numpy as np
import pytest
from conftest import scenes_words, tiny_config
from data_cases import data_config, equal, take, write_data
from one_device import train_alone
from quick_start import drawn_by_numpy  # noqa: F401

from coca_jax.checkpoints import config_file, manager
from coca_jax.config import Config, read, typed
from coca_jax.data import batch_schedule
from coca_jax.data.batches import open_stream
from coca_jax.data.mixture import Mixture
from coca_jax.runtime import signals
from coca_jax.runtime.metric_log import read_metrics
from coca_jax.training import optimizer, run_vocabulary

pytestmark = pytest.mark.usefixtures("compile_once")
RAMP = ((0.25, 4), (0.5, 8))


def test_stages_begin_where_their_shares_say():
    config = read(Config, dict(batch_sizes=((0.1, 8), (0.2, 16)), batch_size=32, steps=10))
    assert (
        batch_schedule.sizes(config) == [8, 16, 32]
        and batch_schedule.words(config) == "8, then 16, then 32"
    )
    assert batch_schedule.starts((0.1, 0.2), 10) == [0, 1, 3]  # 0.1 + 0.2 is a bit more than 0.3
    assert batch_schedule.starts((0.1, 0.2), 4) == [0, 1, 2]
    assert batch_schedule.starts((0.1, 0.2), 1) == [0, 1, 1]
    whole = (0.8, 0.05, 0.05, 0.1)  # more than 1 by 2e-16, and less in another order
    assert (
        batch_schedule.starts(whole, 20) == [0, 16, 17, 18, 20] and batch_schedule.rest(whole) == 0
    )
    assert batch_schedule.starts((0.7, 0.3 + 9e-10), 10**9)[-1] == 10**9
    given = {"batch_sizes": tuple((share, 4) for share in whole), "batch_size": 16}
    assert batch_schedule.steps_of(read(Config, given | {"epochs": 2.0}), 10) == 5
    read(Config, {"image_sizes": tuple((share, 32) for share in whole)})
    found = batch_schedule.of(config, 10, lambda size: [size // 4, size - size // 4])
    assert [stage.taken for stage in found] == [[0, 0], [2, 6], [10, 30]]
    assert [batch_schedule.number_at(found, step) for step in (0, 1, 2, 3, 99)] == [0, 1, 1, 2, 2]
    assert found[2].seen(5) == [10 + 2 * 8, 30 + 2 * 24]
    alone = batch_schedule.of(read(Config, dict(batch_size=32)), 0, lambda size: [size])
    assert alone == [batch_schedule.Stage(0, [32], [0])]


def test_epochs_count_what_is_seen():
    config = read(Config, dict(batch_sizes=((0.5, 8),), batch_size=24, epochs=2.0))
    assert config_file.num_steps(config, 160) == 20  # 10 steps of 8 and 10 of 24
    assert config_file.num_steps(config.change({"batch_sizes": ()}), 156) == 13


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(config of 16 steps over three sources of 23, 17 and 80 examples, vocabulary)."""
    root = write_data(tmp_path_factory.mktemp("data"))
    config = data_config(
        dict(path=str(root / "a"), kind="caption", weight=2.0),
        dict(path=str(root / "b"), kind="label"),
        dict(path=str(root / "c"), kind="caption", captions="all"),
        augment="drawing",
        batch=16,
    )
    config.batch_sizes, config.steps, config.model.patch_size = RAMP, 16, 8
    return config, run_vocabulary.load_or_train(config, str(root / "workdir"))


@pytest.fixture(scope="module")
def whole(data):
    return take(open_stream(*data), 20)


def test_rows_grow_and_every_epoch_is_a_permutation(data, whole):
    assert [len(batch["image"]) for batch in whole] == [4] * 4 + [8] * 8 + [16] * 8
    for batch in whole:
        size = len(batch["image"])
        assert np.bincount(batch["source"]).tolist() == [size // 2, size // 4, size // 4]
    for number, size in enumerate((23, 17)):
        seen = np.concatenate([b["index"][b["source"] == number] for b in whole])
        assert len(seen) >= 2 * size
        for epoch in range(len(seen) // size):
            assert sorted(seen[epoch * size : (epoch + 1) * size]) == list(range(size))
    mixture = Mixture(data[0])
    assert [mixture.pairs(step) for step in (0, 4, 5, 12, 14)] == [0, 16, 24, 80, 112]
    assert mixture.epochs(12) == [40 / 23, 20 / 17, 20 / 80]
    for step in (3, 4, 13):  # `prepare inspect` tells the same
        told = mixture.step_examples(step)
        assert [row["index"] for row in told] == whole[step]["index"].tolist()
    assert "from step 4: 8 rows, [4, 2, 2] of the sources" in mixture.describe()


def test_batches_follow_from_the_step_alone(data, whole):
    for start in (1, 3, 4, 11, 12, 17):
        resumed = open_stream(*data, start_step=start)
        assert all(equal(a, b) for a, b in zip(take(resumed, 3), whole[start:]))
    for processes in (2, 4):
        hosts = [
            take(open_stream(*data, start_step=3, process_index=i, process_count=processes), 10)
            for i in range(processes)
        ]
        for step, parts in enumerate(zip(*hosts), 3):
            joined = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
            assert equal(joined, whole[step])
    # What a step of the last size holds without stages begins elsewhere in the order alone.
    plain = typed(data[0]).change({"batch_sizes": ()})
    batch = next(open_stream(plain, data[1]))
    joined = np.concatenate([b["index"][b["source"] == 2] for b in whole[:4]])
    assert batch["index"][batch["source"] == 2].tolist() == joined.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": ((0.5, 0),)}, "give a tuple, each item a pair"),
        ({"batch_sizes": ((0.7, 8), (0.6, 8))}, "add up to at most 1"),
        ({"batch_sizes": RAMP, "data.loader": "seqio"}, "config.data.loader='seqio' does not go"),
    ],
)
def test_what_cannot_be_is_a_line(changes, message):
    config = typed(tiny_config())
    given = {"steps": 10, "data.sources": ({"builtin": "scenes"},)} | changes
    with pytest.raises(ValueError, match=message) as error:
        config.change(given).check()
    assert "config.batch_sizes=" in str(error.value)


def test_each_size_must_split(data):
    config = typed(data[0])
    config_file.check_batch(config, 2)
    with pytest.raises(ValueError, match="config.batch_sizes: 4 is not a multiple of 8 batch sh"):
        config_file.check_batch(config, 8)
    with pytest.raises(ValueError, match="config.batch_size=16 is not a multiple of 3 batch sh"):
        config_file.check_batch(config.change({"batch_sizes": ()}), 3)
    with pytest.raises(ValueError, match="batch_size=6 with source weights .* not whole numbers"):
        Mixture(config.change({"batch_sizes": ((0.5, 6),)}))
    assert "batch_size=64 is more than all 40" in config_file.remark_batch(
        config.change({"batch_sizes": ((0.5, 64),)}), 40
    )


def test_a_source_smaller_than_its_rows_of_a_batch_is_remarked_on(data):
    """Of 23, 17 and 80 examples, 120 in all."""
    config = typed(data[0])

    def remark(largest):
        return Mixture(config.change({"batch_sizes": ((0.5, largest),)})).remark_small()

    assert remark(16) == "" and remark(44) == ""  # 22, 11 and 11 rows
    assert remark(128) == ""  # as all data are fewer
    name = Mixture(config).sources[0].name
    assert remark(48).startswith(
        f"warning: a batch of 48 has 24 rows of source 0, {name}, which has 23 examples: each"
    )
    assert "which has 23 examples and 18 rows of source 1" in remark(72)


def test_sources_that_equal_weights_go_through_unevenly_are_remarked_on(data):
    """Of 23 and 80 examples, half of a batch each: the first comes again 3.5 times as often."""
    config = typed(data[0]).change({"batch_sizes": ()})
    first, _, third = map(dict, data[0].data.sources)

    def remark(steps, **changes):
        pair = first | dict(weight=1.0) | changes, third
        return Mixture(config.change({"data.sources": pair, "steps": steps})).remark_uneven()

    assert remark(1000) == ""  # 348 times and 100
    assert remark(4, limit=4) == ""  # 8 times
    told = remark(5, limit=4)
    assert told.startswith("warning: the run goes through source 0, ")
    assert "(4 examples), 10 times, and through source 1, " in told
    assert "(80 examples), 0.5 times: a weight is a share of the batch" in told
    assert remark(5, limit=4, weight=3.0) == ""  # which somebody chose


@pytest.mark.long
def test_a_run_goes_on_from_any_step(tmp_path, monkeypatch):
    """Stopped at the step where batches grow: the losses and the parameters are those of an
    uninterrupted run; the learning rate is that of the step."""
    config = tiny_config(image_size=16, patch_size=8, bias=False)
    config.model.text.update(vocab_size=320, max_len=12)
    config.data.sources = (dict(builtin="scenes", split="train", kind="caption"),)
    config.data.vocabulary = scenes_words()
    config.batch_sizes, config.batch_size, config.steps = ((0.5, 8),), 16, 6
    config.log.every_steps = 1
    config.loss.captioning_weight = 0.0  # half as much to compile, twice
    config = typed(config)
    train_alone(config, tmp_path / "whole")
    reached = signals.Stop.reached
    monkeypatch.setattr(signals.Stop, "reached", lambda self, step: step == 3)
    with pytest.raises(signals.Preempted, match="step 3 is saved"):
        train_alone(config, tmp_path / "parts")
    monkeypatch.setattr(signals.Stop, "reached", reached)
    train_alone(config, tmp_path / "parts")
    rows, again = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts")
    schedule = optimizer.make_schedule(config.optimizer, 6)
    for step, (a, b) in enumerate(zip(rows, again, strict=True)):
        for name in ("loss", "gradient_norm", "learning_rate", "epoch/0"):
            assert a[name] == b[name], (step, name)
        rate = optimizer.learning_rate(config.optimizer.schedule, schedule, step)
        assert a["learning_rate"] == pytest.approx(float(rate))
    want, got = (manager.load_params(str(tmp_path / n))[0] for n in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert json.loads((tmp_path / "whole/config.json").read_text())["batch_sizes"] == [[0.5, 8]]
    assert "with batch 8, then 16" in (tmp_path / "whole/report.html").read_text()
