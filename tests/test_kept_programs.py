"""A step or a state is kept by what of the configuration it follows from: all that it reads."""

import contextlib
import copy
import dataclasses
import functools

import flax
import jax
import pytest
from conftest import tiny

from coca_jax.config import Config, Section
from coca_jax.config.base import inner
from coca_jax.parallel import sharding
from coca_jax.training import memory, state, train_step
from coca_jax.training.optimizer import make_schedule
from coca_jax.training.programs import abstract_batch

STEPS, LENGTHS = 100, (4, 8)
MODEL = {"model.image.depth": 1, "model.text.unimodal_depth": 1, "model.text.multimodal_depth": 1}
MODEL["model.bias"] = False  # half as many arrays to trace
MODEL |= {"data.sources": (dict(builtin="scenes", kind="label"),)}  # a head's classes are theirs
CASES = {
    "parts": {
        **{"optimizer.l2_to_start": 0.1, "optimizer.ema": 0.9},
        **{"accumulate_steps": 2, "text_parts": 2, "loss.bag_weight": 1.0},
        "loss.hidden_weight": 1.0,
    },
    "global loss": {
        **{"loss.contrastive": "global", "loss.global_examples": 32},
        **{"optimizer.average_share": 0.5, "optimizer.image_learning_rate": 0.0},
    },
    "head": {
        **{
            "head.kind": "classification",
            "head.weight": 1.0,
            "optimizer.encoder_learning_rate": 1e-4,
        },
        **{"optimizer.layer_decay": 0.9, "optimizer.schedule": "wsd", "optimizer.ema": 0.9},
    },
    "frozen with a head": {
        **{"head.kind": "answer", "optimizer.encoder_learning_rate": 0.0},
        "optimizer.name": "muon",  # of few parameters: of many it takes long to trace
        **{"loss.contrastive_weight": 0.0, "loss.captioning_weight": 0.0},
    },
    "lora": {
        **{"optimizer.lora_rank": 2, "optimizer.name": "adamw"},
        "model.pooler.token_dropout": 0.5,
    },
    "captions alone": {
        **{"optimizer.keep_embeddings": True, "model.pooler.kind": "parallel"},
        **{"loss.contrastive_weight": 0.0, "optimizer.name": "adafactor"},
    },
    "a teacher": {
        **{"loss.affinity_weight": 1.0, "loss.imitation_weight": 1.0, "loss.teacher_width": 16},
        **{"loss.contrastive": "sigmoid", "model.image.patch_dropout": 0.5},
    },
}
DRAWING = ("parts", "lora", "a teacher")


def paths(section: type[Section] = Config, prefix: str = "") -> dict[type, str]:
    """Where each section stands in a configuration: {Loss: 'loss.', ...}."""
    found = {section: prefix}
    for field in dataclasses.fields(section):
        if below := inner(section, field.name):
            found |= paths(below, f"{prefix}{field.name}.")
    return found


@contextlib.contextmanager
def reads():
    """The keys that are read inside, by their dotted names."""
    found: set[str] = set()
    places = paths()
    names = {kind: {field.name for field in dataclasses.fields(kind)} for kind in places}

    def read(self, name):
        if name in names.get(type(self), ()) and not inner(type(self), name):
            found.add(places[type(self)] + name)
        return object.__getattribute__(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Section, "__getattribute__", read, raising=False)
        yield found


def otherwise(config: Config, key: str) -> Config:
    """`config` with another value of `key`, of a number the next one; no rule is asked."""
    changed = section = copy.copy(config)
    *groups, last = key.split(".")
    for group in groups:
        object.__setattr__(section, group, copy.copy(getattr(section, group)))
        section = getattr(section, group)
    value = getattr(section, last)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    other = value + 1 if number else OTHER.get(key, "another value")
    if key == "optimizer.average_share" and value:
        other = 0.0  # a program knows whether there is an average; from when on is a number
    object.__setattr__(section, last, other)
    return changed


def built(name: str):
    config = tiny(**MODEL, **CASES[name])
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    return config, mesh, state.build_model(config, mesh, 3 if config.head.kind else 0)


def missing(of, config: Config, reads: set[str]) -> list[str]:
    """The keys that were read and do not tell `of` of two configurations apart."""
    own = of(config)
    return sorted(key for key in reads if of(otherwise(config, key)) == own)


OTHER = {"head.kind": "pair"}  # a batch is asked for of a kind that there is
# A step's arrays are the same whatever these are.
RATES = {"seed", *(f"optimizer.{k}" for k in ("learning_rate", "warmup_steps", "schedule"))}
RATES |= {"optimizer.decay_share"}
SCHEDULED = ("learning_rate", "warmup_steps", "decay_share")  # which a step is given as numbers


def bounds_key(mesh: jax.sharding.Mesh):
    """What the bounds of a step's memory are kept by."""
    return lambda config: memory._key(config, mesh)


@functools.cache
def traced_state(name: str):
    """(an abstract state of a case, the keys that were read for it), for both tests of the case."""
    config, mesh, model = built(name)
    alike = state.of_state(config)
    with jax.set_mesh(mesh), reads() as found:
        abstract, _ = state._shardings.__wrapped__(model, alike, mesh)
        state._draw.__wrapped__(model, alike, mesh).eval_shape(0)
    return abstract, found


@pytest.mark.parametrize("name", CASES)
def test_a_state_is_told_apart_by_every_key_that_it_reads(name):
    config, mesh, _ = built(name)
    found = traced_state(name)[1]
    assert {"optimizer.ema", "optimizer.lora_rank", "loss.contrastive"} <= found
    assert not missing(state.of_state, config, found)
    assert not missing(bounds_key(mesh), config, found - RATES)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.long
def test_a_step_is_told_apart_by_every_key_that_it_reads(name):
    config, mesh, model = built(name)
    alike = train_step.of_step(config)
    abstract = traced_state(name)[0]
    with jax.set_mesh(mesh):
        batch, schedule = abstract_batch(config, mesh), make_schedule(config.optimizer, STEPS)
        with reads() as found:
            function = train_step.make_train_step(model, alike.config, None, LENGTHS)
            program = str(jax.make_jaxpr(function)(abstract, batch, schedule))
    assert train_step.draws(config) == (name in DRAWING) == ("random_bits" in program)
    if not train_step.draws(config):
        found.remove("seed")  # of a key that no number is drawn by
    if config.optimizer.encoder_learning_rate == 0:
        found.remove("optimizer.learning_rate")  # no part of any
    always = {"accumulate_steps", "text_parts", "model.image_size"}
    always |= {"optimizer.schedule", "optimizer.clip_norm", "loss.captioning_weight"}
    assert always <= found
    assert not missing(train_step.of_step, config, found)
    assert not missing(bounds_key(mesh), config, found - RATES)


def test_a_module_that_draws_unknown_to_the_step_is_refused():
    """Its draws would be those of one seed in all runs."""
    config, mesh, _ = built("head")
    model = state.build_model(config.change({"model.image.patch_dropout": 0.5}), mesh, 3)
    with jax.set_mesh(mesh):
        abstract, _ = state.state_shardings(model, config, mesh)
        function = train_step.make_train_step(model, config, None, LENGTHS)
        arguments = abstract_batch(config, mesh), make_schedule(config.optimizer, STEPS)
        with pytest.raises(flax.errors.InvalidRngError, match="patch_dropout"):
            jax.eval_shape(function, abstract, *arguments)


def test_what_neither_reads_does_not_tell_them_apart():
    """So that runs of a process that differ in these share what is traced and compiled."""
    config = tiny()
    for key in ("steps", "batch_size", "init_from", "data.num_threads", "log.every_steps"):
        assert train_step.of_step(otherwise(config, key)) == train_step.of_step(config), key
        assert state.of_state(otherwise(config, key)) == state.of_state(config), key
    for key in ("seed", *(f"optimizer.{key}" for key in SCHEDULED)):
        assert train_step.of_step(otherwise(config, key)) == train_step.of_step(config), key
    for key in ("seed", "optimizer.learning_rate", "optimizer.schedule", "text_parts"):
        assert state.of_state(otherwise(config, key)) == state.of_state(config), key


def test_bounds_are_kept_by_the_module_the_batch_and_the_mesh_too(tmp_path):
    """And not by what no step reads, nor by rates: a run that goes on with others asks no more."""
    config, mesh, _ = built("head")
    for number in (2, 3):
        (tmp_path / str(number)).write_text("".join(f"class {i}\n" for i in range(number)))
    two, three = (config.change({"head.classes": str(tmp_path / n)}) for n in "23")
    kept = bounds_key(mesh)
    others = [two, three, *(otherwise(config, k) for k in ("remat", "batch_size"))]
    keys = [kept(config), *map(kept, others)]
    keys.append(memory._key(config, sharding.make_mesh(1, 2, 1, devices=jax.devices()[:2])))
    keys.append(memory._key(config, sharding.make_mesh(2, 1, 1, devices=jax.devices()[:2])))
    assert len(set(keys)) == 7
    every = ("log.every_steps", "checkpoint.every_steps", "eval.every_steps")
    for key in (*every, "steps", "init_from", "data.num_threads", *RATES):
        assert kept(otherwise(config, key)) == kept(config), key
