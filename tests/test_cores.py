"""How many cores a process may keep busy: those it may run on, and its container's limit."""

import pytest

from coca_jax.runtime import machine


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Of eight cores, with these files of groups of processes."""

    def make(files, own="0::/"):
        monkeypatch.setattr(machine, "schedulable", lambda: 8)
        monkeypatch.setattr(machine, "GROUPS", tmp_path / "groups")
        monkeypatch.setattr(machine, "OWN", tmp_path / "own")
        (tmp_path / "own").write_text(f"{own}\n")
        for name, text in files.items():
            file = tmp_path / "groups" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")

    return make


@pytest.mark.parametrize(
    "files, count",
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "400000 100000"}, 4),
        ({"cpu.max": "150000 100000"}, 2),  # a core and a half
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu.max": "6400000 100000"}, 8),
        ({"cpu.max": "what"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_a_container_s_limit_counts(files, count, system):
    system(files)
    assert machine.count() == count


def test_the_smallest_limit_of_the_groups_around_a_process_counts(system):
    """Of a job of SLURM or a service, which see the groups of the whole machine."""
    job = "job_7/step_0"
    system({"job_7/cpu.max": "200000 100000", f"{job}/cpu.max": "max 100000"}, own=f"0::/{job}")
    assert machine.count() == 2


def test_a_system_without_groups_has_its_cores(system, tmp_path):
    system({})
    (tmp_path / "own").unlink()
    assert machine.count() == 8
