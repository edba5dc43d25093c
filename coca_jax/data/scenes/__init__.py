"""The embedded data set: drawn scenes with noisy alt-text or label names, nothing to download.

A record is a function of (split, index) alone: the same on every machine, host and resume. Scenes
hold one to four objects; an object has a shape, a colour, a size, a texture and a place. Eight of
the 64 colour+shape pairs and a few spatial relations never occur in the splits `train` and `test`,
in no image, caption or label; every scene of the split `heldout` shows at least one of them, so
scores there measure composition, not recall. Behind the objects lies one of four plain backgrounds;
`scenery` has others, and some that are kept for evaluation (see scenery.py).

Only numpy is needed. Drawing costs about 0.1 ms a scene: shapes are rasterised once, with
anti-aliasing, and blended into the image.
"""

from coca_jax.data.scenes.drawing import SCENERY, UNSEEN_HUES
from coca_jax.data.scenes.language import (
    canonical_caption,
    full_caption,
    label_names,
    noisy_caption,
)
from coca_jax.data.scenes.scoring import (
    described_attributes,
    parse_caption,
    score_caption,
    true_attributes,
)
from coca_jax.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    HELDOUT_PAIRS,
    PLACES,
    SHAPES,
    SIZES,
    SPLIT_SIZES,
    TEXTURES,
    class_names,
    has_heldout,
)

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "HELDOUT_PAIRS",
    "PLACES",
    "SCENERY",
    "SHAPES",
    "SIZES",
    "SPLIT_SIZES",
    "TEXTURES",
    "UNSEEN_HUES",
    "canonical_caption",
    "class_names",
    "described_attributes",
    "full_caption",
    "has_heldout",
    "label_names",
    "noisy_caption",
    "parse_caption",
    "score_caption",
    "true_attributes",
]
