"""The folder of compiled things: this user's alone, or another one."""

import os
import platform
import re
import stat
import sys
import types

import pytest

from coca_jax.runtime import cache_folder, machine


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """cache_folder.folder with a home and a temporary folder of this test's."""
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cache_folder._first_private.cache_clear()
    yield cache_folder.folder
    cache_folder._first_private.cache_clear()


def _mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_made_for_this_user_alone(folder, tmp_path, monkeypatch):
    old = os.umask(0)
    try:
        found = folder()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
        other = folder()
    finally:
        os.umask(old)
    assert found == tmp_path / "home/.cache/coca_jax" and _mode(found) == 0o700
    assert other == tmp_path / "other/coca_jax" and _mode(other) == 0o700


def test_one_that_others_may_read_is_closed(folder, tmp_path):
    there = tmp_path / "home/.cache/coca_jax"
    there.mkdir(parents=True, mode=0o755)
    there.chmod(0o755)
    assert folder() == there and _mode(there) == 0o700


def test_one_that_others_may_write_is_not_used(folder, tmp_path, caplog):
    there = tmp_path / "home/.cache/coca_jax"
    there.mkdir(parents=True)
    there.chmod(0o775)
    assert folder() == tmp_path / f"tmp/coca_jax-{os.geteuid()}"
    assert f"{there} is not used for compiled programs: others may write it" in caplog.text


def test_a_link_of_one_s_own_is_followed_and_what_it_leads_to_is_looked_at(folder, tmp_path):
    (tmp_path / "home/.cache").mkdir()
    disk = tmp_path / "disk"
    disk.mkdir(mode=0o700)
    (tmp_path / "home/.cache/coca_jax").symlink_to(disk)
    assert os.path.samefile(folder(), disk)
    cache_folder._first_private.cache_clear()
    disk.chmod(0o777)
    assert folder() == tmp_path / f"tmp/coca_jax-{os.geteuid()}"


def test_without_a_home_nothing_is_made_in_the_current_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # no HOME, no entry of the user
    found = folder()
    assert found == tmp_path / f"tmp/coca_jax-{os.geteuid()}" and _mode(found) == 0o700
    assert not list((tmp_path / "home").iterdir())
    found.rmdir()
    found.write_text("somebody's")  # nor is a file in the way an error
    cache_folder._first_private.cache_clear()
    other = folder()
    assert other.parent == tmp_path / "tmp" and other != found and _mode(other) == 0o700
    other.rmdir()


def test_programs_are_kept_where_the_user_says_or_else_below_it(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.cache_folder, "folder", lambda: tmp_path)
    monkeypatch.setattr(machine.os, "environ", environ := {})
    monkeypatch.setitem(sys.modules, "jax", None)  # not imported yet: through the environment
    machine.use()
    place = environ["JAX_COMPILATION_CACHE_DIR"]
    assert re.fullmatch(re.escape(f"{tmp_path}/compiled-") + "[0-9a-f]{8}", place)
    assert environ["JAX_COMPILATION_CACHE_MAX_SIZE"] == str(4 << 30)
    environ.clear()
    environ["JAX_COMPILATION_CACHE_DIR"] = "mine"
    machine.use()
    assert environ == {"JAX_COMPILATION_CACHE_DIR": "mine"}
    environ.clear()
    environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = "1000"
    machine.use()
    assert environ["JAX_COMPILATION_CACHE_DIR"] == place and len(environ) == 3
    assert environ["JAX_COMPILATION_CACHE_MAX_SIZE"] == "1000"
    environ.clear()
    told = {}
    config = types.SimpleNamespace(jax_compilation_cache_dir=None, update=told.__setitem__)
    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(config=config))
    machine.use()
    assert told["jax_compilation_cache_dir"] == place and len(told) == 3
    told.clear()
    environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = "1000"
    machine.use()
    assert told["jax_compilation_cache_dir"] == place and len(told) == 2
    told.clear()
    config.jax_compilation_cache_dir = "mine"
    machine.use()
    assert not told


def test_another_processor_has_another_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.cache_folder, "folder", lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "jax", None)
    places = []
    for flags in ("flags : avx2\n", "flags : avx2 avx512f\n", "model name : x\n"):
        monkeypatch.setattr(machine.os, "environ", environ := {})
        monkeypatch.setattr(machine.pathlib.Path, "read_text", lambda _, text=flags: text)
        machine.use()
        places.append(environ["JAX_COMPILATION_CACHE_DIR"])
    assert len(set(places)) == 3
    # Nor is a program that is split for two cores one for all.
    monkeypatch.setattr(machine, "schedulable", lambda: 1000)
    monkeypatch.setattr(machine.os, "environ", environ := {})
    machine.use()
    assert environ["JAX_COMPILATION_CACHE_DIR"] not in places

    def absent(_):
        raise FileNotFoundError

    monkeypatch.setattr(machine.pathlib.Path, "read_text", absent)  # as on macOS
    assert machine.processor().startswith(platform.machine())
