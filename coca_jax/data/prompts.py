"""Prompt sets: sentences with a hole for a label; for label texts and zero-shot ensembles.

One table for both, so that a name means the same texts in training and in evaluation.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from coca_jax.data.sources import files

BARE = ("{}",)

PLAIN = ("a photo of the {}",)

PHOTO = ("a photo of the {}", "a photo of a {}", "{}")

VARIED = (  # our own, for label texts in training
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

DRAWING = (  # our own, for icons, sketches and cartoons
    "{}",
    "an icon of a {}",
    "an icon of the {}",
    "a drawing of a {}",
    "a drawing of the {}",
    "a simple picture of a {}",
    "a sketch of a {}",
    "a cartoon {}",
    "a small coloured drawing of a {}",
    "a symbol for {}",
)

ACTION = (  # our own, for what people do in videos and pictures
    "{}",
    "somebody {}",
    "a person {}",
    "people {}",
    "a video of {}",
    "a photo of a person {}",
    "a scene of someone {}",
    "an example of {}",
)

SCENE = (  # our own, for places and land seen from above
    "{}",
    "a photo of a {}",
    "a photo taken in a {}",
    "a view of the {}",
    "a wide view of a {}",
    "the {} from above",
    "an aerial photo of a {}",
    "a satellite picture of a {}",
)

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

SETS = {
    "bare": BARE,
    "plain": PLAIN,
    "photo": PHOTO,
    "varied": VARIED,
    "drawing": DRAWING,
    "action": ACTION,
    "scene": SCENE,
    "clip7": CLIP_7,
    "clip": CLIP,
}


def load(name: str) -> tuple[str, ...]:
    """The prompts of a set in SETS, or the lines of a text file (a path or URL).

    Raises ValueError for a name that is neither, an empty file, or a line without one '{}'.
    """
    if name in SETS:
        return SETS[name]
    try:
        lines = read_lines(name)
    except FileNotFoundError:
        known = ", ".join(SETS)
        raise ValueError(f"prompts is {name!r}; use one of {known} or a text file") from None
    return check([line.strip() for line in lines if line.strip()])


def read_lines(path: str, called: str = "") -> list[str]:
    """The lines of a text file, a path or URL, without their ends; called: see `files`."""
    return files.read_lines(os.fspath(path), called)


def check(prompts: Iterable[str]) -> tuple[str, ...]:
    """Returns the prompts as a tuple; ValueError unless there are some and each holds '{}' once."""
    prompts = tuple(prompts)
    if not prompts:
        raise ValueError("prompts are empty; give at least one, such as 'a photo of a {}'")
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise ValueError(f"prompt {prompt!r} must hold '{{}}' once, where the name goes")
    return prompts
