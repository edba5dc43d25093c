"""File name suffixes and size limits of images and videos, shared by readers and decoders."""

from __future__ import annotations

MAX_PIXELS = 120_000_000  # of an image or frame; decoding takes about 7 bytes for each
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".avif", ".avifs", ".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif"),
)
VIDEO_SUFFIXES = ("mp4", "m4v", "mov", "webm", "mkv", "avi", "mpg", "mpeg", "ts", "flv", "ogv")
