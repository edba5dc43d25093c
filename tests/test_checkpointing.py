"""Checkpoints keep what was saved, notice every damage, go back one, and outlive failing saves."""

import collections
import gc
import importlib
import json
import pathlib
import random
import re
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from coca_jax.checkpoints import items, manager, verify
from coca_jax.checkpoints.verify import Damaged, Misfit
from coca_jax.runtime import json_files
from coca_jax.training.state import TrainState

RUN = {"seed": 0, "vocabulary_checksum": "abc"}


def state_of(step, width=8, ema=True):
    rng = np.random.default_rng(step)
    params = {
        "tower": {"kernel": jnp.asarray(rng.normal(size=(16, width)), jnp.float32)},
        "bias": jnp.asarray(rng.normal(size=width), jnp.bfloat16),
    }
    return TrainState(
        step=jnp.int32(step),
        skipped=jnp.int32(1),
        params=params,
        opt_state=({"mu": jax.tree.map(lambda x: x * 2, params)}, jnp.int32(step)),
        ema=jax.tree.map(lambda x: x + 1, params) if ema else None,
    )


def restore(workdir, state=None):
    """(state, step, lines) of the newest step of a run with this state's shapes."""
    state = state_of(0) if state is None else state
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda _: device, state)
    checkpoints = manager.Checkpoints(workdir, run=RUN)
    found = checkpoints.restore_newest(state, places)
    checkpoints.close()
    return found


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the steps 3 and 5."""
    workdir = tmp_path_factory.mktemp("run")
    checkpoints = manager.Checkpoints(str(workdir), run=RUN)
    for step in (3, 5):
        checkpoints.save(step, state_of(step))
        checkpoints.wait_for(step)
    checkpoints.close()
    json_files.write_sealed(workdir / "config.json", RUN)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def test_a_state_comes_back_as_it_was(saved):
    state, step, lines = restore(saved)
    assert step == 5 and lines == []
    assert_equal(state, state_of(5))
    params, config = manager.load_params(str(saved))
    assert_equal(params, state_of(5).ema)
    assert config.seed == 0


def test_checksums_do_not_depend_on_the_mesh_and_see_every_bit():
    x = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(2, 4), ("a", "b"))
    split = jax.device_put(x, NamedSharding(mesh, P("a", "b")))
    one = verify.of_tree({"x": x})
    assert one == verify.of_tree({"x": split})
    compiled = {"x": int(jax.jit(lambda x: verify.sum_of(x, jnp))(split))}
    assert compiled == one
    seen = {one["x"]}
    for bit in range(0, x.nbytes * 8, 61):
        flipped = np.frombuffer(x.tobytes(), np.uint8).copy()
        flipped[bit // 8] ^= 1 << bit % 8
        seen.add(verify.of_tree({"x": flipped.view(np.float32).reshape(x.shape)})["x"])
    assert len(seen) == 1 + len(range(0, x.nbytes * 8, 61))
    assert verify.of_tree({"x": x.T})["x"] not in seen
    assert verify.of_tree({"x": np.roll(x, 1)})["x"] not in seen


@pytest.mark.parametrize("dtype", ["bool", "uint8", "bfloat16", "int32", "float64"])
def test_checksums_of_every_type_agree_with_the_compiled_ones(dtype):
    x = np.random.default_rng(0).integers(0, 2, (5, 3)).astype(jnp.dtype(dtype))
    with jax.enable_x64(True):
        compiled = int(jax.jit(lambda x: verify.sum_of(x, jnp))(jnp.asarray(x)))
        split = jax.device_put(x, NamedSharding(Mesh(np.asarray(jax.devices()[:5]), "a"), P("a")))
    assert verify.of_tree({"x": x, "split": split}) == dict(x=compiled, split=compiled)


def test_a_save_leaves_no_memory_behind(tmp_path):
    """TensorStore keeps the strings of each answer for ever: more than 1,000 blocks in a save."""
    checkpoints = manager.Checkpoints(str(tmp_path), run=RUN)
    counts = []
    for step in range(1, 13):
        checkpoints.save(step, state_of(step))
        checkpoints.wait_for(step)
        if step in (4, 12):  # to collect takes longer than to save
            gc.collect()
            counts.append(sys.getallocatedblocks())
    checkpoints.close()
    assert (counts[1] - counts[0]) / 8 < 200, counts


def test_devices_share_the_writing_of_large_arrays_alone(tmp_path, monkeypatch):
    """A slice is a program of its own: one for each device and array of a MiB a device."""
    plain, cut = jax.lax.slice_in_dim, []

    def counted(x, **how):
        cut.append(x.shape)
        return plain(x, **how)

    monkeypatch.setattr(jax.lax, "slice_in_dim", counted)
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("data",))
    params = {"small": np.ones((64, 64), np.float32), "large": np.ones((2048, 1024), np.float32)}
    params = jax.device_put(params, NamedSharding(mesh, P()))
    checkpoints = manager.Checkpoints(str(tmp_path), run=RUN)
    checkpoints.save(1, state_of(1, ema=False).replace(params=params))
    checkpoints.wait_for(1)
    checkpoints.close()
    assert cut == [(2048, 1024)] * 8
    json_files.write_sealed(tmp_path / "config.json", RUN)
    assert_equal(manager.load_params(str(tmp_path))[0], params)


def test_what_was_freed_in_pieces_is_given_back():
    """64 MiB in blocks of 4 KiB, one in eight of which stays, as saves leave them."""
    manager.give_back()
    kept = [bytearray(4000) for _ in range(16_384)]
    before = resident()
    kept = kept[::8]
    between = resident()
    manager.give_back()
    if not manager._trim():
        pytest.skip("not glibc")
    assert between > before - 8 and resident() < before - 24 and len(kept) == 2048


def resident():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def test_a_folder_is_asked_for_once_and_every_array_gets_what_orbax_says():
    utils = importlib.import_module(manager.MODULE)
    manager.enable()
    build = getattr(utils, manager.SPEC)
    for folder, name in [("/a", "x"), ("/a", "y"), ("/b", "x"), ("/b", None)]:
        assert build(folder, name) == build.__wrapped__(folder, name)
    build("/a", "x")["base"]["path"] = "elsewhere"  # what one caller does to it is not kept
    assert build("/a", "x")["base"]["path"] == build.__wrapped__("/a", "x")["base"]["path"]
    calls = []
    of_array = manager.by_folder(lambda folder, **options: calls.append(folder) or {"f": folder})
    assert [of_array("/a", name)["path"] for name in "xyz"] == ["x", "y", "z"]
    assert calls == ["/a"] and of_array("/b") == {"f": "/b"}


def damage(path, how, rng):
    data = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncate":
        path.write_bytes(data[: rng.randrange(len(data))])
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)


def attack(saved, place, rng):
    """Restores after one random damage: 'as it was' or 'went back'; anything else fails."""
    workdir = pathlib.Path(shutil.copytree(saved, place))
    files = sorted(p for p in (workdir / "checkpoints/5").rglob("*") if p.is_file())
    path, how = rng.choice(files), rng.choice(["flip", "flip", "truncate", "delete", "empty"])
    if not path.stat().st_size:
        return "as it was"
    damage(path, how, rng)
    state, step, lines = restore(workdir)
    assert_equal(state, state_of(step))
    if step == 5:
        assert lines == []
        return "as it was"
    assert step == 3, (path, how)
    assert len(lines) == 2 and "checkpoint 5 is damaged" in lines[0]
    assert "tensorstore" not in lines[0].lower().replace(str(workdir).lower(), "")
    assert lines[1] == "going on from step 3, 2 steps are trained again"
    assert (workdir / "checkpoints/5.damaged").is_dir()
    assert manager.find_step(str(workdir))[1] == 3
    return "went back"


@pytest.mark.parametrize("count", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_no_damage_is_silent_and_none_ends_the_run(saved, tmp_path, count):
    rng = random.Random(count)
    seen = [attack(saved, tmp_path / str(number), rng) for number in range(count)]
    print(collections.Counter(seen))
    assert seen.count("went back") > count / 4


def test_of_several_damaged_steps_each_is_told_and_the_loss_once(workdir):
    checkpoints = manager.Checkpoints(str(workdir), run=RUN)
    checkpoints.save(9, state_of(9))
    checkpoints.wait_for(9)
    checkpoints.close()
    for step in (5, 9):
        for path in (workdir / f"checkpoints/{step}/params").rglob("d/*"):
            path.write_bytes(b"")
    state, step, lines = restore(workdir)
    assert step == 3
    assert_equal(state, state_of(3))
    for number, line in zip((9, 5), lines):
        params = workdir / f"checkpoints/{number}/params"
        says = f"checkpoint {number} is damaged ({params} cannot be read: a file is truncated"
        assert line.startswith(says) and "OUT_OF_RANGE" not in line
    assert lines[2:] == ["going on from step 3, 6 steps are trained again"]


def test_an_error_of_a_library_is_told_without_its_insides():
    inside = ValueError(
        'DATA_LOSS: Error opening "zarr" driver: Error decoding x: CRC [source a.cc]'
    )
    outside = Exception("Encountered error. See full TensorStore details: <bound method pybind11")
    assert items.first_line(outside) == "Exception: Encountered error"
    outside.__cause__ = inside
    assert items.first_line(outside) == "ValueError: DATA_LOSS: Error decoding x: CRC"
    assert items.first_line(OSError(28, "No space left")) == "the disk is full"
    exhausted = (
        'RESOURCE_EXHAUSTED: Error writing "a/0" in OCDBT database at local file "/x/": Fail'
    )
    outside.__cause__ = ValueError(exhausted)
    assert items.first_line(outside) == "the disk is full"
    assert items.first_line(ValueError("RESOURCE_EXHAUSTED: Out of memory")) != "the disk is full"
    assert items.first_line(RuntimeError()) == "RuntimeError"


def test_load_goes_back_too_but_never_from_a_step_that_was_named(workdir, caplog):
    largest = max((workdir / "checkpoints/5/ema").rglob("*"), key=lambda p: p.stat().st_size)
    for path in (workdir / "checkpoints/5/ema").rglob("d/*"):
        path.write_bytes(b"")
    assert largest.exists()
    params, _, step = manager.load_step(str(workdir))
    assert_equal((params, step), (state_of(3).ema, 3))
    assert "checkpoint 5 is damaged" in caplog.text
    assert (workdir / "checkpoints/5").is_dir()  # who only reads renames nothing
    with pytest.raises(Damaged, match="checkpoints/5/ema"):
        manager.load_params(str(workdir / "checkpoints/5"))


def test_a_folder_whose_name_is_no_number_is_no_step(workdir):
    (workdir / "checkpoints/²").mkdir()  # a digit to Python, and no number
    assert manager.find_steps(str(workdir))[1] == [5, 3]


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(workdir):
    for step in (3, 5):
        shutil.rmtree(workdir / f"checkpoints/{step}/params")
    with pytest.raises(Damaged, match="every checkpoint of .* is damaged") as error:
        restore(workdir)
    assert "new workdir" not in str(error.value)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["3", "5"]


def test_another_model_is_told_apart_from_damage(workdir):
    with pytest.raises(Misfit, match=r"params/bias: bfloat16\[8\] there, bfloat16\[9\] here"):
        restore(workdir, state_of(0, width=9))
    with pytest.raises(Misfit, match="ema/bias: missing there"):
        checkpoints = manager.Checkpoints(str(workdir / "other"), run=RUN)
        checkpoints.save(1, state_of(1, ema=False))
        checkpoints.wait_for(1)
        restore(workdir / "other")
    assert (workdir / "checkpoints/5").is_dir()


def test_a_newer_format_asks_for_an_update(workdir):
    file = workdir / "checkpoints/5/record/metadata"
    record = json_files.read_sealed(file)
    file.write_text(json.dumps(json_files.seal(record | {"format": verify.FORMAT + 1})))
    with pytest.raises(Misfit, match="update coca_jax"):
        restore(workdir)


def test_a_damaged_config_is_read_from_the_newest_checkpoint(workdir, caplog):
    config = workdir / "config.json"
    config.write_text(config.read_text().replace('"seed": 0', '"seed": 1'))
    assert manager.read_config(str(workdir)).seed == 0
    assert "is damaged, or was changed by hand" in caplog.text
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(ValueError, match="config.json is damaged"):
        manager.read_config(str(workdir))


def test_a_save_that_fails_leaves_the_earlier_ones_and_the_next_succeeds(workdir):
    checkpoints = manager.Checkpoints(str(workdir), run=RUN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # a disk with 100 bytes left
    try:
        with pytest.raises(manager.SaveFailed):
            checkpoints.save(7, state_of(7))
            checkpoints.wait_for(7)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.steps() == [3, 5]
    checkpoints.save(8, state_of(8))
    checkpoints.wait_for(8)
    checkpoints.close()
    state, step, _ = restore(workdir)
    assert step == 8
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["3", "5", "8"]
    assert_equal(state, state_of(8))


FULL_DISK = """
import resource, signal, sys
import jax.numpy as jnp
from coca_jax.checkpoints import manager
from coca_jax.cli import main

class State:
    def items(self):
        return {"params": {str(n): jnp.arange(100_000.0) + n for n in range(40)}}

main.set_up_logging()
checkpoints = manager.Checkpoints(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
try:
    checkpoints.save(1, State())
    checkpoints.wait_for(1)
except manager.SaveFailed as error:
    print(error)
"""


def test_a_save_on_a_full_disk_is_one_line(tmp_path):
    """Orbax logs some 500 lines of tracebacks."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert re.fullmatch("could not [^\n]*\n", done.stdout), done.stdout + done.stderr
    assert done.stderr == ""


def test_what_a_killed_save_left_is_removed(workdir):
    left = workdir / "checkpoints/7.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints/5", left)
    assert restore(workdir)[1] == 5
    assert not left.exists()


def test_a_save_that_cannot_begin_is_told_and_later_steps_can_be_dropped(workdir, monkeypatch):
    checkpoints = manager.Checkpoints(str(workdir), run=RUN)
    with pytest.raises(manager.SaveFailed, match="could not save step 9"):
        checkpoints.wait_for(9)  # which nobody began

    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(manager.SaveFailed, match="step 7: OSError: disk full"):
        checkpoints.save(7, state_of(7))
    checkpoints.save(7, state_of(7))
    checkpoints.wait_for(7)
    assert checkpoints.steps() == [3, 5, 7]
    for step in (6, 5):
        checkpoints.drop_after(step)
        assert checkpoints.steps() == [3, 5]
    checkpoints.close()


def test_a_step_may_be_damaged_twice(workdir):
    """Its numbers, which are others than the record says; each damaged one is kept."""
    for name in ("5.damaged", "5.damaged2"):
        file = workdir / "checkpoints/5/record/metadata"
        record = json_files.read_sealed(file)
        record["items"]["params"]["bias"][1] ^= 1
        file.write_text(json.dumps(json_files.seal(record)))
        _, step, lines = restore(workdir)
        assert step == 3 and "params/bias holds other values than were saved" in lines[0]
        assert lines[1] == "going on from step 3, 2 steps are trained again"
        assert (workdir / "checkpoints" / name).is_dir()
        checkpoints = manager.Checkpoints(str(workdir), run=RUN)
        checkpoints.save(5, state_of(5))
        checkpoints.wait_for(5)
        checkpoints.close()


def test_a_record_that_is_not_whole_is_damage(workdir):
    folder = epath.Path(workdir / "checkpoints/5")
    file = workdir / "checkpoints/5/record/metadata"
    text = file.read_text()
    assert verify.read_record(folder)["config"] == RUN
    for bad in (
        "{",
        text.replace(json_files.SEAL_KEY, "sha256_of_the_rset"),
        text.replace("abc", ""),
    ):
        assert bad != text
        file.write_text(bad)
        with pytest.raises(Damaged, match="metadata is damaged"):
            verify.read_record(folder)
    shutil.rmtree(file.parent)
    with pytest.raises(Damaged, match="record/metadata is missing"):
        verify.read_record(folder)


@pytest.mark.parametrize(
    "error, damage",
    [
        (FileNotFoundError("d/0"), True),
        (NotADirectoryError("d"), True),
        (ValueError("DATA_LOSS: checksum mismatch"), True),
        (OSError(5, "Input/output error"), False),
        (MemoryError(), False),
        (ValueError("UNAVAILABLE: connection refused"), False),
    ],
)
def test_what_storage_says_of_itself_is_no_damage(error, damage):
    assert verify.is_damage(error) == damage
