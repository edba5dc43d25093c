"""A device that holds other values than its replicas is found and named."""

import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from coca_jax.parallel import sharding
from coca_jax.runtime.metric_log import TimeBuckets
from coca_jax.training import programs, replicas
from coca_jax.training.recipes import typed
from coca_jax.training.replicas import Corrupted, Replicas, computed_twice


@pytest.fixture
def mesh():
    found = sharding.make_mesh(4, 2, 1, devices=jax.devices()[:8])
    with jax.set_mesh(found):
        yield found


def state_on(mesh):
    rng = np.random.default_rng(0)
    values = dict(
        whole=(rng.normal(size=(4, 6)), P()),
        split=(rng.normal(size=(4, 6)), P(None, "fsdp")),
        step=(np.int32(7), P()),
    )
    return {
        name: jax.device_put(jnp.asarray(x, jnp.int32 if name == "step" else jnp.float32),
                             NamedSharding(mesh, spec))
        for name, (x, spec) in values.items()
    }  # fmt: skip


def flip(array, devices, bit=1):
    """The array with one bit of its first element turned on some devices."""
    parts = []
    for shard in array.addressable_shards:
        data = np.array(shard.data)
        if shard.device.id in devices:
            data.reshape(-1).view(np.uint32)[0] ^= bit
        parts.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def test_replicas_that_agree_are_left_alone(mesh):
    state = state_on(mesh)
    found = Replicas(mesh, 10)
    found(10, state)
    found(20, jax.tree.map(lambda x: x + 1, state))
    assert [found.due(step, False) for step in (9, 10, 11)] == [False, True, False]
    assert found.due(9, True) and not Replicas(mesh, 0).due(9, True)


class State(NamedTuple):
    """Whose names are not in the order of the alphabet, as those of a run's state are not."""

    whole: jax.Array
    split: jax.Array


def test_parts_of_one_array_are_not_taken_for_replicas_of_another(mesh):
    arrays = state_on(mesh)
    state = State(arrays["whole"], arrays["split"])
    Replicas(mesh, 1)(1, state)
    with pytest.raises(Corrupted, match="cpu:3 .process 0. hold.s. other values of whole than the"):
        Replicas(mesh, 1)(1, state._replace(whole=flip(state.whole, {3})))


@pytest.mark.parametrize("name", ["whole", "split", "step"])
def test_one_bit_on_one_device_names_it(mesh, name):
    state = state_on(mesh)
    found = Replicas(mesh, 10)
    found(10, state)
    for device in (0, 5):
        wrong = state | {name: flip(state[name], {device})}
        named = jax.devices()[device]
        with pytest.raises(Corrupted, match="silent data corruption") as error:
            found(20, wrong)
        text = str(error.value)
        assert f"after step 20 {named} (process 0) hold(s) other values of {name} than" in text


def test_several_arrays_and_an_even_split(mesh):
    state = state_on(mesh)
    wrong = state | {"whole": flip(state["whole"], {3}), "split": flip(state["split"], {3})}
    with pytest.raises(Corrupted, match="other values of split and 1 more arrays"):
        Replicas(mesh, 10)(30, wrong)
    even = state | {"whole": flip(state["whole"], {0, 1, 2, 3})}
    with pytest.raises(Corrupted) as error:  # nobody can say which half is right
        Replicas(mesh, 10)(30, even)
    assert all(str(device) in str(error.value) for device in jax.devices()[:8])


class Chip:
    """A device by name."""

    platform = "tpu"

    def __init__(self, kind):
        self.device_kind = kind


def test_only_tpus_compute_twice():
    with pytest.raises(ValueError, match="TPUs alone, and these are cpu devices; .*compare_every"):
        computed_twice(jax.devices()[0])
    pair, one = computed_twice(Chip("TPU v4")), computed_twice(Chip("TPU v5 lite"))
    assert "xla_tpu_sdc_replicate_llo" in one and "xla_tpu_sdc_replicate_llo" not in pair
    assert one["xla_tpu_enable_sdc_checker"] and pair["xla_tpu_enable_sdc_checker"]


@pytest.mark.usefixtures("nothing_kept")
def test_a_step_in_so_many_is_computed_twice(monkeypatch):
    """Which program a step runs, and with what it was compiled."""
    options = []

    def jit(step, *, compiler_options, **_):
        options.append(compiler_options)
        return lambda state, arrays, schedule: (state, {"loss": np.zeros(())})

    monkeypatch.setattr(programs.operations, "compiler_options", lambda *_: {})
    monkeypatch.setattr(programs, "state_shardings", lambda *_: (None, None))
    monkeypatch.setattr(programs, "shared_train_step", lambda *_: None)
    monkeypatch.setattr(replicas, "computed_twice", lambda device: {"twice": True})
    config = tiny_config()
    config.faults.recheck_every_steps = 3
    one = Mesh(np.array(jax.devices()[:1]), ("data",))
    said = []
    run = types.SimpleNamespace(model=None, config=typed(config), mesh=one, steps=9)
    run.buckets, run.say, run.begin = TimeBuckets(), said.append, said.append
    step_fn = programs.Programs(run)
    monkeypatch.setattr(programs.jax, "jit", jit)
    batch = {"tokens": np.zeros((4, 8))}, (8, 8)
    ran = []
    for step in range(1, 8):
        before = len(options)
        step_fn(step, 0, batch)
        ran.append(len(options) - before)
    assert ran == [1, 0, 1, 0, 0, 0, 0]  # compiled once each
    assert ["twice" in given for given in options] == [False, True]
    assert "computes all twice" in said[1]
