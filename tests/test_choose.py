"""What fit chooses: a pure function, asked about many data sets and machines."""

import ast
import dataclasses
import itertools
import os
import shlex
import types

import numpy as np
import pytest

from coca_jax.apps import fit, fit_choice
from coca_jax.apps.fit import Request
from coca_jax.apps.fit_choice import Facts, Machine
from coca_jax.checkpoints import config_file
from coca_jax.config import Config
from coca_jax.data.mixture import shares
from coca_jax.data.pixels import Pixels
from coca_jax.runtime import machine

LAPTOP = Machine("cpu", 1, 16e9, 1e11, 2, "float32")
TINY = Machine("cpu", 1, 2e9, 2e10, 1, "float32")
EIGHT = Machine("gpu", 8, 80e9, 8 * 4e14, 64, "bfloat16")
CAPTIONS = Facts(
    train=5000,
    test=500,
    captions=5000,
    test_captions=500,
    distinct_captions=4000,
    words=(6, 12, 30),
    distinct_words=3000,
    characters=60,
    width=640,
    height=480,
    tokens=(12, 24, 40),
)
LABELS = Facts(
    train=5000,
    test=500,
    labels=5000,
    test_labels=500,
    classes=("cat", "dog", "horse"),
    largest_class=0.5,
    distinct_words=3,
    characters=9,
    width=640,
    height=480,
    tokens=(8, 9, 9),
)
BOTH = dataclasses.replace(
    CAPTIONS, labels=5000, test_labels=500, classes=("cat", "dog"), largest_class=0.7
)
PLACE = dict(path="data/mine", name="mine_test", vocabulary="data/v.model")


def chosen(facts, machine=LAPTOP, minutes=30.0, seconds=0.5, **keywords):
    size = fit_choice.sizes_for(facts, machine, minutes)[0]
    found = fit_choice.choose(facts, machine, minutes, size, **PLACE, **keywords)
    return fit_choice.with_steps(found, facts, minutes, seconds, 20.0)


def sized(facts, count, **changes):
    fields = ("train", "captions", "labels", "distinct_captions")
    counts = {field: count if getattr(facts, field) else 0 for field in fields}
    return dataclasses.replace(facts, **counts, **changes)


MANY = [
    sized(facts, count, width=side, height=side)
    for facts, count, side in itertools.product(
        (CAPTIONS, LABELS, BOTH), (20, 500, 50_000, 3_000_000), (28, 64, 1024)
    )
]


@pytest.mark.parametrize("machine", [LAPTOP, TINY, EIGHT], ids=["laptop", "tiny", "eight"])
@pytest.mark.parametrize("minutes", [0.5, 30.0, 3000.0])
def test_every_choice_is_a_run_that_can_be(machine, minutes):
    for facts in MANY:
        for seconds in (0.01, 3.0):
            found = chosen(facts, machine, minutes, seconds)
            config = found.config
            config.check()  # among others: warm-up below the steps, sizes that divide
            config_file.check_batch(config, machine.devices)
            assert sum(shares(config.data.sources, config.batch_size)) == config.batch_size
            assert config.steps >= 10 and config.optimizer.warmup_steps < config.steps
            assert config.steps * seconds <= max(60 * minutes, 10 * seconds)
            passes = (config.steps - 10) * config.batch_size / facts.train
            assert passes <= fit_choice.PASSES + 1
            assert config.model.text.vocab_size >= 320
            assert config.checkpoint.every_steps >= 1 <= config.log.every_steps
            assert len(found.why) <= 10 and all(len(line) < 160 for line in found.why)


def test_models_grow_with_data_and_time_and_machine():
    def width(facts, machine, minutes):
        return fit_choice.sizes_for(facts, machine, minutes)[0].width

    many = sized(CAPTIONS, 2_000_000)
    assert width(CAPTIONS, TINY, 5) == width(CAPTIONS, LAPTOP, 30) == 160
    assert width(many, LAPTOP, 30) == 160
    assert width(many, LAPTOP, 6000) > 160  # days
    assert width(many, EIGHT, 300) > width(CAPTIONS, EIGHT, 300) > width(LABELS, TINY, 5) - 1
    assert width(dataclasses.replace(many, width=28, height=28), EIGHT, 300) == 96
    for minutes in (1, 10, 100, 1000, 10_000):
        names = [s.name for s in fit_choice.sizes_for(many, EIGHT, minutes)]
        order = [s.name for s in fit_choice.SIZES]
        assert names == sorted(names, key=order.index, reverse=True) and names[-1] == "small"


def test_models_compute_in_what_the_machine_multiplies_fastest():
    halves = dataclasses.replace(LAPTOP, dtype="bfloat16")
    released = fit_choice.Weights("runs/demo", chosen(CAPTIONS).config.model, 2_000_000, "crop")
    for own, weights in itertools.product((LAPTOP, halves, EIGHT), (None, released)):
        found = chosen(CAPTIONS, own, weights=weights)
        assert found.config.model.dtype == own.dtype
        assert f", {own.dtype}, " in found.why[0]
    one, more = (
        fit_choice.affordable(fit_choice.SIZES[1], CAPTIONS, m, 30) for m in (LAPTOP, halves)
    )
    assert more == pytest.approx(1.5 * one)  # a GPU was measured in bfloat16
    assert fit_choice.step_flops(EIGHT) == fit_choice.EFFICIENCY * EIGHT.flops
    flags = machine.processor().split()
    assert fit_choice.look().dtype == ("bfloat16" if "avx512_bf16" in flags else "float32")


@pytest.mark.parametrize(
    "platform, capability, halves",
    [
        *(("gpu", "7.0", False), ("gpu", "7.5", False), ("gpu", "8.0", True), ("gpu", "9.0", True)),
        *(("gpu", "10.0", True), ("gpu", "gfx90a", True), ("tpu", None, True)),
    ],
)
def test_gpus_from_before_ampere_have_no_products_in_bfloat16(platform, capability, halves):
    device = types.SimpleNamespace(platform=platform)
    if capability:  # a TPU has none
        device.compute_capability = capability
    assert fit_choice.multiplies_bfloat16(device) == halves


def test_pictures_are_not_made_larger_than_they_are():
    for side in (16, 20, 28, 30, 32):
        small = dataclasses.replace(LABELS, width=side, height=side)
        found = chosen(small).config.model
        assert side <= found.image_size < side + 4 and found.image_size % found.patch_size == 0


def test_what_trains_follows_from_what_there_is():
    def kinds(facts):
        config = chosen(facts).config
        return [s.kind for s in config.data.sources], [t["kind"] for t in config.eval.tasks]

    assert kinds(CAPTIONS) == (["caption"], ["retrieval", "captioning"])
    assert kinds(LABELS) == (["label"], ["zero_shot"])
    assert kinds(BOTH) == (["caption", "label"], ["retrieval", "captioning", "zero_shot"])
    # A few stray labels do not make a task, nor does one class.
    assert kinds(dataclasses.replace(BOTH, labels=9))[0] == ["caption"]
    assert kinds(dataclasses.replace(BOTH, classes=("cat",)))[0] == ["caption"]
    # With both, captions are most of the batch.
    weights = [s.weight for s in chosen(BOTH).config.data.sources]
    assert weights[0] == 7 * weights[1]
    # Then the decoder learns from captions only, or it would write "a photo of the ...".
    learned = [chosen(one).config.loss.caption_labels for one in (CAPTIONS, LABELS, BOTH)]
    assert learned == [True, True, False]


def test_the_batch_is_no_larger_than_data_and_time_give():
    def batch(train, minutes=300, machine=LAPTOP):
        return chosen(
            dataclasses.replace(CAPTIONS, train=train), machine, minutes
        ).config.batch_size

    assert [batch(n) for n in (20, 100, 300, 5000)] == [16, 16, 64, 128]
    assert batch(5000, minutes=0.1) == 16
    assert batch(3_000_000, 30, EIGHT) > 128 and batch(20, 30, EIGHT) % 8 == 0


def test_mirrors_only_where_left_may_be_right():
    def flip(facts):
        return chosen(facts).config.data.flip

    assert flip(LABELS) and not flip(CAPTIONS) and not flip(BOTH)
    assert not flip(dataclasses.replace(LABELS, drawn=True))
    assert not flip(dataclasses.replace(LABELS, classes=("b", "d", "p", "q")))


def test_short_texts_do_not_pay_for_long_ones():
    config = chosen(CAPTIONS).config
    assert config.model.text.max_len == 24 and config.text_lengths == (12,)
    assert config.text_parts == 4 and config.batch_size % 4 == 0
    assert chosen(LABELS).config.text_lengths == ()
    long = dataclasses.replace(CAPTIONS, tokens=(100, 400, 900))
    assert chosen(long).config.model.text.max_len == 64


def test_a_step_fits_the_memory_or_says_what_would():
    def bytes_needed(config):
        return 1e9 + 1e8 * config.batch_size / config.accumulate_steps

    config = chosen(CAPTIONS, bytes_needed=bytes_needed).config
    assert (config.accumulate_steps, config.batch_size) == (2, 128)
    assert bytes_needed(config) <= 0.8 * LAPTOP.memory
    assert chosen(CAPTIONS, bytes_needed=lambda c: 1e9).config.accumulate_steps == 1
    with pytest.raises(ValueError, match="GiB even for 4 pictures at a time, and cpu has 14.9 GiB"):
        chosen(CAPTIONS, bytes_needed=lambda config: 1e12)


def test_a_step_fits_the_memory_with_the_user_s_own_values():
    """The choice for these data is a batch of 128, in one part."""

    def least(**own):
        return chosen(
            CAPTIONS,
            bytes_needed=lambda config: 1e9 + 1e8 * config.batch_size / config.accumulate_steps,
            change=lambda config: config.change(own),
        )

    found = least(batch_size=1024)
    assert found.config.change(dict(batch_size=1024)).accumulate_steps == 16
    assert any(line.startswith("memory: 6.9 of 14.9 GiB, the batch in 16") for line in found.why)
    assert least(accumulate_steps=4).config.accumulate_steps == 1  # no need to split it more
    with pytest.raises(ValueError, match="even for 512 pictures .* leave out --config.acc"):
        least(batch_size=1024, accumulate_steps=2)
    with pytest.raises(ValueError, match="even for 125 pictures at a time, .* smaller weights"):
        least(batch_size=125, text_parts=1, text_lengths=())


def test_passes_are_over_the_pictures_that_train():
    """Of 1,000 pictures 900 have a label, and 150 a caption, which is too few to train too."""
    facts = sized(BOTH, 1000)
    facts = fit_choice.training_facts(dataclasses.replace(facts, captions=150, labels=900))
    assert facts.train == 900 and fit_choice.training_facts(sized(BOTH, 1000)).train == 1000
    assert (
        fit_choice.training_facts(dataclasses.replace(facts, train=1000, captions=300)).train
        == 1000
    )
    found = chosen(facts, minutes=3000.0, seconds=0.01)
    passes = found.config.steps * found.config.batch_size / 900
    assert fit_choice.PASSES <= passes < fit_choice.PASSES + 1
    assert "passes over 900 pictures" in found.why[-1]
    one = dataclasses.replace(CAPTIONS, labels=4000, classes=("cat",))
    assert "labels do not train: all are the same" in fit.facts_in_words(one, "x")


def test_cores_are_counted_where_the_system_does_not_say_whose_they_are(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "GROUPS", tmp_path)  # no limits of a container
    assert machine.count() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert fit_choice.look().cores == machine.count() == os.cpu_count()
    config = Config().change({"steps": 1})
    assert Pixels(config).threads == os.cpu_count()


def test_weights_bring_their_model_and_gentle_rates():
    model = chosen(CAPTIONS).config.model.change(dict(image_size=64))
    small = fit_choice.Weights(
        "runs/demo", model, 2_000_000, "crop", vocabulary="runs/demo/v.model"
    )
    config = chosen(CAPTIONS, weights=small).config
    assert config.init_from == "runs/demo" and config.model.image_size == 64
    assert config.data.vocabulary == "runs/demo/v.model" and config.data.resize == "crop"
    assert config.optimizer.learning_rate == 5e-4
    assert config.data.augment == "crop"
    trimming = chosen(CAPTIONS, weights=dataclasses.replace(small, resize="trim")).config
    assert trimming.data.resize == "trim" and trimming.data.augment == "drawing"
    trimming.check()
    assert config.model.text.max_len == model.text.max_len == 24
    short = dataclasses.replace(small, model=model.change({"text.max_len": 12}))
    longer = chosen(CAPTIONS, weights=short)
    assert longer.config.model.text.max_len == 24 and longer.config.text_lengths == (12,)
    assert "weights, which know 12 places; at most 24 a text" in "".join(longer.why)
    brief = chosen(dataclasses.replace(CAPTIONS, tokens=(5, 6, 6)), weights=small)
    assert brief.config.model.text.max_len == 24 and "at most 8 a text" in "".join(brief.why)
    large = dataclasses.replace(small, parameters=150_000_000)
    config = chosen(CAPTIONS, weights=large, seconds=8.0).config
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("adamw", 1e-5)
    config.check()


def test_data_that_cannot_train_say_what_would():
    for facts, message in (
        (
            Facts(train=100, fields=("description", "id")),
            "its other fields are description, id. Name the",
        ),
        (Facts(train=9, captions=9), "can be used: 9, too few .* give 20 at the very least"),
        (Facts(train=1, captions=1), "can be used: 1, too few"),
        (Facts(train=0, left_out=(("bad_utf8", 30),)), "none .* can be used .30 bad_utf8;"),
        (
            Facts(train=0, left_out=(("outside_input", 30),), first_problem="'/a/b.jpg' leads"),
            "30 outside_input; the first: '/a/b.jpg' leads.*--allow_paths=FOLDER",
        ),
        (Facts(train=60, captions=60, distinct_captions=1), "all 60 captions are the same"),
        (Facts(train=99, labels=99, classes=("cat",)), "all labels are 'cat': with one class"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_choice.check_facts(facts)
    few = sized(CAPTIONS, 795)
    asked = Request(folder="/my data/pics", kind="caption", fields={"text_field": "title"})
    line, command, *_ = fit.warnings(few, asked, "runs/mine/")
    assert line.startswith("Few images: 795.") and "for 8.3% of new images" in line
    # The same fit from weights with a name, to paste into a shell.
    assert shlex.split(command) == [
        *("coca-jax", "fit", "/my data/pics:caption", "--workdir=runs/mine-pretrained"),
        *("--init_from=coca_ViT-B-32:laion2b_s13b_b90k", "--text_field=title"),
    ]
    many = sized(CAPTIONS, 20_000)
    assert fit.warnings(many, asked, "w") == []
    assert fit.warnings(few, dataclasses.replace(asked, init_from="runs/a"), "w") == []
    assert (
        "--class_names"
        in fit.warnings(dataclasses.replace(LABELS, classes=("0", "1")), asked, "w")[-1]
    )


@pytest.mark.parametrize("count, held", [(20, 8), (100, 10), (9000, 900), (30_000, 1500)])
def test_a_twentieth_to_a_tenth_is_held_out(count, held):
    places = np.random.default_rng(0).random(count)
    assert (places < fit_choice.holdout(places)).sum() == held
    twins = np.concatenate([places, places[: count // 2]])
    assert (np.unique(twins) < fit_choice.holdout(twins)).sum() == held
    with pytest.raises(ValueError, match=f"all {count:,} pictures are the same one: .* nothing to"):
        fit_choice.holdout(np.full(count, 0.669))


@pytest.mark.parametrize("workdir", ["runs/mine", "my runs/it's", 'a "b" $HOME'])
def test_what_comes_next_can_be_pasted_into_a_shell(workdir):
    head, *lines = fit.next_commands(workdir, f"{workdir}/data")
    caption, evaluate, python = map(shlex.split, lines)
    assert head == "next:"
    assert caption == ["coca-jax", "caption", f"--checkpoint={workdir}", "PICTURE_OR_FOLDER"]
    assert evaluate[2:] == [f"--checkpoint={workdir}", f"--data={workdir}/data"]
    call = ast.parse(python[2]).body[1].value.args[0].func.value
    assert python[:2] == ["python", "-c"] and call.args[0].value == workdir
