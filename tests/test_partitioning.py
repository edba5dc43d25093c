"""Where arrays live: meshes, parameters, what an optimizer keeps of them, batches; who waits for
other processes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from coca_jax.models import coca
from coca_jax.parallel import sharding
from coca_jax.training.state import state_shardings


def mesh_of(*sizes):
    return sharding.make_mesh(*sizes)


def test_one_size_of_a_mesh_is_what_is_left():
    assert dict(mesh_of(-1, 2, 1).shape) == dict(data=4, fsdp=2, tensor=1)
    assert dict(mesh_of(1, 1, -1).shape) == dict(data=1, fsdp=1, tensor=8)
    one = sharding.make_mesh(-1, 1, 1, devices=jax.devices()[:1])
    assert dict(one.shape) == dict(data=1, fsdp=1, tensor=1)


@pytest.mark.parametrize(
    "sizes", [(2, 2, 1), (16, 1, 1), (-1, 3, 1), (-1, 16, 1), (-1, 0, 1), (-1, -1, 8), (0, 1, 8)]
)
def test_a_mesh_takes_all_devices_and_no_more(sizes):
    with pytest.raises(ValueError, match=f"mesh data={sizes[0]} .* does not fit 8 devices"):
        mesh_of(*sizes)


@dataclasses.dataclass(eq=False)
class Chip:
    """A TPU device as JAX describes it: `coords` begin anew in every slice."""

    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0
    process_index: int = 0


@pytest.mark.parametrize(
    "slices, sizes, blocks",
    [
        (1, (-1, 2, 1), [[0], [0]]),
        (2, (-1, 2, 1), [[0], [1]]),  # two rows of the mesh a slice
        (3, (-1, 4, 1), [[0], [1], [2]]),
        (2, (1, -1, 1), [[0, 1]]),  # fsdp over both
        (4, (2, 8, 1), [[0, 1], [2, 3]]),
    ],
)
def test_slices_of_tpus_stay_whole_in_a_mesh_and_data_goes_over_them_first(slices, sizes, blocks):
    places = [(x, y, 0) for y in range(2) for x in range(2)]
    devices = [Chip(number, place) for number in range(slices) for place in places]
    mesh = sharding.make_mesh(*sizes, devices=devices)
    found = np.vectorize(lambda device: device.slice_index)(mesh.devices)[..., 0]
    assert {device for device in mesh.devices.flat} == set(devices)
    rows, columns = (have // want for have, want in zip(found.shape, np.shape(blocks)))
    np.testing.assert_array_equal(found, np.kron(blocks, np.ones((rows, columns), int)))


@pytest.mark.parametrize(
    "names, shape, axis",
    [
        (("layers", "embed", "heads", "head_width"), (3, 64, 8, 16), 1),
        (("layers", "heads", "head_width", "embed"), (3, 8, 16, 64), 1),
        (("layers", "heads", "head_width", "embed"), (3, 6, 16, 64), 3),  # 6 heads: not by 4
        (("layers", "mlp", "embed"), (3, 256, 64), 1),
        (("layers", "embed", "mlp"), (3, 64, 256), 1),
        (("vocab", "embed"), (1000, 64), 0),
        (("vocab", "embed"), (1001, 64), 1),
        (("position", "embed"), (16, 64), 1),
        (("layers", "heads", "head_width"), (3, 8, 16), None),  # a bias
        (("layers", "norm"), (3, 64), None),
    ],
)
def test_fsdp_splits_the_outermost_axis_that_it_divides(names, shape, axis):
    spec = sharding.param_spec(names, shape, mesh_of(2, 4, 1))
    split = [i for i, x in enumerate(spec) if x is not None and "fsdp" in (x, *x)]
    assert split == ([] if axis is None else [axis])


def test_tensor_splits_heads_mlps_and_vocabularies_and_fsdp_beside_it():
    def found(*names_and_sizes):
        names, shape = zip(*names_and_sizes)
        return sharding.param_spec(names, shape, mesh_of(1, 2, 4))

    assert found(("embed", 64), ("heads", 8), ("head_width", 16)) == P("fsdp", "tensor", None)
    assert found(("heads", 8), ("embed", 64)) == P(("tensor", "fsdp"), None)
    assert found(("heads", 4), ("embed", 64)) == P("tensor", "fsdp")  # 4 heads: not by 8
    assert found(("embed", 64), ("mlp", 64)) == P("fsdp", "tensor")
    assert found(("vocab", 1000), ("embed", 64)) == P(("tensor", "fsdp"), None)
    assert found(("vocab", 1004), ("embed", 64)) == P("tensor", "fsdp")
    with pytest.raises(ValueError, match="no sharding rule for the axis 'head'; add it to RULES"):
        sharding.spec("embed", None, "head")


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_little_of_the_state_is_replicated(name):
    from coca_jax.recipes import coca_large

    config = coca_large.get_config()
    config.optimizer.name = name
    mesh = mesh_of(1, 8, 1)
    abstract, shardings = state_shardings(coca.build(config.model), config, mesh)
    whole = replicated = 0
    for leaf, placed in zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings)):
        size = int(np.prod(leaf.shape)) * leaf.dtype.itemsize
        whole += size
        if placed.is_fully_replicated:
            replicated += size
    assert replicated / whole < 0.005
    if name == "adafactor":
        columns = abstract.opt_state[0].v_col["text_decoder"]["token_embedding"]["value"]
        spec = shardings.opt_state[0].v_col["text_decoder"]["token_embedding"]["value"].spec
        assert columns.shape == (64_000,) and tuple(spec) == (("tensor", "fsdp"),)


def test_statistics_live_where_the_axes_do_that_they_keep():
    """Rows lack the largest axis of a parameter, columns the next; small ones are not factored."""
    shapes = dict(wide=(64, 128), square=(64, 64), small=(16, 128), bias=(64,))
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    specs = dict.fromkeys(shapes, P("fsdp", "tensor")) | dict(bias=P("tensor"))
    rule = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=32), optax.ema(0.9))
    state = jax.eval_shape(rule.init, params)
    found = sharding.optimizer_specs(state, params, specs)
    factored, mean = found[0], found[1].ema
    assert state[0].v_row["wide"].shape == (64,) and state[0].v_col["wide"].shape == (128,)
    assert factored.v_row == dict(wide=P("fsdp"), square=P("fsdp"), small=P(), bias=P())
    assert factored.v_col == dict(wide=P("tensor"), square=P("tensor"), small=P(), bias=P())
    assert factored.v == dict(wide=P(), square=P(), small=specs["small"], bias=P("tensor"))
    assert mean == specs and factored.count == P()


def test_what_cannot_be_split_evenly_is_named():
    def check(size, axes):
        abstract = {"a": {"kernel": jax.ShapeDtypeStruct((size, 3), jnp.float32)}}
        sharding.check_divisible(mesh_of(1, 4, 2), abstract, {"a": {"kernel": P(axes, None)}})

    check(8, "fsdp")
    check(16, ("tensor", "fsdp"))
    check(7, None)
    with pytest.raises(
        ValueError, match=r"parameter a/kernel of shape \(6, 3\) cannot be split 4 "
    ):
        check(6, "fsdp")
    with pytest.raises(ValueError, match="8 ways along its axis of 12 .*tensorxfsdp.; choose a me"):
        check(12, ("tensor", "fsdp"))


def test_batches_are_split_over_data_and_fsdp():
    for sizes, parts in (((2, 4, 1), 8), ((2, 2, 2), 4), ((1, 4, 2), 4), ((1, 1, 8), 1)):
        mesh = mesh_of(*sizes)
        assert sharding.batch_parts(mesh) == parts
        rows = np.arange(32).reshape(16, 2)
        placed = sharding.place_batch(mesh, {"rows": rows})["rows"]
        np.testing.assert_array_equal(placed, rows)
        assert {shard.data.shape for shard in placed.addressable_shards} == {(16 // parts, 2)}


def processes_of(*sizes, devices):
    """{process: its batch shards}, where each has so many devices in a row of a mesh."""
    data, fsdp, tensor = sizes
    held = {}
    for device in range(data * fsdp * tensor):
        held.setdefault(device // devices, set()).add(device // tensor)
    return held


@pytest.mark.parametrize(
    "sizes, devices, numbers",
    [
        ((8, 1, 1), 2, [0, 1, 2, 3]),
        ((2, 2, 2), 2, [0, 1, 2, 3]),  # tensor within a process
        ((2, 2, 2), 1, [0, 0, 1, 1, 2, 2, 3, 3]),  # one process a GPU: pairs of them are a reader
        ((1, 2, 4), 2, [0, 0, 1, 1]),
        ((1, 1, 8), 2, [0, 0, 0, 0]),
        ((3, 1, 6), 3, [0, 0, 1, 1, 2, 2]),
        ((3, 1, 2), 6, [0]),
    ],
)
def test_processes_that_hold_the_same_batch_shards_are_one_reader(sizes, devices, numbers):
    found = sharding.numbers(processes_of(*sizes, devices=devices))
    assert [found[process] for process in range(len(found))] == numbers


def test_readers_stand_in_the_order_of_their_shards_which_may_lie_apart():
    held = {0: {4, 5}, 1: {0, 2}, 2: {1, 3}, 3: {0, 2}}  # as chips in squares are on a torus
    assert sharding.numbers(held) == {0: 2, 1: 0, 2: 1, 3: 0}
    mesh = mesh_of(2, 2, 2)
    assert sharding.readers(mesh) == (0, 1)


@pytest.mark.parametrize(
    "held, message",
    [
        (processes_of(2, 1, 3, devices=2), r"process 0 holds .* \[0\] and process 1 \[0, 1\]"),
        (
            {0: {0, 1}, 1: {1, 2}, 2: {2, 0}},
            r"process 0 .* \[0, 1\] and process 1 \[1, 2\].*tensor",
        ),
        ({0: {0, 1}, 1: {2}}, r"process 0 .* \[0, 1\] and process 1 \[2\]"),  # unequal shares
    ],
)
def test_processes_that_share_a_part_of_their_shards_are_refused(held, message):
    with pytest.raises(ValueError, match=message):
        sharding.numbers(held)


def test_nothing_is_pinned_without_a_mesh_and_where_devices_hold_their_own_part():
    mesh, inside = mesh_of(2, 2, 2), []

    def look(x):
        inside.append(sharding.active_mesh())
        return sharding.constrain(x, "batch", None)

    assert sharding.active_mesh() is None
    with jax.set_mesh(mesh):
        assert dict(sharding.active_mesh().shape) == dict(mesh.shape)
        rows = P(sharding.BATCH_AXES)
        split = jax.shard_map(look, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
        jax.eval_shape(split, jax.ShapeDtypeStruct((16, 2), jnp.float32))
    assert inside == [None]
