"""Memory of a step, asked before it is taken: what the compiler counts, refusals, what fits."""

import os

import jax
import pytest
from one_device import train_alone
from test_train import tiny_run

from coca_jax.config import typed
from coca_jax.parallel import sharding
from coca_jax.runtime import cache_folder, device_memory, machine
from coca_jax.training import memory


def small_run(**changes):
    """With one loss: half as much to trace and to compile."""
    config = tiny_run(**changes)
    config.loss.captioning_weight = 0.0
    return config


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def counted(mesh):
    config = typed(small_run())
    return memory.step_bytes(config, mesh), memory.bounds(config, mesh)


def test_the_compiler_s_count_lies_between_the_bounds(counted):
    found, (least, most) = counted
    assert least < found < most
    assert found > 3 * 4 * 20_000  # parameters and the optimizer's two moments, at least


@pytest.mark.parametrize(
    "init_from, optimizer",
    [("weights", dict(image_learning_rate=0.0)), ("", dict(lora_rank=2, name="adamw"))],
)
def test_what_is_frozen_has_no_gradients_and_what_fits_is_taken(
    init_from, optimizer, mesh, monkeypatch
):
    config = small_run(batch_size=2, init_from=init_from)
    config.model.image.update(width=128, mlp_dim=512, depth=4)
    config.optimizer.update(ema=0.0, **optimizer)
    config = typed(config)
    found, (least, most) = memory.step_bytes(config, mesh), memory.bounds(config, mesh)
    assert least < found < most
    monkeypatch.setattr(memory, "cached_bounds", lambda *_: (least, most))
    monkeypatch.setattr(memory, "step_bytes", lambda *_: found)
    monkeypatch.setattr(device_memory, "available", lambda: found)
    memory.check(typed(config), mesh, lambda _: None)


def test_a_step_that_fits_is_not_compiled_for_the_question(mesh, monkeypatch):
    monkeypatch.setattr(memory, "step_bytes", lambda *_: pytest.fail("compiled"))
    said = []
    memory.check(typed(small_run()), mesh, said.append)
    assert said == []


def test_the_bounds_are_traced_once_for_a_config_and_again_for_another(mesh, monkeypatch, tmp_path):
    monkeypatch.setattr(cache_folder, "folder", lambda: tmp_path)
    plain, traced = memory.bounds, []
    monkeypatch.setattr(memory, "bounds", lambda *of: traced.append(of) or plain(*of))
    first = memory.cached_bounds(typed(small_run()), mesh)
    assert first == memory.cached_bounds(typed(small_run()), mesh) and len(traced) == 1
    assert memory.cached_bounds(typed(small_run(batch_size=64)), mesh)[1] > first[1]
    memory.cached_bounds(typed(small_run(text_lengths=(4,), text_parts=2)), mesh)
    assert len(traced) == 3
    (tmp_path / memory.KEPT).write_text('{"damaged": [')
    assert memory.cached_bounds(typed(small_run()), mesh) == first and len(traced) == 4


@pytest.mark.long
def test_what_does_not_fit_is_refused_with_settings_that_do(counted, mesh, monkeypatch):
    """The settings are the compiler's word: the same step in parts, within the room."""
    config, found, plain, asked = typed(small_run(batch_size=64)), counted[0], memory.step_bytes, {}

    def once(config, mesh):  # asked again, the compiler would say the same
        if (key := repr(typed(config))) not in asked:
            asked[key] = plain(config, mesh)
        return asked[key]

    monkeypatch.setattr(memory, "step_bytes", once)
    whole = memory.step_bytes(config, mesh)
    room = (whole + found) // 2
    monkeypatch.setattr(device_memory, "available", lambda: room)
    said = []
    with pytest.raises(ValueError, match="a step of batch_size=64 needs .* GiB") as error:
        memory.check(typed(config), mesh, said.append)
    assert len(said) == 2
    settings = dict(
        part.removeprefix("--config.").split("=")
        for part in str(error.value).split("what fits: ")[1].split()
    )
    config = config.change(
        {
            "remat": settings["remat"],
            "accumulate_steps": int(settings.get("accumulate_steps", 1)),
            "batch_size": int(settings.get("batch_size", 64)),
        }
    )
    assert memory.step_bytes(config, mesh) <= room


@pytest.mark.long
def test_train_refuses_before_it_makes_anything(tmp_path, monkeypatch):
    monkeypatch.setattr(device_memory, "available", lambda: 1000)
    with pytest.raises(ValueError, match="not even the smallest batch fits"):
        train_alone(typed(small_run()), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_was_read_from_files_is_free_in_a_container(tmp_path, monkeypatch):
    devices = jax.local_device_count()
    free = device_memory.available()
    monkeypatch.setattr(machine, "GROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN", tmp_path / "own")
    for name, text in dict(max="8000\n", current="7200\n", stat="anon 900\nfile 7000\n").items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert device_memory.available() == 800 // devices
    (tmp_path / "memory.stat").write_text("anon 900\ninactive_file 6400\n")
    assert device_memory.available() == 7200 // devices
    (tmp_path / "own").write_text("0::/job_7\n")  # as of SLURM, which sees all groups
    (tmp_path / "job_7").mkdir()
    for name, text in dict(max="4000\n", current="3200\n", stat="anon 3200\n").items():
        (tmp_path / f"job_7/memory.{name}").write_text(text)
    assert device_memory.available() == 800 // devices
    (tmp_path / "job_7/memory.max").write_text("max\n")
    assert device_memory.available() == 7200 // devices
    (tmp_path / "memory.max").write_text("max\n")
    assert device_memory.available() > free // 2


def test_a_system_that_does_not_say_what_is_free_gives_all_of_its_memory(tmp_path, monkeypatch):
    """As macOS, which has no /proc."""
    monkeypatch.setattr(device_memory, "MACHINE", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "GROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN", tmp_path / "own")
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert device_memory.available() == whole // jax.local_device_count()
