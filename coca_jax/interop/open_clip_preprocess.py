"""open_clip's `preprocess_cfg`, how images come to a model's size and its mean and deviation, to
`data.resize` and numbers and back."""

from __future__ import annotations

import math
from typing import Any

from coca_jax.config import Model
from coca_jax.interop.open_clip_keys import is_number, short

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_RESIZE = {"shortest": "crop", "squash": "squash"}  # resize_mode: data.resize
_INTERPOLATIONS = {  # resize_mode: what is read; the first is what data.resize does
    "shortest": ("bicubic",),
    "squash": ("bilinear", "bicubic", "random"),
}


def read(
    given: Any,
    mode: str = "shortest",
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> dict[str, Any]:
    """dict(resize, mean, std) of a `preprocess_cfg`, None being all defaults: mode, mean and std
    are those of what it leaves out. Images that are squashed may be resized in any way there; here
    it is bilinear.

    Raises:
        ValueError: naming the key whose value has no counterpart here.
    """
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"preprocess_cfg={short(given)}: not a JSON object")
    found: dict[str, Any] = dict(mean=mean, std=std) | (given or {})
    for key, least in (("mean", -math.inf), ("std", 0.0)):
        values = found[key]
        whole = isinstance(values, (list, tuple)) and len(values) == 3
        if not whole or not all(is_number(value) and value > least for value in values):
            above = "" if least else ", above 0"
            raise ValueError(
                f"preprocess_cfg.{key}={short(values)}: give three numbers{above}, of red, green "
                "and blue"
            )
    mode = found.get("resize_mode") or mode
    if mode not in tuple(_RESIZE):  # by equality: a file may say a list
        raise ValueError(f"preprocess_cfg.resize_mode={short(mode)}; 'squash' or 'shortest'")
    how, any_of = found.get("interpolation"), _INTERPOLATIONS[mode]
    if how not in (*any_of, None):
        raise ValueError(
            f"preprocess_cfg.interpolation={short(how)}; of resize_mode={mode!r} only "
            f"{' or '.join(map(repr, any_of))}"
        )
    return dict(resize=_RESIZE[mode], mean=list(found["mean"]), std=list(found["std"]))


def write(model: Model, resize: str) -> dict[str, Any]:
    """The `preprocess_cfg` of a model whose images are resized as data.resize says.

    Raises:
        ValueError: open_clip has no words for that.
    """
    modes = {ours: theirs for theirs, ours in _RESIZE.items()}
    if resize not in modes:
        raise ValueError(
            f"data.resize={resize!r}, for which open_clip has no words: it crops or squashes "
            "images to squares; train with 'crop' or 'squash'"
        )
    return dict(
        mean=list(model.image_mean),
        std=list(model.image_std),
        interpolation=_INTERPOLATIONS[modes[resize]][0],
        resize_mode=modes[resize],
    )
