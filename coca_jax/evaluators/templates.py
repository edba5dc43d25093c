"""Prompt sets that turn a class name into texts for zero-shot classification."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

PLAIN = ("{}",)

PHOTO = ("a photo of the {}", "a photo of a {}", "{}")

CLIP_7 = (  # the subset that CLIP's authors found to do as well on ImageNet
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)

CLIP = (  # Radford et al. 2021, the 80 prompts for ImageNet
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)

_SETS = {"plain": PLAIN, "photo": PHOTO, "clip7": CLIP_7, "clip": CLIP, "bare": ("{}",)}


def get(name: str) -> tuple[str, ...]:
    """Returns a prompt set by name, or the lines of a text file; each holds '{}' once.

    Raises ValueError for a name that is neither, an empty file, or a line without '{}'.
    """
    if name in _SETS:
        return _SETS[name]
    path = pathlib.Path(name)
    if not path.is_file():
        raise ValueError(f"prompts is {name!r}; use one of {', '.join(_SETS)} or a text file")
    lines = path.read_text(encoding="utf-8").splitlines()
    return check([line.strip() for line in lines if line.strip()])


def check(prompts: Sequence[str]) -> tuple[str, ...]:
    """Returns the prompts as a tuple; ValueError unless there are some and each holds '{}' once."""
    if not prompts:
        raise ValueError("prompts are empty; give at least one, such as 'a photo of a {}'")
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise ValueError(f"prompt {prompt!r} must hold '{{}}' once, where the name goes")
    return tuple(prompts)
