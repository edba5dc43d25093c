"""The processes of a run: how they join, and the short texts that they tell each other.

The texts go through the store that process 0 keeps for jax, which needs no device and no
collective: a process that waits here hears from one that has failed, and says so.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import urllib.request
from collections.abc import Mapping
from typing import Any

from coca_jax.runtime import activity

# Without a sign of life of another process for so long, a process ends in place of waiting.
PEER_SECONDS = 60
NOTICE_AFTER, NOTICE_EVERY = 30.0, 60.0  # seconds of waiting for others to join
STOPPED, ENDED = "coca_jax/stopped", "coca_jax/ended"  # keys, set by the first that leaves
_BY_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_LOCALID")  # what jax reads of a step

_rounds = itertools.count()  # of `from_first` and `agreed`, which all processes call in one order


class KnownToAll(ValueError):
    """Bad input that every process of the run raises at the same place."""


def keep_gloo_off_standard_output() -> None:
    """Sends what is not Python's own from standard output to nowhere, for the rest of the process.

    Gloo, through which CPU processes speak, prints a line for every connection there.
    """
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def start(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Joins the other processes of this run, before anything touches a device.

    With no arguments it does so only where the environment (Cloud TPU, SLURM, GKE, MPI) describes
    several processes. Of those on CPUs none keeps compiled programs. Raises ValueError when only
    some of the three are given, or when the environment says how many processes there are and not
    which one this is or where they meet.
    """
    import jax

    given = [bool(coordinator), num_processes > 0, process_id >= 0]
    if any(given) and not all(given):
        raise ValueError(
            "--coordinator, --num_processes and --process_id go together: "
            f"got {coordinator!r}, {num_processes}, {process_id}"
        )
    # It would take SIGTERM from now on. A run switches it on where it can save (training/stopping).
    jax.config.update("jax_enable_preemption_service", False)
    options: dict[str, Any] = {"heartbeat_timeout_seconds": PEER_SECONDS}
    if _takes_all_gpus(all(given)):
        options["local_device_ids"] = ()  # no choice among them
    with activity.periodically(_report_wait, NOTICE_AFTER, NOTICE_EVERY):
        if all(given):
            jax.distributed.initialize(coordinator, num_processes, process_id, **options)
        elif _environment_has_processes():
            try:
                jax.distributed.initialize(**options)
            except ValueError as error:  # as of Open MPI 5, which says no place to meet
                raise ValueError(
                    f"the environment says that the run has several processes, and not all that "
                    f"jax needs to join them ({error}); give --coordinator=HOST:PORT, "
                    "--num_processes and --process_id to each"
                ) from None
        else:
            return
    if jax.default_backend() == "cpu":
        # One process would read a program that another compiles, as their keys differ: both do its
        # collectives, but each in an order of its own, and XLA ends them where sizes do not agree.
        jax.config.update("jax_enable_compilation_cache", False)


def _report_wait() -> None:
    """Says which processes are waited for, and where."""
    if (state := _state()).num_processes:
        print(
            f"waiting for {state.num_processes} processes at {state.coordinator_address}, "
            f"this is process {state.process_id}",
            file=sys.stderr,
            flush=True,
        )


def _environment_has_processes() -> bool:
    env = os.environ
    if _number("OMPI_COMM_WORLD_SIZE") > 1 or _number("MEGASCALE_NUM_SLICES") > 1:
        return True
    if _number("SLURM_NTASKS") > 1 and "SLURM_PROCID" in env:
        _check_slurm()
        return True
    if "TPU_WORKER_HOSTNAMES" in env:
        return len([h for h in env["TPU_WORKER_HOSTNAMES"].split(",") if h]) > 1
    return _tpu_vm_workers() > 1


def _takes_all_gpus(coordinated: bool) -> bool:
    """Whether this process has all GPUs that it sees. jax gives a process of SLURM's or MPI's the
    one of its number on the node: of a process that is alone there all others would have nothing
    to do, and one that is let see a single GPU has none of that number.

    told: the user says which process this is. Nobody else has to then, and jax need not look for
    others who might, as Kubernetes.
    """
    env = os.environ
    if "JAX_LOCAL_DEVICE_IDS" in env:  # the user's own choice
        return False
    if _number("OMPI_COMM_WORLD_SIZE") > 1:
        alone = _number("OMPI_COMM_WORLD_LOCAL_SIZE") == 1
    elif all(name in env for name in _BY_SLURM):
        alone = _number("SLURM_NTASKS") == _number("SLURM_STEP_NUM_NODES") > 1
    else:
        return coordinated
    seen = env.get("CUDA_VISIBLE_DEVICES", "")
    return alone or bool(seen and "," not in seen)


def _number(name: str) -> int:
    """A variable of the environment; 0 where it is not set or empty. Raises ValueError for what is
    no number."""
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise ValueError(f"{name}={text} in the environment is no number; set one, or unset it")
    return int(text or 0)


def _check_slurm() -> None:
    """Raises ValueError outside of a step, as in a batch script: SLURM has a process number there
    too, but it starts one process alone."""
    if any(name not in os.environ for name in _BY_SLURM):
        count = _number("SLURM_NTASKS")
        raise ValueError(
            f"SLURM_NTASKS={count} says {count} processes, but SLURM's step variables are missing "
            f"({', '.join(name for name in _BY_SLURM if name not in os.environ)}): start it with "
            "srun, or unset SLURM_NTASKS for one process"
        )
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"):
        _number(name)


def _tpu_vm_workers() -> int:
    """Hosts of the Cloud TPU VM slice that this machine is in, by its metadata server; 0 elsewhere.

    JAX sets TPU_ML_PLATFORM when it is imported on a machine with TPU chips.
    """
    env = os.environ
    if env.get("TPU_ML_PLATFORM") != "JAX" or "TPU_SKIP_MDS_QUERY" in env:
        return 0
    server = env.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return len(answer.read().decode().split(","))
    except OSError:  # a TPU that is not in Google's cloud, or not of a slice
        return 0


def _state() -> Any:
    """What jax knows of the processes; it has no public name for it, nor for the store in it."""
    from jax._src import distributed

    return distributed.global_state


def _look(key: str) -> str:
    try:
        return _state().client.key_value_try_get(key)
    except Exception:  # its own type: nobody has written it, or process 0 does not answer
        return ""


def publish_stopped() -> None:
    """Says to the other processes that this one was asked to stop, and leaves."""
    _state().client.key_value_set(STOPPED, "1", allow_overwrite=True)


def has_stopped() -> bool:
    """Whether a process has said so."""
    return bool(_look(STOPPED))


def publish_ended(line: str) -> None:
    """Says to the other processes with which line this one ends; the first that does so counts."""
    with contextlib.suppress(Exception):
        _state().client.key_value_set(ENDED, f"process {_state().process_id} ended: {line}")


def has_ended() -> str:
    """What the first process that ended said, with its number; '' where all go on."""
    return _look(ENDED)


def from_first(name: str, text: str) -> str:
    """The text of process 0, on every process.

    name: what it is, for the line that says what is waited for. Raises as `agreed`.
    """
    key = f"coca_jax/{next(_rounds)}"
    if _state().process_id == 0:
        _state().client.key_value_set(key, json.dumps(text))
    return _wait(key, name, 0)


def agreed(name: str, line: str) -> str:
    """What the first process has to object, '' where none has: the same on every process, once all
    have come here. line: what this one has to object. name: as of `from_first`.

    Raises KnownToAll where a process ended meanwhile, ValueError where one does not come.
    """
    key, me = f"coca_jax/{next(_rounds)}", _state().process_id
    _state().client.key_value_set(f"{key}/{me}", json.dumps(line))
    if me == 0:
        lines = [_wait(f"{key}/{n}", name, n) for n in range(_state().num_processes)]
        found = next(filter(None, lines), "")
        _state().client.key_value_set(f"{key}/all", json.dumps(found))
    return _wait(f"{key}/all", name, 0)


def gathered(name: str, text: str) -> list[str]:
    """What each process says, in their order, once all have come here; on each of them.

    name: as of `from_first`. Raises as `agreed`.
    """
    key, me = f"coca_jax/{next(_rounds)}", _state().process_id
    _state().client.key_value_set(f"{key}/{me}", json.dumps(text))
    return [_wait(f"{key}/{n}", name, n) for n in range(_state().num_processes)]


def meet(place: str, mine: Mapping[str, str], timeout_ms: int) -> dict[str, str]:
    """What the processes say, each once, as soon as all have come here: {who or what: text}.

    place: a name that no other meeting has; see `forget`. Raises jax.errors.JaxRuntimeError where
    one does not come in time.
    """
    client = _state().client
    for key, text in mine.items():
        client.key_value_set(f"{place}/said/{key}", json.dumps(text), allow_overwrite=True)
    client.wait_at_barrier(f"{place}/come", timeout_ms)
    found = client.key_value_dir_get(f"{place}/said/")
    return {key.rpartition("/said/")[2]: json.loads(text) for key, text in found}


def forget(place: str) -> None:
    """Frees what was said at a meeting, once all have met again: they have read it."""
    if _state().process_id == 0:
        _state().client.key_value_delete(f"{place}/")


def compare(name: str, mine: Mapping[str, str]) -> None:
    """That all processes have the same texts. mine: {what it is: this process's}; name: as of
    `from_first`.

    Raises KnownToAll on all of them, naming the first one that differs from process 0 and in what.
    """
    first = json.loads(from_first(name, json.dumps(mine)))
    if found := agreed(name, difference(first, mine)):
        raise KnownToAll(found)


def difference(first: Mapping[str, str], mine: Mapping[str, str]) -> str:
    """In what this process is not as process 0; '' where in nothing."""
    names = [key for key in first.keys() | mine.keys() if first.get(key) != mine.get(key)]
    if not names:
        return ""
    name, *more = sorted(names)
    shown = ", ".join(more[:3]) + (f" and {len(more) - 3} more" if len(more) > 3 else "")
    also = f" ({shown} too)" if more else ""
    return (
        f"process {_state().process_id} has {name}={mine.get(name, 'none')}, process 0 has "
        f"{first.get(name, 'none')}{also}; start all processes with the same command, recipe and "
        "data"
    )


def _wait(key: str, name: str, process: int) -> str:
    def look() -> str | None:
        with contextlib.suppress(Exception):  # its own type: not there within the second
            return _state().client.blocking_key_value_get(key, 1000)
        if line := has_ended():
            raise KnownToAll(line)
        return None

    return json.loads(activity.until(f"process {process} to compare its {name}", look, pause=0.05))
