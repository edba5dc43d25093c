"""Images, animations and videos, read as training, import, evaluation and captioning read them."""

from __future__ import annotations

import hashlib
import io
import pathlib
import random
from collections.abc import Callable

import mutate
import numpy as np
from PIL import Image

from coca_jax.config import typed
from coca_jax.data import images, quarantine, videos
from coca_jax.data.pixels import Pixels
from coca_jax.data.sources.items import Item, Options
from coca_jax.data.sources.records import Record
from coca_jax.data.texts import Draw
from coca_jax.recipes import base
from kinds import Kind, encoded, pixels

OPTIONS = Options(max_image_bytes=8 << 20)


def still_seeds() -> list[bytes]:
    """One or more of every format that is read."""
    picture = Image.fromarray(pixels())
    alpha = pixels(2, channels=4)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a title"
    found = [
        encoded("JPEG"),
        encoded("JPEG", progressive=True, quality=60),
        encoded("JPEG", exif=exif.tobytes()),
        encoded("PNG"),
        encoded("PNG", alpha),
        encoded("PNG", exif=exif.tobytes()),
        encoded("WEBP"),
        encoded("WEBP", alpha, lossless=True),
        encoded("GIF"),
        encoded("BMP"),
        encoded("TIFF"),
        encoded("TIFF", compression="tiff_lzw"),
        encoded("TIFF", compression="tiff_adobe_deflate"),
        encoded("TIFF", compression="jpeg"),
        encoded("PPM"),
        encoded("AVIF"),
        images.encode_bmp(pixels()),
    ]
    for mode, format in (("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("I;16", "PNG"),
                         ("1", "PNG"), ("LA", "PNG"), ("P", "BMP"), ("1", "BMP"), ("F", "TIFF"),
                         ("1", "TIFF"), ("CMYK", "TIFF"), ("L", "PPM")):  # fmt: skip
        out = io.BytesIO()
        (picture.convert("L") if mode in ("I;16", "F") else picture).convert(mode).save(out, format)
        found.append(out.getvalue())
    return found


def animation_seeds() -> list[bytes]:
    """Several frames in each format that has them."""
    frames = [Image.fromarray(pixels(seed)) for seed in range(5)]
    clear = [Image.fromarray(pixels(seed, channels=4)) for seed in range(4)]
    found = []
    for format, one, options in (
        ("GIF", frames, {}), ("GIF", clear, dict(disposal=2)), ("PNG", frames, {}),
        ("PNG", clear, dict(default_image=True)), ("WEBP", frames, {}),
        ("WEBP", clear, dict(lossless=True)), ("AVIF", frames, {}), ("TIFF", frames, {}),
        ("MPO", frames, {}),
    ):  # fmt: skip
        out = io.BytesIO()
        one[0].save(out, format, save_all=True, append_images=one[1:], **options)
        found.append(out.getvalue())
    return found


def video_seeds() -> list[bytes]:
    """A few frames in the usual containers and codecs."""
    import av

    found = []
    for format, codec in (("mp4", "h264"), ("mp4", "mpeg4"), ("matroska", "h264"), ("webm", "vp9"),
                          ("webm", "vp8"), ("avi", "mpeg4"), ("avi", "mjpeg"), ("mpegts", "h264"),
                          ("mov", "png"), ("flv", "flv"), ("matroska", "ffv1")):  # fmt: skip
        out = io.BytesIO()
        try:
            with av.open(out, "w", format=format) as container:
                stream = container.add_stream(codec, rate=8)
                stream.width, stream.height = 32, 32
                stream.pix_fmt = dict(mjpeg="yuvj420p", png="rgb24").get(codec, "yuv420p")
                for seed in range(6):
                    frame = av.VideoFrame.from_ndarray(pixels(seed, 32, 32), format="rgb24")
                    container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
                container.mux(stream.encode())
        except (av.FFmpegError, ValueError):  # a codec that this build cannot write
            continue
        found.append(out.getvalue())
    return found


def damage(rng: random.Random, seed: bytes) -> bytes:
    """Bytes at random; of a PNG at times inside its chunks."""
    if seed[:4] == b"\x89PNG" and rng.random() < 0.6:
        return mutate.png(rng, seed)
    return mutate.data(rng, seed)


def _pixels(frames: int) -> Pixels:
    config = base.get_config()
    config.model.image_size, config.model.patch_size = 16, 8
    config.data.num_threads = 1
    config.data.num_frames = frames
    config.data.augment = "crop"
    return Pixels(typed(config))


def _said(read: Callable[[], object]) -> str:
    """What a reader gives, in short, or the ValueError with which it refuses."""
    try:
        found = read()
    except ValueError as error:
        return f"refused {error}"
    if isinstance(found, np.ndarray):
        digest = hashlib.blake2b(np.ascontiguousarray(found), digest_size=6).hexdigest()
        return f"{found.shape} {digest}"
    return str(found)


def _trained(pool: Pixels, data: bytes) -> str:
    record = [Record(data, (), (), "key")]
    out, failed = pool.render(record, pool.plan(record, Draw(0, 0, np.zeros(1, np.int64))))
    return str(failed) if failed else hashlib.blake2b(out, digest_size=6).hexdigest()


def reader(frames: int) -> Callable[[pathlib.Path], str]:
    """Reads a file in every way that there is; made when first called: it starts threads."""
    pools: list[Pixels] = []

    def run(path: pathlib.Path) -> str:
        if not pools:
            pools.append(_pixels(frames))
        data = path.read_bytes()
        checked = quarantine.record(Item("key", data, ["text"]), OPTIONS)
        shrunk = quarantine.record(Item("key", data, ["text"]), Options(max_side=12))
        said = [
            checked[1] + checked[2],
            shrunk[1] + shrunk[2],
            _trained(pools[0], data),
            _said(lambda: videos.decode(data, 3) if frames else images.decode(data)),
        ]
        return f"{checked[1] or 'kept'}:" + " | ".join(said)

    return run


KINDS = {
    "images": Kind(still_seeds, damage, reader(0), 1100),
    "animations": Kind(animation_seeds, damage, reader(3), 1100),
    "videos": Kind(video_seeds, damage, reader(3), 1100),
}
