"""Where every array lives: the mesh, the table of logical axes, shardings of state and batches.

A mesh has the axes ('data', 'fsdp', 'tensor'). A batch is split over data x fsdp. Parameters are
split over fsdp (ZeRO-3) along one axis and over tensor along heads, MLP width and vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Which processes read which rows of a batch: the same where their devices hold the same shards.


@functools.lru_cache(maxsize=4)  # every batch asks
def of(sharding: NamedSharding, shards: int) -> tuple[int, int]:
    """(which reader of batches this process is, how many readers there are).

    Processes whose devices hold the same shards of a batch, as with parameters split over them
    (mesh.tensor), are one reader: they read the same rows. sharding: of a batch, in so many shards.
    Raises ValueError as `numbers`.
    """
    held: dict[int, set[int]] = {}
    places: Any = sharding.devices_indices_map((shards,))
    for device, (rows,) in places.items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    found = numbers(held)
    return found[jax.process_index()], len(set(found.values()))


def numbers(held: dict[int, set[int]]) -> dict[int, int]:
    """{process: the number of its reader}, readers in the order of their first shards.

    held: the shards of a batch on the devices of each process. Raises ValueError where two
    processes hold some shards in common and not all, or not equally many.
    """
    some, first = next(iter(held)), dict[int, int]()  # first: the first process with each shard
    for process, shards in held.items():
        for other in {first.setdefault(shard, process) for shard in shards} | {some}:
            theirs = held[other]
            if len(theirs) != len(shards) or (theirs & shards and theirs != shards):
                raise ValueError(
                    f"process {other} holds the batch shards {sorted(theirs)} and process "
                    f"{process} {sorted(shards)}: they can read neither the same rows nor an equal "
                    "share each; choose a mesh.tensor that divides the devices of a process or is "
                    "a multiple of them"
                )
    starts = sorted({min(shards) for shards in held.values()})
    return {process: starts.index(min(shards)) for process, shards in held.items()}


MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Every logical name in the code base; a name without a row is an error.
RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "length": None,
    "act_embed": None,
    "act_heads": "tensor",
    "act_mlp": "tensor",
    # parameters
    "layers": None,
    "embed": None,  # or fsdp, see param_spec
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "head_width": None,
    "joint": None,
    "patch": None,
    "kernel_row": None,
    "kernel_column": None,
    "channel": None,
    "position": None,
    "norm": None,
}


def spec(*names: str | None) -> P:
    """Logical axis names -> PartitionSpec. Raises ValueError for a name without a rule."""
    unknown = [name for name in names if name is not None and name not in RULES]
    if unknown:
        raise ValueError(f"no sharding rule for the axis {unknown[0]!r}; add it to RULES")
    return P(*(None if name is None else RULES[name] for name in names))


def with_axes(init: Callable[..., jax.Array], *names: str) -> Callable[..., Any]:
    """An initialiser whose parameter remembers its logical axis names."""
    spec(*names)
    return nn.with_logical_partitioning(init, names, rules=tuple(RULES.items()))


def active_mesh() -> Any:
    """The mesh that arrays are split over here (jax.set_mesh), or None: without one, and inside
    shard_map, where each device already holds its part."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = any(kind == AxisType.Manual for kind in mesh.axis_types)
    return None if manual or not set(MESH_AXES) <= set(mesh.axis_names) else mesh


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins the sharding of an activation; a no-op without an active mesh."""
    if active_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*names))


@dataclasses.dataclass(frozen=True)
class Collectives:
    """Collectives over mesh axes inside `per_device`, or their one-device meaning without any."""

    axes: tuple[str, ...]

    # One axis at a time: the TPU compiler turns a gather over two axes into a sum of zeros.
    def gather(self, x: jax.Array) -> jax.Array:
        """[b, ...] of each device -> [B, ...], the rows of all devices in order."""
        for axis in reversed(self.axes):
            x = jax.lax.all_gather(x, axis, tiled=True)
        return x

    def scatter_sum(self, x: jax.Array) -> jax.Array:
        """[B, ...] of each device -> the sum over devices of its own rows, [b, ...]."""
        for axis in self.axes:
            x = jax.lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)
        return x

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum over devices."""
        return jax.lax.psum(x, self.axes) if self.axes else x

    def max(self, x: jax.Array) -> jax.Array:
        """The maximum over devices."""
        return jax.lax.pmax(x, self.axes) if self.axes else x

    def index(self) -> Any:
        """Which of `size` this device is."""
        return jax.lax.axis_index(self.axes) if self.axes else 0

    def size(self) -> int:
        """Over how many devices."""
        return int(np.prod([jax.lax.axis_size(axis) for axis in self.axes]))


# What an array of `per_device` is: its rows are split as the batch is, its only or its last axis as
# the vocabulary is, or each device has all of it.
PER_DEVICE = {
    "rows": P(BATCH_AXES),
    "vocab": P("tensor"),
    "vocab_columns": P(None, "tensor"),
    "all": P(),
}


def per_device(
    function: Callable[..., Any],
    rows: int,
    inputs: tuple[str | P, ...],
    outputs: tuple[str | P, ...],
    thing: str,
) -> Callable[..., Any]:
    """function(batch collectives, vocabulary collectives, *arrays) run by each device on its part
    (shard_map); directly without a mesh.

    inputs, outputs: names of PER_DEVICE, or specs. Raises ValueError where the batch of `rows`
    things cannot be split evenly.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(BATCH_AXES) <= set(mesh.axis_names):
        return functools.partial(function, Collectives(()), Collectives(()))
    if rows % (parts := batch_parts(mesh)):
        raise ValueError(f"a batch of {rows} {thing} cannot be split over {parts} devices evenly")

    def specs(kinds: tuple[str | P, ...]) -> tuple[P, ...]:
        return tuple(PER_DEVICE[kind] if isinstance(kind, str) else kind for kind in kinds)

    return jax.shard_map(
        functools.partial(function, Collectives(BATCH_AXES), Collectives(("tensor",))),
        mesh=mesh,
        in_specs=specs(inputs),
        out_specs=specs(outputs),
        check_vma=False,
    )


def softmax_layer_gradient(shape: tuple[int, int]) -> tuple[int | None, P]:
    """How the gradient of the softmax layer [D, V] leaves `per_device`: (the axis along which
    fsdp splits it or None, its spec), as its parameter lives (see `param_spec`)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(BATCH_AXES) <= set(mesh.axis_names):
        return None, P()
    width, vocab = shape
    if vocab % (mesh.shape["fsdp"] * mesh.shape["tensor"]) == 0:
        return 1, P(None, ("tensor", "fsdp"))
    if width % mesh.shape["fsdp"] == 0:
        return 0, P("fsdp", "tensor")
    return None, P(None, "tensor")


def sum_softmax_layer(batch: Collectives, x: jax.Array, axis: int | None) -> jax.Array:
    """The sum over the batch's devices of each one's gradient [D, V]; see `softmax_layer_gradient`
    for the axis along which a device keeps its share only."""
    if axis is None:
        return batch.sum(x)
    x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=axis, tiled=True)
    return jax.lax.psum(x, "data")


def make_mesh(data: int, fsdp: int, tensor: int, devices: Any = None) -> Mesh:
    """A mesh over all devices; one size may be -1 (what is left).

    Raises ValueError when the sizes do not multiply to the number of devices.
    """
    sizes = [data, fsdp, tensor]
    count = len(jax.devices()) if devices is None else len(devices)
    if sizes.count(-1) == 1:
        rest = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = count // rest if rest > 0 else 0
    if min(sizes) < 1 or int(np.prod(sizes)) != count:
        raise ValueError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not fit {count} devices; "
            "choose sizes whose product is that (one may be -1)"
        )
    layout = _layout(sizes, jax.devices() if devices is None else devices)
    return Mesh(layout, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _layout(sizes: list[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices [data, fsdp, tensor], neighbours in a mesh being neighbours on a TPU's torus. Of
    several TPU slices, between which there is a network alone, each stays together: 'data' goes
    over them, and what follows it only where it is too small."""
    tpus = [device for device in devices if device.platform == "tpu"]
    left = len({getattr(device, "slice_index", 0) for device in tpus}) or 1
    outer = []
    for size in sizes:
        outer.append(math.gcd(size, left))
        left //= outer[-1]
    # A mesh axis may take a part of a torus axis: fsdp=4 on 8x16x16, which jax.make_mesh refuses.
    if math.prod(outer) == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    inner = [size // over for size, over in zip(sizes, outer)]
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, allow_split_physical_axes=True
    )


def unbox(tree: Any) -> Any:
    """Parameters without their axis names."""
    return jax.tree.map(
        lambda x: cast(Any, x).value if isinstance(x, nn.meta.AxisMetadata) else x,
        tree,
        is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata),
    )


def param_spec(names: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> P:
    """PartitionSpec of one parameter: RULES, and one axis over fsdp.

    That axis is 'vocab', else the first that fsdp divides: the outermost axis in the layouts that
    the TPU compiler picks for the products, so that gathered weights and the gradients that are
    scattered need no copy. Vectors are replicated over fsdp.
    """
    entries = [None if name is None else RULES[name] for name in names]
    if "embed" not in names:
        return spec(*names)
    splittable = ("heads", "mlp", "embed")
    choices = [i for i, name in enumerate(names) if name == "vocab"]
    choices += [i for i, name in enumerate(names) if name in splittable]

    def parts(i: int) -> int:
        own = entries[i]
        return mesh.shape["fsdp"] * (mesh.shape[str(own)] if own else 1)

    fitting = [i for i in choices if shape[i] % parts(i) == 0]
    chosen = fitting[0] if fitting else names.index("embed")
    own = entries[chosen]
    entries[chosen] = (str(own), "fsdp") if own else "fsdp"
    return P(*entries)


def param_specs(boxed: Any, mesh: Mesh) -> Any:
    """PartitionSpec of each parameter in a tree of boxed (abstract) parameters."""

    def one(x: Any) -> P:
        if not isinstance(x, nn.LogicallyPartitioned):
            return P()
        return param_spec(x.names, x.value.shape, mesh)

    return jax.tree.map(one, boxed, is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))


def optimizer_specs(opt_state: Any, params: Any, specs: Any) -> Any:
    """PartitionSpec of each optimizer leaf: its parameter's, less the axes that it averages out.

    A leaf belongs to the parameter whose path its own path ends with. Adafactor's factored
    statistics v_row and v_col lack one of the parameter's two largest axes each.
    """
    by_path = {
        _path(path): (leaf.shape, spec_)
        for (path, leaf), spec_ in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)),
        )
    }

    def one(path: Any, leaf: Any) -> P:
        names = _path(path)
        for start in range(len(names)):
            if names[start:] in by_path:
                return _reduced_spec(leaf.shape, names[:start], *by_path[names[start:]])
        return P()

    return jax.tree_util.tree_map_with_path(one, opt_state)


def _reduced_spec(shape: tuple, prefix: tuple, full: tuple, full_spec: P) -> P:
    if shape == full:
        return full_spec
    if len(full) < 2:
        return P()
    order = np.argsort(full)  # optax reduces the largest axis in v_row, the next in v_col
    dropped = int(order[-1] if "v_row" in prefix else order[-2])
    if shape != full[:dropped] + full[dropped + 1 :]:
        return P()  # a placeholder of a parameter that is not factored
    padded = tuple(full_spec) + (None,) * (len(full) - len(full_spec))
    return P(*(padded[:dropped] + padded[dropped + 1 :]))


def _path(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def shardings(mesh: Mesh, specs: Any) -> Any:
    """PartitionSpecs -> NamedShardings."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda x: isinstance(x, P))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Numpy arrays, the same on every process, as arrays that each device of the mesh has whole."""
    make = functools.partial(jax.make_array_from_callback, sharding=NamedSharding(mesh, P()))
    return jax.tree.map(lambda x: make(np.shape(x), data_callback=lambda _: x), tree)


def check_divisible(mesh: Mesh, abstract: Any, specs: Any) -> None:
    """Raises ValueError naming the first parameter that the mesh cannot split evenly."""

    def one(path: Any, leaf: Any, spec_: P) -> None:
        for size, axis in zip(leaf.shape, tuple(spec_)):
            axes = (axis,) if isinstance(axis, str) else tuple(axis or ())
            parts = int(np.prod([mesh.shape[a] for a in axes]))
            if size % parts:
                raise ValueError(
                    f"parameter {'/'.join(_path(path))} of shape {leaf.shape} cannot be split "
                    f"{parts} ways along its axis of {size} (mesh axis {'x'.join(axes)}); "
                    f"choose a mesh.{axes[0]} that divides it"
                )

    jax.tree_util.tree_map_with_path(one, abstract, specs)


def batch_parts(mesh: Mesh | jax.sharding.AbstractMesh) -> int:
    """Number of parts that the mesh splits a batch into; 1 without a mesh."""
    return math.prod(dict(mesh.shape).get(axis, 1) for axis in BATCH_AXES)


def readers(mesh: Mesh) -> tuple[int, int]:
    """(which reader of batches this process is, how many there are): see `batch_readers.of`."""
    return of(NamedSharding(mesh, spec("batch")), batch_parts(mesh))


def place_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The rows of this reader (see `readers`) -> global arrays split over data x fsdp along the
    first axis."""
    sharding = NamedSharding(mesh, spec("batch"))
    count = readers(mesh)[1]
    return {
        k: jax.make_array_from_process_local_data(sharding, v, (count * len(v), *v.shape[1:]))
        for k, v in batch.items()
    }
