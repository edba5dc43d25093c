"""What a fit keeps in its workdir, so that the same command goes on after a kill: fit.json."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

from coca_jax.data import bounded_json
from coca_jax.files import out_folder, storage

FILE = "fit.json"
RECIPE = "recipe.py"


@dataclasses.dataclass(frozen=True)
class Request:
    """What a fit was asked for.

    Attributes:
        folder: the data, absolute where it is a path here.
        kind: 'caption' or 'label' where only these shall train, '' for what there is.
        minutes: of training.
        init_from: weights to start from, '' for none.
        fields: text_field, label_field, image_field and class_names as they were given.
        overrides: 'key=value' of the config.
        allow_paths: folders and URLs from which rows may name images, in addition to `folder`.
    """

    folder: str
    kind: str = ""
    minutes: float = 30.0
    init_from: str = ""
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    allow_paths: tuple[str, ...] = ()


class Kept:
    """The state of a fit: the request, and facts that were found on the way.

    It is written with the first fact, when the data have been found good: a mistake claims no
    workdir. Until there is a recipe the same data may be asked for otherwise, and what was imported
    is imported again: see `drop_imported`.

    Raises ValueError for a workdir that holds a fit of other data or with a recipe made otherwise,
    or a run or a recipe that is no fit's, or that cannot be written, and for a damaged fit.json.
    """

    def __init__(self, workdir: str, request: Request):
        self._path = pathlib.Path(workdir) / FILE
        wanted = json.loads(json.dumps(dataclasses.asdict(request)))
        self._state: dict[str, Any] = {"request": wanted}
        self._imported: list[str] = []
        self.longer = False  # than the recipe there was chosen for, and nothing else has changed
        if not self._path.exists():
            if (self._path.parent / RECIPE).exists():
                raise ValueError(
                    f"--workdir={workdir} holds a {RECIPE} that fit did not write there; give "
                    f"another, or coca-jax train --config={workdir}/{RECIPE} --workdir=DIR"
                )
            if (self._path.parent / "config.json").exists():
                raise ValueError(
                    f"--workdir={workdir} holds a run that fit did not begin; give another, or go "
                    "on with coca-jax train"
                )
            out_folder.check_run(workdir)
            storage.check_writable(workdir)
            return
        state = _read(self._path)
        there = state["request"]
        if there["folder"] != wanted["folder"]:
            raise ValueError(
                f"--workdir={workdir} holds a fit of {there['folder']}, and this one is of "
                f"{wanted['folder']}; give another --workdir"
            )
        other = [key for key in wanted if there.get(key) != wanted[key]]
        chosen = (self._path.parent / RECIPE).exists()
        self.longer = bool(other) and chosen and _is_longer(there, wanted)
        if other and chosen and not self.longer:
            told = "; ".join(
                f"{key} {there.get(key)!r} there, {wanted[key]!r} here" for key in other
            )
            raise ValueError(
                f"--workdir={workdir} holds a fit of the same data that was asked otherwise "
                f"({told}); give the same flags to go on, or another --workdir"
            )
        self._imported = state.get("imported", [])
        if not other or self.longer:
            self._state = state
            self._imported = []

    def imports(self, path: str) -> None:
        """Notes a folder or file that this fit is about to make, on disk when this returns. One
        that somebody else has made stays theirs."""
        made = self._state.setdefault("imported", [])
        path = os.path.relpath(path, self._path.parent)  # a workdir may be moved or copied
        there = self._path.parent / path
        empty = not there.exists() or (there.is_dir() and not os.listdir(there))
        if path not in made and empty:
            made.append(path)
            self._write()

    def drop_imported(self) -> None:
        """Removes what a fit that was asked otherwise has made here, and nothing else."""
        for path in (self._path.parent / name for name in self._imported):
            if self._path.parent.resolve() not in path.resolve().parents:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self._imported = []

    def get(self, key: str) -> Any:
        """What was kept under a name, else None."""
        return self._state.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keeps a value that JSON can hold, on disk when this returns."""
        self._state[key] = value
        self._write()

    def _write(self) -> None:
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self._state, indent=1) + "\n")
        os.replace(new, self._path)


def _is_longer(there: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a request differs from that of a fit in more minutes or a larger steps=N alone."""
    minutes = (there.get("minutes", 0.0), wanted["minutes"])
    (old, old_steps), (new, new_steps) = map(_without_steps, (there, wanted))
    return old == new and minutes[0] <= minutes[1] and old_steps <= new_steps


def _without_steps(request: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """A request without what says how long it trains, and the N of its steps=N, 0 without."""
    overrides = request.get("overrides", [])
    steps = [int(one.removeprefix("steps=")) for one in overrides if one.startswith("steps=")]
    rest = [one for one in overrides if not one.startswith("steps=")]
    return request | dict(minutes=0, overrides=rest), max(steps, default=0)


def _read(path: pathlib.Path) -> dict[str, Any]:
    """The state in a fit.json. Raises ValueError for a file that holds none."""
    try:
        state = bounded_json.loads(path.read_bytes())
        state["request"]["folder"]
        return state
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} is damaged, or no fit wrote it; restore it, or give another --workdir"
        ) from None
