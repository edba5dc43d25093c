"""One run, one owner: who lives keeps its workdir, who is dead loses it, also in a bucket."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from prepare_cases import write_tar

from coca_jax.runtime import lease, storage

ROOT = pathlib.Path(__file__).parent.parent
HOLD = "from coca_jax.runtime.lease import Lease; import sys, time\n"
HOLD += "Lease(sys.argv[1], beat=0.2).acquire(); print('held', flush=True); time.sleep(60)"


def holder(workdir):
    """Another process that trains in the workdir."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "held\n"
    return process


def taken(workdir, **more):
    found = lease.Lease(str(workdir), say=lambda line: None, **more)
    found.acquire()
    return found


def test_a_live_owner_is_named_and_a_killed_one_loses_the_workdir_at_once(tmp_path):
    """Also one that ended and was not waited for."""
    process = holder(tmp_path)
    with pytest.raises(lease.Held, match=f"in use: process {process.pid} on host .* new --workdir"):
        taken(tmp_path)
    process.send_signal(signal.SIGSTOP)  # it may wake up
    with pytest.raises(lease.Held):
        taken(tmp_path)
    left = (tmp_path / lease.FILE).read_text()
    os.kill(process.pid, signal.SIGKILL)
    while (
        pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    ):
        time.sleep(0.01)
    for waited_for in (False, True):
        if waited_for:
            process.wait()
            (tmp_path / lease.FILE).write_text(left)
        start = time.monotonic()
        mine = taken(tmp_path, beat=30.0)
        assert time.monotonic() - start < 5  # no beats to wait for: four would be two minutes
        assert json.loads((tmp_path / lease.FILE).read_text())["pid"] == os.getpid()
        mine.release()
        assert not (tmp_path / lease.FILE).exists()


def test_an_owner_elsewhere_lives_while_it_beats(tmp_path):
    owner = taken(tmp_path, beat=0.2)
    owner._me["machine"] = "another"
    time.sleep(0.5)
    with pytest.raises(lease.Held):
        taken(tmp_path)
    owner._done.set()  # it dies: no beat, and the file stays
    owner._thread.join()
    second = taken(tmp_path, beat=0.2)
    with pytest.raises(lease.Held):
        owner.check()  # it was only asleep
    owner.release()
    second.check()  # that took nothing from the new owner
    second.release()


def test_leases_of_the_dead_beside_are_looked_at_once_and_those_of_the_living_stay(tmp_path):
    says = dict(use="captions into it", flag="--out")
    names = [f"{share}.{lease.FILE}" for share in ("a", "b")]
    dead, live = (taken(tmp_path / share, beat=0.05, beside=True, **says) for share in "ab")
    for owner in (dead, live):
        owner._me["machine"] = "another"
    time.sleep(0.2)
    dead._done.set()
    with pytest.raises(lease.Held, match="b is in use: process .* captions into it"):
        lease.refuse_held(str(tmp_path), names, **says)
    live.release()
    lease.refuse_held(str(tmp_path), names, **says)
    assert not list(tmp_path.iterdir())


def test_who_was_asleep_and_lost_its_workdir_ends(tmp_path):
    told = threading.Event()
    owner = lease.Lease(str(tmp_path), beat=0.1, lost=lambda line: told.set())
    owner.acquire()
    storage.write_text(tmp_path / lease.FILE, json.dumps(owner._me | {"owner": "new"}))
    assert told.wait(10)
    owner.release()
    assert json.loads((tmp_path / lease.FILE).read_text())["owner"] == "new"


def test_a_lease_that_somebody_deletes_is_written_again_and_not_after_the_end(tmp_path):
    owner, file = taken(tmp_path, beat=0.05), tmp_path / lease.FILE
    for _ in range(2):
        file.unlink()
        end = time.monotonic() + 10
        while not file.exists() and time.monotonic() < end:
            time.sleep(0.01)
        with pytest.raises(lease.Held):
            taken(tmp_path)
    owner.release()
    time.sleep(0.2)
    assert not file.exists() and not owner._thread.is_alive()


def test_what_a_killed_writer_left_is_no_lease(tmp_path):
    for text in ("", '{"pid": 3', "[]", "{}"):
        (tmp_path / lease.FILE).write_text(text)
        mine = taken(tmp_path)
        assert json.loads((tmp_path / lease.FILE).read_text())["pid"] == os.getpid()
        mine.release()


def test_many_that_start_at_once_are_one(tmp_path):
    """Twelve processes' worth of threads, whose leases tell themselves apart by name."""
    won, refused = [], []

    def start():
        try:
            won.append(taken(tmp_path))
        except lease.Held:
            refused.append(1)

    threads = [threading.Thread(target=start) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(refused) == 11
    won[0].release()


def test_a_second_prepare_of_a_split_is_one_line_and_another_split_goes_on(commands, tmp_path):
    write_tar(tmp_path / "a.tar", 3)
    (tmp_path / "out").mkdir()
    prepare = ["prepare", f"--input={tmp_path}/a.tar", f"--out={tmp_path}/out", "--processes=1"]
    owner = lease.Lease(f"{tmp_path}/out/.unfinished-train", beside=True, use="writes it")
    owner.acquire()
    done = commands.run([*prepare, "--overwrite"], tmp_path)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and f"process {os.getpid()} on host" in last
    assert last.startswith(f"error: {tmp_path}/out/.unfinished-train is in use:")
    assert commands.run([*prepare, "--split=other"], tmp_path).returncode == 0
    owner.release()
    assert commands.run(prepare, tmp_path).returncode == 0
    assert not list((tmp_path / "out").glob(".*"))


def test_in_a_bucket_too(s3, monkeypatch):
    monkeypatch.setattr(lease, "SETTLE", 0.1)
    workdir = f"{s3}/leased"
    owner = taken(workdir, beat=0.2)
    with pytest.raises(lease.Held, match=f"process {os.getpid()}"):
        taken(workdir)
    owner.release()
    taken(workdir).release()
    assert not (storage.place(workdir) / lease.FILE).exists()


def test_a_second_train_in_the_workdir_is_one_line_and_status_2(commands, tmp_path):
    owner = taken(tmp_path)
    done = commands.run(["train", "--config=tiny", f"--workdir={tmp_path}"], ROOT, timeout=120)
    owner.release()
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path} is in use: process {os.getpid()}")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "config.json").exists()
