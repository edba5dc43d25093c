"""A device that holds other values than its replicas is found and named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from coca_jax import partitioning
from coca_jax.training.replicas import Corrupted, Replicas


@pytest.fixture
def mesh():
    found = partitioning.make_mesh(4, 2, 1, devices=jax.devices()[:8])
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
