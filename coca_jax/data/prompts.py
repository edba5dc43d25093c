"""Prompt sets: sentences with a hole for a label; for label texts and zero-shot ensembles."""

from __future__ import annotations

import os

import fsspec

PLAIN = ("a photo of the {}",)
BARE = ("{}",)

CLIP = (
    "a photo of the {}",
    "a photo of a {}",
    "a picture of the {}",
    "an image showing a {}",
    "a photograph of one {}",
    "a snapshot of the {}",
    "a close-up of the {}",
    "a close view of a {}",
    "the {} seen from far away",
    "a small {} in the picture",
    "a large {} in the picture",
    "a bright photo of the {}",
    "a dark photo of the {}",
    "a blurry photo of a {}",
    "a sharp photo of a {}",
    "a grainy picture of the {}",
    "a low-quality image of a {}",
    "a high-quality image of the {}",
    "a cropped photo of the {}",
    "a partly hidden {}",
    "a clean photo of the {}",
    "a dirty {}",
    "a nice {}",
    "a strange {}",
    "a black and white photo of the {}",
    "a colourful picture of a {}",
    "a drawing of the {}",
    "a sketch of a {}",
    "a painting of the {}",
    "a rendering of a {}",
    "a cartoon of the {}",
    "an icon of a {}",
    "a toy {}",
    "a plastic {}",
    "a sculpture of a {}",
    "many {} together",
    "here is the {}",
    "this is a {}",
    "there is a {} in the scene",
    "my {}",
    "the {}",
    "{}",
)


def load(name: str) -> tuple[str, ...]:
    """The prompts of a set: 'clip', 'plain', 'bare', or a text file with one a line.

    Raises:
        ValueError: a prompt has not exactly one `{}`, or the set is empty.
        FileNotFoundError: `name` is neither a set nor a file.
    """
    if name in ("clip", "plain", "bare"):
        return dict(clip=CLIP, plain=PLAIN, bare=BARE)[name]
    try:
        with fsspec.open(os.fspath(name), "r", encoding="utf-8") as file:
            lines = tuple(line.strip() for line in file if line.strip())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"data.prompts {name!r}: neither 'clip', 'plain', 'bare' nor a text file"
        ) from None
    for line in lines:
        if line.count("{}") != 1:
            raise ValueError(f"{name}: prompt {line!r} must contain exactly one {{}}")
    if not lines:
        raise ValueError(f"{name}: no prompts in it; write one a line, each with one {{}}")
    return lines
