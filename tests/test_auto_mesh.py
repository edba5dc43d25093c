"""The mesh of a run whose config leaves sizes of it open."""

import jax
import pytest

from coca_jax.config import typed
from coca_jax.training import auto_mesh, recipes

GIB = 2**30


def shape(recipe="coca_large", devices=8, memory=80, **changes):
    config = typed(recipes.load(recipe)).change(changes)
    mesh = auto_mesh.make(config, jax.devices()[:devices], memory * GIB).mesh
    return tuple(mesh.shape.values())


@pytest.mark.parametrize(
    "expected, case",
    [
        ((1, 1, 1), dict(devices=1)),
        ((1, 2, 1), dict(devices=2)),
        ((1, 8, 1), dict()),
        ((2, 4, 1), dict(recipe="coca_base", memory=16)),  # 12 heads
        ((8, 1, 1), dict(recipe="coca_base")),  # a copy takes little of such a GPU
        ((1, 8, 1), dict(recipe="coca_base", memory=1)),  # and does not fit this one
        ((8, 1, 1), dict(recipe="tiny", memory=1)),
        ((2, 1, 4), dict(recipe="tiny", memory=1, batch_size=2)),  # two rows
    ],
)
def test_the_mesh_follows_from_devices_memory_model_and_batch(expected, case):
    assert shape(**case) == expected


@pytest.mark.parametrize(
    "expected, sizes",
    [
        ((4, 2, 1), {"mesh.fsdp": 2}),
        ((4, 1, 2), {"mesh.fsdp": 1, "mesh.tensor": 2}),
        ((2, 4, 1), {"mesh.data": 2}),
        ((1, 2, 4), {"mesh.tensor": 4}),
        ((2, 4, 1), {"mesh.data": 2, "mesh.fsdp": -1}),
    ],
)
def test_explicit_sizes_win(expected, sizes):
    assert shape(**sizes) == expected


def test_sizes_that_do_not_fit_the_devices_are_refused():
    with pytest.raises(ValueError, match="mesh data=-1 fsdp=16 tensor=1 does not fit 8 devices"):
        shape(**{"mesh.fsdp": 16})


def test_a_choice_has_one_line():
    config = typed(recipes.load("coca_large"))
    line = auto_mesh.make(config, jax.devices()[:8], 80 * GIB).reason
    assert line.startswith("mesh: data 1 x fsdp 8 x tensor 1, chosen for 8 devices with 80.0 GiB")
    assert not auto_mesh.make(config, jax.devices()[:1]).reason
