"""Clips: frames of animations and video files, sampled uniformly, as RGB. No TensorFlow.

Animations (GIF, APNG, WebP, AVIF) are read by PIL, video files (MP4, WebM, MKV, MOV, AVI ...) by
PyAV, the extra `video`. A still image is a clip of one frame.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from coca_jax.data import images
from coca_jax.data.sources import files
from coca_jax.runtime import extras

ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF")  # frames of other formats are pages, layers or sizes
# What FFmpeg may take a file for: containers of pictures. It knows others that name further files.
CONTAINERS = "mov,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,ogg"
MAX_FRAMES = 100_000  # of a clip
MAX_CLIP_PIXELS = 10_000_000_000  # of all its frames together: a minute or two of one core


def middles(num_frames: int) -> np.ndarray:
    """The offsets of uniform sampling: 0.5 for each of T frames, float64 [T]."""
    return np.full(num_frames, 0.5)


def sample(count: int, offsets: np.ndarray) -> np.ndarray:
    """Which of `count` frames to take: int64 [T], ascending.

    The clip is cut into T equal segments and frame i is at `offsets[i]` of segment i, 0.5 being
    its middle: floor((i + offset_i) * count / T). Frames repeat where count < T.

    Args:
        count: frames of the clip, by number, whatever their durations.
        offsets: floats [T] in [0, 1); `middles(T)`, or random ones to jitter.
    """
    total = len(offsets)
    places = (np.arange(total) + np.asarray(offsets, np.float64)) * count / total
    return np.minimum(places.astype(np.int64), count - 1)


def is_animation(image: Image.Image, data: bytes = b"") -> bool:
    """Whether an image, opened from `data` (b"": not known), has several frames in time.

    Raises:
        ValueError: damaged, or so many that reading them would take minutes.
    """
    if image.format not in ANIMATIONS:
        return False
    try:
        count = getattr(image, "n_frames", 1)
    except Exception as error:  # PIL's decoders raise all sorts on damaged data
        raise _damaged(data, error) from None
    _check_frames(count, image.width, image.height)
    return count > 1


def _damaged(data: bytes, error: Exception) -> ValueError:
    size = f" ({len(data)} bytes)" if data else ""
    return ValueError(f"damaged animation{size}: {error}")


def _check_frames(count: int, width: int, height: int) -> None:
    if count > MAX_FRAMES or count * width * height > MAX_CLIP_PIXELS:
        raise ValueError(
            f"too many frames: {count if count <= MAX_FRAMES else f'more than {MAX_FRAMES}'} of "
            f"{width} x {height}; cut it into clips of at most {MAX_FRAMES} frames and "
            f"{MAX_CLIP_PIXELS:.0e} pixels, or make them smaller"
        )


def sniff(data: bytes, max_pixels: int = files.MAX_PIXELS) -> tuple[int, int, int]:
    """(images.OTHER, height, width) of a clip's frames, upright, as `images.sniff` of an image.

    Of a video file the first frame is decoded. Raises ValueError: neither an image nor a video.
    """
    if images.is_video_file(data):
        for frame in _video_frames(data, max_pixels):
            height, width, _ = _pixels(frame).shape
            return images.OTHER, height, width
        raise ValueError(f"damaged video ({len(data)} bytes): no frame decodes")
    _, height, width = images.sniff(data)
    return images.OTHER, height, width


def decode_rgba(data: bytes, offsets: np.ndarray, max_pixels: int = files.MAX_PIXELS) -> np.ndarray:
    """Sampled frames of encoded bytes: uint8 [T, h, w, 3], with transparency [T, h, w, 4].

    Raises:
        ValueError: neither an image nor a video, damaged, too large, or PyAV is missing.
    """
    if images.is_video_file(data):
        frames = _sample_video(data, offsets, max_pixels)
    else:
        frames = _sample_image(images.open_image(data, max_pixels), data, offsets)
    return _clip(frames)


def _clip(frames: list[np.ndarray]) -> np.ndarray:
    sizes = {frame.shape[:2] for frame in frames}
    if len(sizes) > 1:
        raise ValueError(f"video frames of different sizes {sorted(sizes)}; encode it to one size")
    if all(frame is frames[0] for frame in frames):  # a still: its pixels are there once
        return np.broadcast_to(frames[0], (len(frames), *frames[0].shape))
    if any(frame.shape[-1] == 4 for frame in frames):
        frames = [_with_alpha(frame) for frame in frames]
    return np.stack(frames)


def decode(video: Any, num_frames: int) -> np.ndarray:
    """Any clip or image to `num_frames` frames of RGB, transparency over white: uint8 [T, h, w, 3].

    Args:
        video: encoded bytes, a path or URL, an open file, a PIL image (all frames of an animation),
            an array [t, h, w, 3] of uint8, or a still as `images.decode` takes it.
        num_frames: T, sampled by `sample` with `middles`.

    Raises:
        ValueError: naming the video, when it cannot be decoded.
        FileNotFoundError: a path that does not exist.
    """
    if isinstance(video, (str, os.PathLike)):
        data = files.read_image(os.fspath(video))
        try:
            return decode(data, num_frames)
        except ValueError as error:
            raise ValueError(f"{os.fspath(video)}: {error}") from None
    if isinstance(video, Image.Image) and is_animation(video):
        return _over_white(_frames_of(video, middles(num_frames)))
    if hasattr(video, "read") or isinstance(video, (bytes, bytearray, memoryview)):
        data = video.read() if hasattr(video, "read") else bytes(video)
        return _over_white(decode_rgba(data, middles(num_frames)))
    if isinstance(video, Image.Image) or np.ndim(video) != 4:
        return np.repeat(images.decode(video)[None], num_frames, 0)
    clip = np.asarray(video)
    if clip.dtype != np.uint8 or clip.shape[-1] != 3 or 0 in clip.shape:
        raise ValueError(
            f"video array of {clip.dtype} {clip.shape}: give uint8 [frames, h, w, 3], at least one"
        )
    return clip[sample(len(clip), middles(num_frames))]


def _over_white(frames: np.ndarray) -> np.ndarray:
    if frames.shape[-1] == 3:
        return frames
    if frames.strides[0] == 0:  # a still
        return np.broadcast_to(images.over(frames[0]), (*frames.shape[:3], 3))
    return images.over(frames)


def verify(data: bytes) -> int:
    """Decodes every frame of encoded bytes; returns how many there are.

    Raises:
        ValueError: one is damaged, or there is none.
    """
    count = 0
    if images.is_video_file(data):
        _count_packets(data)  # before any is decoded: are there too many?
        for frame in _video_frames(data):
            if frame.is_corrupt:
                raise ValueError(f"damaged video ({len(data)} bytes): frame {count}")
            count += 1
        if not count:
            raise ValueError(f"damaged video ({len(data)} bytes): no frame decodes")
        return count
    image = images.open_image(data)
    span = _span(image, data)
    try:
        for index in span:
            image.seek(index)
            image.load()
            count += 1
    except Exception as error:  # PIL's decoders raise all sorts on damaged data
        raise _damaged(data, error) from None
    return count


def _span(image: Image.Image, data: bytes) -> range:
    """The frames of an image. A PNG's picture for readers without animation is not one."""
    if not is_animation(image, data):
        return range(1)
    return range(int(getattr(image, "default_image", False)), getattr(image, "n_frames", 1))


def _frames_of(image: Image.Image, offsets: np.ndarray) -> np.ndarray:
    """Sampled frames of an animation that somebody has opened, and that stays where it is."""
    at = image.tell()
    try:
        return _clip(_sample_image(image, b"", offsets))
    finally:
        image.seek(at)


def _sample_image(image: Image.Image, data: bytes, offsets: np.ndarray) -> list[np.ndarray]:
    span = _span(image, data)
    try:
        wanted = [span[index] for index in sample(len(span), offsets)]
        frames: dict[int, np.ndarray] = {}
        for index in wanted:  # ascending: each frame is drawn over the ones before
            if index not in frames:
                image.seek(index)
                frames[index] = images.to_rgba(image)
    except Exception as error:  # a damaged file surfaces as any of a dozen types
        raise _damaged(data, error) from None
    return [frames[index] for index in wanted]


def _sample_video(data: bytes, offsets: np.ndarray, max_pixels: int) -> list[np.ndarray]:
    count = _count_packets(data)
    for _ in range(2):
        wanted, frames, seen = sample(count, offsets).tolist(), {}, 0
        for frame in _video_frames(data, max_pixels):
            if seen in wanted:
                frames[seen] = _pixels(frame)
            seen += 1
        if seen == count:
            return [frames[index] for index in wanted]
        count = seen  # some packets show nothing: alternate references, what an edit list hides
        if not count:
            break
    raise ValueError(f"damaged video ({len(data)} bytes): {count} frames decode")


def _open(data: bytes, max_pixels: int = files.MAX_PIXELS) -> tuple[Any, Any]:
    """(container, its first video stream). Raises ValueError: damaged, or frames too large."""
    try:
        import av
    except ImportError:
        raise ValueError(f"a video file needs PyAV: {extras.remedy('video')}") from None
    try:
        container = av.open(io.BytesIO(data), options=dict(format_whitelist=CONTAINERS))
        stream = container.streams.video[0]
    except Exception as error:  # FFmpeg's, and of what PyAV finds in a header
        raise ValueError(
            f"damaged video ({len(data)} bytes), or no picture in it: {error}"
        ) from None
    context = stream.codec_context
    if context is None:
        raise ValueError(f"video in a code that FFmpeg does not know ({len(data)} bytes)")
    images.check_pixels(context.width, context.height, max_pixels)
    # FFmpeg checks it before it reserves memory; what it decodes is padded.
    context.options = {"max_pixels": str(max(2 * max_pixels, 1 << 20))}
    return container, stream


def _count_packets(data: bytes) -> int:
    """Packets of the video stream: the number of frames, but for packets that show nothing."""
    container, stream = _open(data)
    with container:
        try:
            full = (packet for packet in container.demux(stream) if packet.size > 0)
            count = sum(1 for _ in itertools.islice(full, MAX_FRAMES + 1))
        except Exception as error:  # one of PyAV's dozens
            raise ValueError(f"damaged video ({len(data)} bytes): {error}") from None
    _check_frames(count, stream.codec_context.width, stream.codec_context.height)
    return max(count, 1)


def _video_frames(data: bytes, max_pixels: int = files.MAX_PIXELS) -> Iterator[Any]:
    """PyAV's frames, in the order of showing."""
    container, stream = _open(data, max_pixels)
    left = MAX_CLIP_PIXELS
    with container:
        frames = container.decode(stream)
        while True:
            try:
                frame = next(frames, None)
            except Exception as error:  # one of PyAV's dozens
                raise ValueError(f"damaged video ({len(data)} bytes): {error}") from None
            if frame is None:
                return
            images.check_pixels(
                frame.width, frame.height, max_pixels
            )  # not always what headers say
            left -= frame.width * frame.height
            if left < 0:
                raise ValueError(f"too many frames: more than {MAX_CLIP_PIXELS:.0e} pixels in all")
            yield frame


def _pixels(frame: Any) -> np.ndarray:
    """A frame of PyAV, turned upright: uint8 [h, w, 3], or 4 where the format has transparency."""
    alpha = any(component.is_alpha for component in frame.format.components)
    pixels = frame.to_ndarray(format="rgba" if alpha else "rgb24")
    return np.rot90(pixels, round(frame.rotation / 90))  # both count against the clock


def _with_alpha(pixels: np.ndarray) -> np.ndarray:
    if pixels.shape[-1] == 4:
        return pixels
    return np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], -1)
