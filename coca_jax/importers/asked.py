"""What is asked for of a split, as its manifest keeps it, and whether that is there already, or
begun."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Collection, Iterator
from typing import Any

from coca_jax.data import files
from coca_jax.files import out_folder
from coca_jax.importers import metadata, shards
from coca_jax.importers.items import Options, Unit

_BEGUN = ".unfinished-"  # before the name of a split


class Otherwise(ValueError):
    """`place` holds what was asked for otherwise; why: that, in words, remedy: of `prepare`."""

    def __init__(self, place: str, why: str, remedy: str):
        super().__init__(f"{why}; {remedy}")
        self.place, self.why = place, why


@contextlib.contextmanager
def within(flag: str, folder: str) -> Iterator[None]:
    """Data that were brought into a folder otherwise get the remedy of whoever gave that folder by
    a flag ('--workdir'), not the flags of `prepare`."""
    try:
        yield
    except Otherwise as error:
        raise ValueError(
            f"{flag}={folder}: {error.why.removeprefix('--out=')}; give another {flag}, or remove "
            f"{error.place}"
        ) from None


def request(format: str, input: str, options: Options) -> dict[str, Any]:
    """What is asked for, as JSON has it."""
    found = {"format": format, "input": input, "options": dataclasses.asdict(options)}
    return json.loads(json.dumps(found))


def whole(request: Any) -> dict[str, Any]:
    """A request with the options that were not there when it was written; {} for none."""
    if not isinstance(request, dict) or not isinstance(request.get("options"), dict):
        return {}
    defaults = json.loads(json.dumps(dataclasses.asdict(Options())))
    return request | {"options": defaults | request["options"]}


def is_there(out: str, split: str, request: dict[str, Any]) -> bool:
    """Whether `out` holds a split of this request. Raises ValueError where it is of another."""
    there = metadata.read_manifest(out)["splits"].get(split)
    if there is not None and whole(there.get("request")) != request:
        why = f"--out={out} already holds a split {split!r} made with other options"
        raise Otherwise(out, why, "give --overwrite, or another --out or --split")
    return there is not None


def refuse_held_out(out: str, request: dict[str, Any], written: Collection[str]) -> None:
    """Raises ValueError where images that are held out would be in two splits: `out` has a split
    of the same request but for the holdout. written: the splits that are written now."""
    asked = request["options"]
    for name, split in metadata.read_manifest(out)["splits"].items():
        there = whole(split.get("request"))
        if name in written or not there:
            continue
        held = {key: there["options"][key] for key in ("holdout", "held_out")}
        others = held["held_out"] != asked["held_out"] and held["holdout"] != asked["holdout"]
        if not others or there != request | {"options": asked | held}:
            continue
        if asked["held_out"]:
            raise Otherwise(
                out,
                f"--out={out} holds a split {name!r} of the same input, in which the images that "
                "--holdout keeps apart would be too",
                "give another --out",
            )
        raise Otherwise(
            out,
            f"--out={out} holds a split {name!r} of images held out of the same input, which "
            "would be in both",
            f"give --holdout={held['holdout']}, or another --out",
        )


def refuse_pairs(format: str, input: str, split: str, options: Options) -> None:
    """Raises ValueError for pairs of images, which by the bytes of one image cannot be held out."""
    told = getattr(shards.importer(format), "has_pairs", None)
    if "," in options.image_field or (told and told(input, split)):
        raise ValueError(
            f"--input={input}: --holdout keeps no pairs of images apart, as an image may stand in "
            "several; give them a field 'split', or write each side by --where and --split"
        )


def unfinished(out: str, split: str) -> str:
    """The folder of what is written of a split before it is whole."""
    return files.join(out, f"{_BEGUN}{split}")


def check_folder(out: str) -> None:
    """Raises ValueError for a folder that holds something and was neither written nor begun by an
    import: with its manifest it would count as prepared data."""
    system, plain = files.filesystem(out)
    if not system.isdir(plain) or files.exists(files.join(out, metadata.MANIFEST)):
        return
    names = files.listing(out)
    others = [name for name in names if not files.is_hidden(name)]
    if others and not any(name.startswith(_BEGUN) for name in names):
        raise out_folder.something_else(out, others[0])


def begun(
    input: str, work: str, request: dict[str, Any], state: Callable[[list[Unit]], str]
) -> list[list[Unit]]:
    """The shards that an earlier run began to write in `work`, by their units. Raises ValueError
    where it did so for another request, or of files that have changed since."""
    kept = json.loads(files.read(files.join(work, "plan.json")))
    if whole(kept["request"]) != request:
        why = f"{work} is an unfinished import with other options"
        raise Otherwise(work, why, "give --overwrite, or remove it")
    groups = [[Unit(**unit) for unit in group] for group in kept["groups"]]
    before, now = kept.get("state"), state([unit for group in groups for unit in group])
    if before and now and metadata.have_changed(before, now):
        why = f"{input} has changed since {work} was begun"
        raise Otherwise(work, why, "give --overwrite, or remove that folder")
    return groups
