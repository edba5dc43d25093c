"""What a run left behind, read for its report."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from etils import epath

from coca_jax import config as typed
from coca_jax import metrics
from coca_jax.data import bounded_json, files
from coca_jax.evaluators import history, results
from coca_jax.files import out_folder, sealed_json, storage
from coca_jax.report.logged import Logged
from coca_jax.training import goodput

_MAX_BYTES = 1 << 30  # of one of these files; those with pictures are the largest


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """A run's files, empty where they are missing.

    logged: of metrics.jsonl; evaluations: dict(step, scores) each; scores: of the last evaluation;
    goodput: as training/goodput.py keeps it over restarts; blend: what `blend` scored; steps: after
    which a task ('retrieval/x') was scored.
    """

    folder: epath.Path
    config: dict[str, Any]
    logged: Logged
    evaluations: list[dict[str, Any]]
    scores: dict[str, Any]
    examples: dict[str, Any]
    goodput: dict[str, Any]
    blend: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: dict[str, int] = dataclasses.field(default_factory=dict)
    parents: int = 0

    @property
    def name(self) -> str:
        """Of its folder, with so many above it."""
        return "/".join(self.folder.parts[-1 - self.parents :])

    @property
    def last_step(self) -> int:
        """The last one that is logged or evaluated; 0 where nothing says."""
        if self.logged:
            return int(self.logged.last["step"])
        return int(self.scores.get("step") or 0)


def read_several(workdirs: Sequence[str | os.PathLike[str]]) -> list[RunFiles]:
    """As `read`, with as many folders in each name as tell all of them apart. Raises ValueError for
    a run that is given twice as well."""
    given = set()
    for workdir in workdirs:
        place = files.real(os.fspath(workdir))
        if place in given:
            raise ValueError(f"workdir {workdir} is given twice; give each run once")
        given.add(place)
    runs = [read(workdir) for workdir in workdirs]
    most = max(len(run.folder.parts) for run in runs)
    for parents in range(most):
        runs = [dataclasses.replace(run, parents=parents) for run in runs]
        if len({run.name for run in runs}) == len({str(run.folder) for run in runs}):
            break
    return runs


def read(workdir: str | os.PathLike[str]) -> RunFiles:
    """Raises FileNotFoundError when there is no such folder, ValueError when it holds neither
    metrics nor evaluations."""
    folder = storage.place(workdir)
    if not folder.is_dir():
        raise FileNotFoundError(f"workdir {str(folder)!r} is not a folder; give that of a run")
    config = _read_json(folder / "config.json")
    config.pop(sealed_json.KEY, None)  # of the file, and no key of the run
    if config:  # for its types; what is not said stays unsaid
        typed.read(typed.StoredConfig, config, f"{folder / 'config.json'}: config", old=True)
    evaluations = [row for row in history.read(folder) if isinstance(row.get("scores"), dict)]
    found = RunFiles(
        folder=folder,
        config=config,
        logged=Logged.of(_numbers(metrics.rows(folder))),
        evaluations=[row | dict(scores=_scores(row["scores"])) for row in _numbers(evaluations)],
        scores=_scores(_read_json(folder / "eval.json")),
        examples=_read_json(folder / "eval_examples.json"),
        steps=_steps(_read_json(folder / results.STEPS)),
        goodput=_goodput(folder / goodput.FILE),
        blend=_read_json(folder / "blend.json"),
    )
    if not found.logged and not found.scores:
        if (folder / out_folder.PLAN).exists():
            raise ValueError(
                f"{workdir} is the folder of an ablation: its page is {folder / 'report.html'}; "
                f"a run of it is {folder}/VARIANT/seedN"
            )
        raise ValueError(f"workdir {str(folder)!r} holds no metrics.jsonl or eval.json: run train")
    return found


def _read_json(path: epath.Path) -> dict[str, Any]:
    """Raises ValueError where the file is there and no JSON object."""
    try:
        return bounded_json.parse(path.read_bytes(), _MAX_BYTES) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _steps(found: dict[str, Any]) -> dict[str, int]:
    """Those that are steps."""
    return {task: step for task, step in found.items() if isinstance(step, int)}


def _goodput(path: epath.Path) -> dict[str, Any]:
    """{} for a file that is not whole, as training takes it."""
    found = _read_json(path)
    try:
        if found:
            goodput.fold(found, found["life"]["step"], 0.0)
            int(found["starts"])
        return found
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError):
        return {}


def _numbers(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows whose step is one, in order of steps; of a damaged one nothing is told."""
    for row in rows:
        step = row.get("step")
        if isinstance(step, int) and _plain(step) and step >= 0:
            yield {k: v for k, v in row.items() if _plain(v) or k == "scores"}


def _scores(scores: dict[str, Any]) -> dict[str, Any]:
    """Those that are numbers or None, and the step."""
    return {name: value for name, value in scores.items() if _plain(value)}


def _plain(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value is None or (number and abs(value) < 1e300)
