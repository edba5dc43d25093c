"""Animations whose frames say which they are, for tests of clips."""

import io

import numpy as np
from PIL import Image

RED, BLUE, GREEN, WHITE = (220, 30, 30), (30, 30, 220), (30, 200, 30), (255, 255, 255)


def animation(frames, format="WEBP", **options):
    out = io.BytesIO()
    pictures = [Image.fromarray(frame) for frame in frames]
    if format == "WEBP":
        options |= dict(lossless=True, exact=True)
    pictures[0].save(
        out, format, save_all=True, append_images=pictures[1:], duration=50, loop=0, **options
    )
    return out.getvalue()


def numbered(count, side=16, channels=3):
    """Frames that say which they are: frame i is gray 20 + 10 i, its left half red."""
    frames = np.zeros((count, side, side, channels), np.uint8)
    frames[..., :3] = (20 + 10 * np.arange(count))[:, None, None, None]
    frames[:, :, : side // 2, :3] = RED
    if channels == 4:
        frames[..., 3] = 255
    return frames


def numbers_of(clip):
    """Which frames of `numbered` a clip holds."""
    return ((clip[:, 8, 12, 0].astype(int) - 20 + 5) // 10).tolist()
