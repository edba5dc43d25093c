"""Any image to uint8 RGB. PIL and numpy only, no TensorFlow."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from coca_jax.config import shapes
from coca_jax.config.shapes import Size
from coca_jax.data.sources import files
from coca_jax.runtime import extras

# The formats that are read, wherever their plugins are installed, the usual ones first. PIL knows
# more, some of which are not to be opened for a stranger: EPS starts Ghostscript. HEIF needs the
# extra `heif`.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "PPM", "HEIF")
# Brands of HEIF files, bytes 8 to 12; those of AVIF files are avif and avis.
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
MAX_SCAN_PIXELS = 2_000_000_000  # of a JPEG: its pixels times its scans, each of which passes them
WHITE = (255, 255, 255)
_PLAIN_PPM = (b"P1", b"P2", b"P3")  # numbers as text, which PIL reads at a megabyte a second
_STRIP = 1 << 22  # pixels that are converted at a time
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")


def has_alpha(image: Image.Image) -> bool:
    """Whether an opened image has transparency (a channel, a palette entry or a key colour)."""
    return image.mode in _ALPHA_MODES or "transparency" in image.info


@functools.cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that this installation of PIL can read."""
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif  # takes a while, and only this needs it

        pillow_heif.register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_image(data: bytes, max_pixels: int = files.MAX_PIXELS) -> Image.Image:
    """Reads the header of an encoded image, of one of FORMATS: nothing else is even tried.

    Raises:
        ValueError: not an image of these formats, or too many pixels.
    """
    if max_pixels > files.MAX_PIXELS:
        Image.MAX_IMAGE_PIXELS = None  # PIL's own limit; ours is checked below
    try:
        if data[:2] in _PLAIN_PPM:
            raise UnidentifiedImageError
        image = Image.open(io.BytesIO(data), formats=formats())
    except Image.DecompressionBombError:  # which names a limit of PIL's own
        fix = _how_to_shrink("N") if max_pixels >= files.MAX_PIXELS else ""
        raise ValueError(f"too many pixels: the limit is {max_pixels}{fix}") from None
    except UnidentifiedImageError:
        if is_video_file(data):
            raise ValueError("a video file, not an image: read it with num_frames set") from None
        if _is_heif(data) and "HEIF" not in formats():
            raise ValueError(_heif_remedy()) from None
        raise ValueError(
            f"not an image that can be read ({len(data)} bytes, beginning with {data[:8]!r}): "
            f"none of {', '.join(formats())}"
        ) from None
    except Exception as error:  # PIL's plugins raise all sorts on damaged files
        raise ValueError(f"not an image that can be read ({len(data)} bytes): {error}") from None
    check_pixels(image.width, image.height, max_pixels)
    if image.format in ("JPEG", "MPO") and _too_many_scans(data, image.width * image.height):
        raise ValueError(f"too many pixels: {image.width} x {image.height} in more scans than read")
    return image


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raises ValueError for an image or frame of more pixels."""
    if width * height > max_pixels:
        fix = _how_to_shrink(str(width * height)) if max_pixels >= files.MAX_PIXELS else ""
        raise ValueError(f"too many pixels: {width} x {height}, limit {max_pixels}{fix}")


def _how_to_shrink(pixels: str) -> str:
    flags = f"--max_pixels={pixels} --max_side=2048"
    return f"; shrink the image, or `coca-jax prepare {flags}` does"


def _is_heif(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS


@functools.cache
def _heif_remedy() -> str:
    return f"a HEIC image, which only pillow-heif reads: {extras.remedy('heif')}"


def _too_many_scans(data: bytes, pixels: int) -> bool:
    """Whether a JPEG passes its pixels far more often than encoders do, 3 to 10 times. What is
    counted stands nowhere else in a file but in pictures within its tags."""
    most = len(data) // 2  # which is enough to know of small ones, without a look
    return pixels * most > MAX_SCAN_PIXELS and pixels * data.count(b"\xff\xda") > MAX_SCAN_PIXELS


def _orientation(image: Image.Image) -> int:
    """How an image is turned, 1 to 8, by its EXIF tag; damaged tags say nothing of the pixels. Nor
    does XMP, which browsers do not ask either."""
    try:
        if image.format == "TIFF":  # which PIL turns as it loads, by what it finds
            found = image.getexif().get(0x0112, 1)
        else:
            if image.format == "PNG" and "exif" not in image.info:
                image.load()  # the tag may stand behind the pixels
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
            found = exif.get(0x0112, 1)
    except Exception:  # a damaged block surfaces as any of a dozen types
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


# What makes a picture upright, by its orientation (EXIF 2.32, page 35).
_TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
), 2))  # fmt: skip


def _sixteen_to_eight(image: Image.Image) -> Image.Image:
    """Also with a key colour (tRNS of a PNG), which becomes transparent."""
    values = _finite(np.asarray(image))
    highest = values.max(initial=0)
    pixels = np.empty(values.shape, np.uint8)
    rows = max(_STRIP // image.width, 1)
    for top in range(0, image.height, rows):
        strip = values[top : top + rows]
        if values.dtype.kind == "f":
            strip = np.rint(strip * 255.0 if highest <= 1.0 else strip)
        elif image.mode.startswith("I;16") or highest > 255:
            strip = strip >> 8
        pixels[top : top + rows] = np.clip(strip, 0, 255)
    if isinstance(key := image.info.get("transparency"), int):
        alpha = np.where(values == key, np.uint8(0), np.uint8(255))
        return Image.fromarray(np.stack([pixels, alpha], -1))
    return Image.fromarray(pixels)


def _finite(values: np.ndarray) -> np.ndarray:
    """0 in the place of NaN and infinities: how pictures of floats mark what was not measured."""
    whole = values.dtype.kind != "f" or np.isfinite(values).all()
    return values if whole else np.where(np.isfinite(values), values, values.dtype.type(0))


def to_rgba(image: Image.Image) -> np.ndarray:
    """A PIL image, upright by its EXIF tag: uint8 [h, w, 4] with transparency, else [h, w, 3]."""
    image.load()
    if "exif" in image.info:
        turn = _TURNS.get(_orientation(image))
        image = image if turn is None else image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F":
        image = _sixteen_to_eight(image)
    mode = "RGBA" if has_alpha(image) else "RGB"
    pixels = np.empty((image.height, image.width, len(mode)), np.uint8)
    rows = max(_STRIP // image.width, 1)  # converted in strips: copies of the whole would add up
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        strip = image.crop((0, top, image.width, bottom)) if rows < image.height else image
        pixels[top:bottom] = np.asarray(strip if strip.mode == mode else strip.convert(mode))
    return pixels


def over(rgba: np.ndarray, background: Sequence[float] | np.ndarray = WHITE) -> np.ndarray:
    """Puts uint8 [..., h, w, 4] over a colour (whole numbers in [0, 255]): uint8 [..., h, w, 3]."""
    colour = np.asarray(background, np.uint16)
    flat = rgba.reshape(-1, 4)
    pixels = np.empty((len(flat), 3), np.uint8)
    for start in range(0, len(flat), _STRIP):
        strip = flat[start : start + _STRIP]
        alpha = strip[:, 3:].astype(np.uint16)
        blend = strip[:, :3] * alpha + colour * (255 - alpha)
        pixels[start : start + _STRIP] = (blend + 127) // 255
    return pixels.reshape(*rgba.shape[:-1], 3)


def decode_rgba(data: bytes, max_pixels: int = files.MAX_PIXELS) -> np.ndarray:
    """Encoded bytes (any of FORMATS; the first frame) to uint8 [h, w, 3 or 4].

    Raises:
        ValueError: the bytes are not an image, are damaged or cut short, or too large.
    """
    return _whole(open_image(data, max_pixels), f" ({len(data)} bytes)")


def _whole(image: Image.Image, name: str = "") -> np.ndarray:
    """`to_rgba`. Raises ValueError for a damaged image; told: what the text says of it."""
    try:
        return to_rgba(image)
    except (ValueError, AssertionError) as error:
        file = getattr(image, "fp", image)
        if not name and (file is None or getattr(file, "closed", False)):
            raise ValueError(
                "its file was closed before its pixels were read; call its load() while it is open"
            ) from None
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"damaged image{name}: {error}") from None
    except Exception as error:  # a damaged file surfaces as any of a dozen types
        raise ValueError(f"damaged image{name}: {error}") from None


def decode(image: Any) -> np.ndarray:
    """Any image to uint8 RGB [h, w, 3], upright, transparency over white.

    Args:
        image: encoded bytes, a path or URL, an open file, a PIL image, or an array [h, w],
            [h, w, 1 | 3 | 4] of uint8, uint16 or floats in [0, 1].

    Raises:
        ValueError: naming the image, when it cannot be decoded.
        FileNotFoundError: a path that does not exist.
    """
    if isinstance(image, (str, os.PathLike)):
        data = files.read_image(os.fspath(image))
        try:
            return decode(data)
        except ValueError as error:
            raise ValueError(f"{os.fspath(image)}: {error}") from None
    if isinstance(image, (bytes, bytearray, memoryview)):
        pixels = decode_rgba(bytes(image))
    elif isinstance(image, Image.Image):
        pixels = _whole(image)
    elif hasattr(image, "read"):
        pixels = decode_rgba(image.read())
    elif isinstance(image, (list, tuple)):
        raise ValueError(
            f"a {type(image).__name__} of {len(image)} is no picture; give one of them"
        )
    else:
        array = np.asarray(image)
        if array.dtype == object:
            raise ValueError(
                f"an image of type {type(image).__name__}; give a path, encoded bytes, an open "
                "file, a PIL image or an array"
            )
        pixels = _array(array)
    return over(pixels) if pixels.shape[-1] == 4 else pixels


def _array(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"image array of shape {array.shape}: give [h, w] or [h, w, 1, 3 or 4]")
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype.kind == "f":
        if not 0 <= array.min() <= array.max() <= 1:
            raise ValueError(
                f"float image with values in [{array.min():g}, {array.max():g}]: give [0, 1]"
            )
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"image array of {array.dtype}: give uint8, uint16 or floats in [0, 1]")
    return np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array


def encode_bmp(pixels: np.ndarray) -> bytes:
    """uint8 [h, w, 3] to an uncompressed BMP: how drawn images enter a pipeline of bytes, fast."""
    height, width = pixels.shape[:2]
    stride = (width * 3 + 3) // 4 * 4
    rows = np.zeros((height, stride), np.uint8)
    rows[:, : width * 3] = pixels[::-1, :, ::-1].reshape(height, width * 3)
    info = np.array([40, width, height, 1 | 24 << 16, 0, rows.size, 2835, 2835, 0, 0], "<u4")
    head = np.array([54 + rows.size, 0, 54], "<u4")
    return b"BM" + head.tobytes() + info.tobytes() + rows.tobytes()


def read_bmp(data: bytes) -> np.ndarray:
    """The pixels of a BMP of the kind that `encode_bmp` makes: a view, uint8 [h, w, 3].

    Raises:
        ValueError: cut short.
    """
    width, height = int.from_bytes(data[18:22], "little"), int.from_bytes(data[22:26], "little")
    stride, start = (width * 3 + 3) // 4 * 4, int.from_bytes(data[10:14], "little")
    if len(data) < start + stride * height:
        raise ValueError(
            f"damaged image ({len(data)} bytes): a BMP of {width} x {height} cut short"
        )
    rows = np.frombuffer(data, np.uint8, stride * height, start).reshape(height, stride)
    return rows[::-1, : width * 3].reshape(height, width, 3)[:, :, ::-1]


def is_video_file(data: bytes) -> bool:
    """Whether bytes begin like a video container (MP4, MOV, WebM, MKV, AVI, MPEG, FLV, Ogg)."""
    if data[4:8] == b"ftyp":
        return data[8:12] not in (b"avif", b"avis") and not _is_heif(data)
    packets = data[:1] == data[188:189] == data[376:377] == b"G"  # of an MPEG transport stream
    return (
        data[:4] in (b"\x1aE\xdf\xa3", b"FLV\x01", b"OggS", b"\0\0\x01\xba", b"\0\0\x01\xb3")
        or (data[:4] == b"RIFF" and data[8:12] == b"AVI ")
        or (packets and data[:4] != b"GIF8")
        or data[4:8] in (b"moov", b"mdat")
    )


# How the input pipeline decodes an image; see render.py.
JPEG, BMP, OTHER = range(3)


def sniff(data: bytes) -> tuple[int, int, int]:
    """From the header alone: (how to decode, height, width), upright.

    JPEG and BMP go to fast decoders; whatever those would get wrong (orientation tags, CMYK) and
    all other formats are OTHER: left to `decode_rgba`.

    Raises:
        ValueError: not an image.
    """
    if data[:3] == b"\xff\xd8\xff":
        found = _sniff_jpeg(data)
        if found:
            return JPEG, *found
    elif data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and len(data) > 33:
        width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
        if 0 < width * height <= files.MAX_PIXELS and data.find(b"eXIf", 33) < 0:
            return OTHER, height, width
    elif data[:2] == b"BM" and data[14:18] == b"(\0\0\0" and data[28:34] == b"\x18\0\0\0\0\0":
        width, height = int.from_bytes(data[18:22], "little"), int.from_bytes(data[22:26], "little")
        if 0 < width * height <= files.MAX_PIXELS:
            return BMP, height, width
    image = open_image(data)
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # whose size later versions of PIL turn
        width, height = image.tag_v2[256], image.tag_v2[257]
    if _orientation(image) >= 5:
        width, height = height, width
    return OTHER, height, width


def _sniff_jpeg(data: bytes) -> tuple[int, int] | None:
    """(height, width) of an upright gray or YCbCr JPEG; None for one that needs care."""
    position, end = 2, len(data) - 9
    found, components, one_scan = None, 0, False
    while position < end and data[position] == 0xFF:
        marker = data[position + 1]
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xE1 and data[position + 4 : position + 8] == b"Exif":
            exif = Image.Exif()
            try:
                exif.load(data[position + 4 : position + 2 + length])
            except Exception:  # damaged tags say nothing of the pixels
                return None
            if exif.get(0x0112, 1) != 1:
                return None
        elif marker == 0xEE and data[position + 4 : position + 9] == b"Adobe":
            if data[position + 15 : position + 16] == b"\0":  # RGB or CMYK stored as it is
                return None
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height = int.from_bytes(data[position + 5 : position + 7], "big")
            width = int.from_bytes(data[position + 7 : position + 9], "big")
            components = data[position + 9]
            if components not in (1, 3) or not 0 < height * width <= files.MAX_PIXELS:
                return None
            found, one_scan = (height, width), marker <= 0xC1
        elif marker == 0xDA:
            one_scan = one_scan and data[position + 4] == components
            if not found or (not one_scan and _too_many_scans(data, found[0] * found[1])):
                return None
            return found
        position += 2 + length
    return None


# How an image comes to the model's size where it is not augmented: data.resize. PIL, numpy and
# OpenCV; no TensorFlow.
#
# 'trim' is for drawings: those who draw icons, emoji, stickers or clip art leave more or less room
# around the same thing, and a model that has learned it in one size would have to find it in another.


FILL = 0.95  # of a side that 'trim' leaves to what an image shows
PLAIN = 12  # levels by which a margin may differ from its colour, as a JPEG's does

Resize = Callable[[np.ndarray, tuple[int, int]], np.ndarray]


def bilinear(pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """uint8 [h, w, 3] to (height, width), antialiased: a triangle as wide as their pixels."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize(shape[::-1], Image.Resampling.BILINEAR))


def preprocess_eval(image: np.ndarray, size: Size, mode: str = "squash") -> np.ndarray:
    """The resizing of evaluation, antialiased.

    Args:
        image: uint8 [h, w, 3].
        size: S x T, height and width of the result.
        mode: 'squash' stretches to it, bilinear; 'crop' scales, bicubic, until both sides are
            filled and one fits, and takes the centre, as CLIP and open_clip do; 'trim' scales,
            bilinear, what is left without plain margins until it fits (`trim`).

    Returns:
        uint8 [S, T, 3].
    """
    high, wide = shapes.pair(size)
    if mode == "squash":
        return bilinear(image, (high, wide))
    if mode == "crop":
        return _resize_crop(image, high, wide)
    if mode == "trim":
        return trim([image], size)[0]
    raise ValueError(f"resize mode {mode!r}: use 'squash', 'crop' or 'trim'")


def _resize_crop(image: np.ndarray, high: int, wide: int) -> np.ndarray:
    """What torchvision's Resize(size, BICUBIC) and CenterCrop(size) give of squares, and timm's
    ResizeKeepRatio in the place of the first of others."""
    image = _shorten(image, 512 * -(-max(high, wide) // min(high, wide)))
    if high == wide:
        short = min(image.shape[:2])
        height, width = (
            high if side == short else int(high * side / short) for side in image.shape[:2]
        )
    else:
        ratio = min(image.shape[0] / high, image.shape[1] / wide)
        height, width = (round(side / ratio) for side in image.shape[:2])
    scaled = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    top, left = int(round((height - high) / 2)), int(round((width - wide) / 2))
    return np.asarray(scaled.crop((left, top, left + wide, top + high)))


def _shorten(image: np.ndarray, most: int) -> np.ndarray:
    """The middle of an image more than `most` times as long as wide: the rest would be cut off
    after it had been scaled to gigabytes. The centre stays where it is, to the half pixel."""
    short = min(image.shape[:2])

    def middle(side: int) -> slice:
        keep = min(side, most * short + (side - most * short) % 2)
        return slice((side - keep) // 2, (side + keep) // 2)

    return image[middle(image.shape[0]), middle(image.shape[1])]


def cut(frames: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Images without their plain margins, and the colour of these, uint8 [3].

    The colour is that of the first pixel; what is left is the box around all that differs from it
    by more than PLAIN levels. An image of one colour stays whole.

    frames: uint8 [h, w, 3], one image, or those of a clip, which are cut alike: the box holds what
    any of them shows.
    """
    colour = frames[0][0, 0].copy()
    low = tuple(max(level - PLAIN, 0) for level in colour.tolist())
    high = tuple(min(level + PLAIN, 255) for level in colour.tolist())
    plain = functools.reduce(cv2.bitwise_and, (cv2.inRange(one, low, high) for one in frames))
    left, top, width, height = cv2.boundingRect(cv2.bitwise_not(plain))
    if not width:
        return list(frames), colour
    return [frame[top : top + height, left : left + width] for frame in frames], colour


def trim(frames: Sequence[np.ndarray], size: Size) -> list[np.ndarray]:
    """Images uint8 [h, w, 3], of one clip, without their plain margins: each `fit` to `size`."""
    left, colour = cut(frames)
    return [fit(pixels, colour, size) for pixels in left]


def fit(
    pixels: np.ndarray, colour: np.ndarray, size: Size, resize: Resize = bilinear
) -> np.ndarray:
    """uint8 [h, w, 3] scaled until one side has FILL of that of `size` S x T and the other no more,
    with `colour` around it: uint8 [S, T, 3]."""
    wanted = shapes.pair(size)
    scale = FILL * min(side / own for side, own in zip(wanted, pixels.shape))
    height, width = (max(1, round(own * scale)) for own in pixels.shape[:2])
    return _amid(resize(pixels, (height, width)), colour, wanted)


def framed(pixels: np.ndarray, colour: np.ndarray, size: Size) -> np.ndarray:
    """As `fit`, but not scaled: uint8 [h', w', 3] of the proportions of `size`."""
    wanted = shapes.pair(size)
    scale = max(own / side for side, own in zip(wanted, pixels.shape)) / FILL
    height, width = (max(own, round(side * scale)) for side, own in zip(wanted, pixels.shape))
    return _amid(pixels, colour, (height, width))


def _amid(pixels: np.ndarray, colour: np.ndarray, full: tuple[int, int]) -> np.ndarray:
    top, left = ((whole - own) // 2 for whole, own in zip(full, pixels.shape))
    bottom, right = full[0] - pixels.shape[0] - top, full[1] - pixels.shape[1] - left
    around = (top, bottom, left, right)
    return cv2.copyMakeBorder(pixels, *around, cv2.BORDER_CONSTANT, value=colour.tolist())
