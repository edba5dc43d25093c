"""A device that holds other values than its replicas is found and named."""

import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from coca_jax.parallel import sharding
from coca_jax.training.replicas import CompareReplicas, Corrupted


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


def compared(mesh, every):
    """`compare(step, state)` as a run does it that compares so often."""
    faults = types.SimpleNamespace(compare_every_steps=every)
    trainer = types.SimpleNamespace(mesh=mesh, config=types.SimpleNamespace(faults=faults))
    found = CompareReplicas(trainer)

    def compare(step, state, saving=False):
        trainer.state = state
        found.after_step(step, {})
        if saving:
            found.before_save(step)

    return compare


def test_replicas_are_compared_when_due_and_before_a_save(mesh):
    state = state_on(mesh)
    compare, wrong = compared(mesh, 10), state | {"whole": flip(state["whole"], {3})}
    compare(10, state)
    compare(20, jax.tree.map(lambda x: x + 1, state), saving=True)
    compare(21, wrong)  # not due
    compared(mesh, 0)(20, wrong, saving=True)  # never
    for step, saving in ((30, False), (31, True)):
        with pytest.raises(Corrupted):
            compare(step, wrong, saving)


class State(NamedTuple):
    """Whose names are not in the order of the alphabet, as those of a run's state are not."""

    whole: jax.Array
    split: jax.Array


def test_parts_of_one_array_are_not_taken_for_replicas_of_another(mesh):
    arrays = state_on(mesh)
    state = State(arrays["whole"], arrays["split"])
    compared(mesh, 1)(1, state)
    with pytest.raises(Corrupted, match="cpu:3 .process 0. hold.s. other values of whole than the"):
        compared(mesh, 1)(1, state._replace(whole=flip(state.whole, {3})))


@pytest.mark.parametrize("name", ["whole", "split", "step"])
def test_one_bit_on_one_device_names_it(mesh, name):
    state = state_on(mesh)
    found = compared(mesh, 10)
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
        compared(mesh, 10)(30, wrong)
    even = state | {"whole": flip(state["whole"], {0, 1, 2, 3})}
    with pytest.raises(Corrupted) as error:  # nobody can say which half is right
        compared(mesh, 10)(30, even)
    assert all(str(device) in str(error.value) for device in jax.devices()[:8])
