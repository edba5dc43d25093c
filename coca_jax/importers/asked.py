"""What is asked for of a split, as its manifest keeps it, and whether that is there already."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from coca_jax.importers import metadata
from coca_jax.importers.items import Options


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
        raise ValueError(f"{why}; give --overwrite, or another --out or --split")
    return there is not None


def refuse_held_out(out: str, request: dict[str, Any]) -> None:
    """Raises ValueError where `out` has images as a split that were held out of those which a
    request, the same but for the holdout, would put beside them."""
    asked = request["options"]
    for name, split in metadata.read_manifest(out)["splits"].items():
        there = whole(split.get("request"))
        held = {key: there["options"][key] for key in ("holdout", "held_out")} if there else {}
        others = held.get("held_out") and held["holdout"] != asked["holdout"]
        if others and not asked["held_out"] and there == request | {"options": asked | held}:
            raise ValueError(
                f"--out={out} holds a split {name!r} of images held out of the same input, which "
                f"would be in both; give --holdout={held['holdout']}, or another --out"
            )
