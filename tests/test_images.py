"""Any format of image comes out as upright RGB."""

import io
import os
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from coca_jax.cli import main
from coca_jax.data import filters, image_files, images, videos
from coca_jax.data.sources import files


def _scene(mode="RGB", size=(24, 16)):
    """Left half red, right half blue; the top row green."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2] = (220, 30, 30)
    pixels[:, size[0] // 2 :] = (30, 30, 220)
    pixels[: size[1] // 4] = (30, 200, 30)
    return Image.fromarray(pixels).convert(mode)


def _encode(image, format, **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def _looks_right(pixels, tolerance=45):
    assert pixels.dtype == np.uint8 and pixels.shape == (16, 24, 3)
    for (row, column), colour in {
        (12, 4): (220, 30, 30),
        (12, 20): (30, 30, 220),
        (1, 12): (30, 200, 30),
    }.items():
        assert np.abs(pixels[row, column].astype(int) - colour).max() <= tolerance


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("JPEG", {"quality": 95, "subsampling": 0, "progressive": True}),
        ("WEBP", {"quality": 95}),
        ("BMP", {}),
        ("TIFF", {}),
        ("GIF", {}),
    ],
)
def test_formats(format, options):
    data = _encode(_scene(), format, **options)
    _looks_right(images.decode(data))
    how, height, width = images.sniff(data)
    assert (height, width) == (16, 24)
    assert how == {"JPEG": images.JPEG, "BMP": images.BMP}.get(format, images.OTHER)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = _scene()
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for step in undo.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _encode(stored, "JPEG", quality=95, subsampling=0, exif=exif)
    _looks_right(images.decode(data))
    how, height, width = images.sniff(data)
    assert (height, width) == (16, 24)
    assert how == (images.JPEG if orientation == 1 else images.OTHER)


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-'
    b'syntax-ns#"><rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
    b'tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


def _chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _tagged(format, pixels, **options):
    """A picture that is to be turned by a quarter, by its EXIF tag."""
    exif = Image.Exif()
    exif[0x0112] = 6
    if format != "late PNG":
        return _encode(pixels, format, exif=exif, **options)
    whole = _encode(pixels, "PNG")  # the tag stands behind the pixels
    return whole[:-12] + _chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + whole[-12:]


@pytest.mark.parametrize("format", ["TIFF", "MPO", "PNG", "late PNG", "WEBP"])
def test_all_formats_are_turned_by_their_tag_and_planned_as_they_are_turned(format):
    stored = _scene().transpose(Image.Transpose.ROTATE_90)
    data = _tagged(format, stored, **(dict(quality=95) if format == "WEBP" else {}))
    _looks_right(images.decode(data))
    assert images.sniff(data) == (images.OTHER, 16, 24)


@pytest.mark.parametrize(
    ("format", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("WEBP", "RGB")]
)
@pytest.mark.parametrize("tags", [False, True])
def test_xmp_turns_nothing(format, mode, tags):
    """Neither in what is planned nor in what is decoded."""
    exif = Image.Exif()
    if tags:  # without the one of the orientation
        exif[0x010F] = "Maker"
    if format == "PNG":
        whole = _encode(_scene(), format, exif=exif)
        data = whole[:33] + _chunk(b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + XMP) + whole[33:]
    else:
        data = _encode(_scene().convert(mode), format, xmp=XMP, exif=exif, quality=95)
    _looks_right(images.decode(data))
    assert images.sniff(data)[1:] == (16, 24)


def test_cmyk_gray_and_one_bit():
    _looks_right(images.decode(_encode(_scene("CMYK"), "JPEG", quality=95)), tolerance=60)
    assert images.sniff(_encode(_scene("CMYK"), "JPEG"))[0] == images.OTHER
    gray = images.decode(_encode(_scene("L"), "PNG"))
    assert gray.shape == (16, 24, 3) and (gray[..., 0] == gray[..., 2]).all()
    assert set(np.unique(images.decode(_encode(_scene("1"), "PNG")))) <= {0, 255}


def test_sixteen_bits():
    ramp = (np.arange(16 * 24).reshape(16, 24) * 170).astype(np.uint16)
    data = _encode(Image.fromarray(ramp), "PNG")
    assert np.array_equal(images.decode(data)[..., 0], (ramp >> 8).astype(np.uint8))
    assert images.sniff(data)[0] == images.OTHER


def test_what_is_no_number_in_floats_is_black():
    values = np.full((4, 6), 0.5, np.float32)
    for odd in (np.nan, np.inf, -np.inf):
        values[0, 0] = odd
        data = _encode(Image.fromarray(values), "TIFF")
        found = images.decode(data)
        assert found[0, 0].tolist() == [0, 0, 0] and (found.reshape(-1, 3)[1:] == 128).all()


def test_a_key_colour_of_sixteen_bits_is_transparent():
    ramp = (np.arange(4 * 6).reshape(4, 6) * 2000).astype(np.uint16)
    data = _encode(Image.fromarray(ramp), "PNG", transparency=4000)
    found = images.decode_rgba(data)
    assert (found[..., 3] == np.where(ramp == 4000, 0, 255)).all()
    assert (found[..., 0] == ramp >> 8).all()
    assert images.decode(data)[0, 2].tolist() == [255, 255, 255]


def test_transparency_goes_over_white():
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = (10, 20, 30, 255)
    pixels[2, :] = (0, 0, 0, 128)
    found = images.decode(_encode(Image.fromarray(pixels), "PNG"))
    assert found[0, 0].tolist() == [10, 20, 30]
    assert found[3, 0].tolist() == [255, 255, 255]
    assert abs(int(found[2, 0, 0]) - 127) <= 1
    palette = _scene("P")
    palette.info["transparency"] = palette.getpixel((4, 12))
    data = _encode(palette, "PNG", transparency=palette.getpixel((4, 12)))
    assert images.decode(data)[12, 4].tolist() == [255, 255, 255]


def test_animations_give_their_first_frame():
    other = Image.new("RGB", (24, 16), "white")
    for format in ("GIF", "WEBP", "PNG"):
        data = _encode(
            _scene(), format, save_all=True, append_images=[other, other], duration=50, loop=0
        )
        _looks_right(images.decode(data), tolerance=60)
        assert images.sniff(data)[0] == images.OTHER


def test_damage_is_a_value_error():
    whole = _encode(_scene(size=(200, 160)), "JPEG")
    for data in (b"", b"not an image", whole[: len(whole) // 2], whole[:30]):
        with pytest.raises(ValueError):
            images.decode(data)
    with pytest.raises(ValueError, match="too many pixels"):
        images.open_image(_encode(_scene(), "PNG"), max_pixels=100)


def test_commands_say_one_line_of_a_large_picture(recwarn):
    """PIL warns from 89 million pixels on, in two lines."""
    main.quiet_libraries()
    data = bytearray(_encode(_scene(), "PNG"))
    data[16:24] = struct.pack(">II", 13_000, 13_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(ValueError, match="too many pixels: 13000 x 13000"):
        images.open_image(bytes(data))
    data[16:24] = struct.pack(">II", 30_000, 30_000)  # PIL itself opens none of this size
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(ValueError, match="too many pixels: the limit is 50000000$"):
        images.open_image(bytes(data), 50_000_000)
    # A collector may find another test's garbage meanwhile, and warn.
    assert not [w for w in recwarn.list if issubclass(w.category, Image.DecompressionBombWarning)]


def test_arrays_and_paths(tmp_path):
    pixels = np.asarray(_scene())
    assert np.array_equal(images.decode(pixels), pixels)
    assert np.array_equal(images.decode(pixels / 255.0), pixels)
    assert images.decode(pixels[..., 0]).shape == (16, 24, 3)
    _scene().save(tmp_path / "a.png")
    assert np.array_equal(images.decode(tmp_path / "a.png"), pixels)
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="bad.jpg"):
        images.decode(tmp_path / "bad.jpg")
    with pytest.raises(ValueError, match="shape"):
        images.decode(np.zeros((2, 2, 2, 3), np.uint8))


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_picture_of_pil_whose_file_is_cut_short(format):
    half = _encode(_scene(size=(240, 160)), format)
    half = half[: len(half) // 2]
    for image, told in ((half, rf" \({len(half)} bytes\)"), (Image.open(io.BytesIO(half)), "")):
        with pytest.raises(ValueError, match=f"^damaged image{told}: "):
            images.decode(image)


def test_bmp_round_trip():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    data = images.encode_bmp(pixels)
    assert np.array_equal(images.decode(data), pixels)
    assert images.sniff(data) == (images.BMP, 5, 7)
    assert np.array_equal(images.read_bmp(data), pixels)
    with pytest.raises(ValueError, match="cut short"):
        images.read_bmp(data[:-1])


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"


def test_no_image_starts_a_process(tmp_path, monkeypatch):
    started = tmp_path / "started"
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {started}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for read in (images.decode, images.sniff, images.open_image):
        with pytest.raises(ValueError, match="not an image .*%!PS-Ado"):
            read(POSTSCRIPT)
    with pytest.raises(ValueError, match="not an image"):
        videos.decode(POSTSCRIPT, 2)
    assert not started.exists()
    with pytest.raises(Exception):  # noqa: B017  what PIL itself does with these bytes
        Image.open(io.BytesIO(POSTSCRIPT)).load()
    assert started.exists()


def test_formats_that_are_not_opened():
    for format in ("EPS", "TGA", "PCX", "ICO", "SGI"):
        with pytest.raises(ValueError, match="none of JPEG, PNG"):
            images.decode(_encode(_scene(), format))
    with pytest.raises(ValueError, match="none of JPEG, PNG"):
        images.decode(b"P3 1 1 255 7 8 9\n")  # as text: PIL reads it at a megabyte a second
    assert images.decode(b"P6 1 1 255\n\x07\x08\x09").tolist() == [[[7, 8, 9]]]
    assert {".jpg", ".png", ".webp", ".tiff"} < set(files.IMAGE_SUFFIXES)
    assert not {".eps", ".ps", ".pdf", ".ico"} & set(files.IMAGE_SUFFIXES)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_damaged_tags_say_nothing_of_the_pixels(format):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = _encode(_scene(), format, exif=exif.tobytes())
        upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        assert np.array_equal(images.decode(data), upright)
        assert images.sniff(data)[1:] == upright.shape[:2]
    text = b"Exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHI4sI", 0x0112, 2, 4, b"six\0", 0)
    for block in (b"Exif\0\0", b"Exif\0\0\0\0\0\5" + bytes(40), text):
        data = _encode(_scene(), format, exif=block)
        assert images.sniff(data)[1:] == images.decode(data).shape[:2] == (16, 24)


def test_a_jpeg_of_more_scans_than_encoders_write_is_refused_by_every_reader(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    last = data.rindex(b"\xff\xda")
    many = data[:last] + data[last:-2] * 100 + data[-2:]
    assert images.sniff(data) == (images.JPEG, 64, 64)
    images.decode(many)  # 4096 pixels a hundred times are no work
    monkeypatch.setattr(images, "MAX_SCAN_PIXELS", 50 * 64 * 64)
    assert images.decode(data).shape == (64, 64, 3)
    for read in (images.sniff, images.decode):
        with pytest.raises(ValueError, match="too many pixels: 64 x 64 in more scans"):
            read(many)


def test_heic_is_read_with_its_extra_and_named_without(monkeypatch, tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    out = io.BytesIO()
    pillow_heif.from_pillow(_scene()).save(out, quality=95)
    data = out.getvalue()
    assert not images.is_video_file(data)
    assert images.sniff(data) == (images.OTHER, 16, 24)
    (tmp_path / "a.HEIC").write_bytes(data)
    _looks_right(images.decode(str(tmp_path / "a.HEIC")))
    assert image_files.find([str(tmp_path)]) == [str(tmp_path / "a.HEIC")]
    monkeypatch.setattr(images, "formats", lambda: ("JPEG", "PNG"))  # as without the plugin
    with pytest.raises(ValueError, match="HEIC image.*pillow-heif.*pip install.*heif"):
        images.decode(data)


def test_a_large_picture_is_shrunk_by_the_flags_that_its_error_names(tmp_path):
    """144 megapixels, as a scanner or a phone of 200 megapixels writes them."""
    (tmp_path / "in").mkdir()
    Image.new("L", (12_000, 12_000), 200).save(tmp_path / "in/a.png")
    main.quiet_libraries()
    with pytest.raises(ValueError, match="too many pixels: 12000 x 12000") as told:
        images.decode(str(tmp_path / "in/a.png"))
    flags = re.search(r"`coca-jax prepare (--max_pixels=\S+ --max_side=\S+)` does", str(told.value))
    (tmp_path / "in/metadata.jsonl").write_text('{"file_name": "a.png", "text": "gray"}')
    prepare = [sys.executable, "-m", "coca_jax", "prepare", f"--input={tmp_path / 'in'}"]
    subprocess.run([*prepare, f"--out={tmp_path / 'out'}", *flags[1].split()], check=True)
    (record,) = filters.open_source(str(tmp_path / "out"))
    assert Image.open(io.BytesIO(record.image)).size == (2048, 2048)
    alone = [*prepare, f"--out={tmp_path / 'no'}", flags[1].split()[0]]
    refused = subprocess.run(alone, capture_output=True, text=True)
    assert refused.returncode == 2 and "Add --max_side=2048" in refused.stderr
