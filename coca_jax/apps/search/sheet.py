"""A contact sheet: results of a search as one HTML file with small pictures in it."""

from __future__ import annotations

import base64
import html
import io
import os
import sys
import webbrowser
from collections.abc import Iterable, Sequence

from PIL import Image

from coca_jax.apps.search.index import Index
from coca_jax.data import images
from coca_jax.runtime import storage

MAX_PICTURES = 48  # of a group; the heading says how many there are
_SIDE = 240
_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.4 system-ui, sans-serif; margin: 24px auto; max-width: 1240px; padding: 0 16px }
h2 { font-size: 18px; margin: 28px 0 8px }
ul { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr));
  list-style: none; margin: 0; padding: 0 }
img, .none { aspect-ratio: 1; background: #8882; border-radius: 6px; object-fit: contain;
  width: 100% }
.none { display: grid; place-items: center }
small { display: block; overflow-wrap: anywhere }
"""


def encode(image: str | bytes, side: int, kind: str = "JPEG") -> bytes:
    """A picture of at most `side` pixels. Raises ValueError, OSError."""
    picture = Image.fromarray(images.decode(image))
    picture.thumbnail((side, side))
    out = io.BytesIO()
    picture.save(out, kind, quality=85)
    return out.getvalue()


def write(
    path: str, title: str, groups: Iterable[tuple[str, Sequence[tuple[int, str]]]], index: Index
) -> None:
    """Writes the sheet. groups: (heading, (place in index.names, text below the picture) of each).
    A picture that is in an archive, gone or changed is shown by its name alone."""
    body = []
    for heading, pictures in groups:
        items = [_item(index, *one) for one in pictures[:MAX_PICTURES]]
        body.append(f"<h2>{html.escape(heading)}</h2>\n<ul>\n{''.join(items)}</ul>\n")
    text = (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n"
        f"<h1>{html.escape(title)}</h1>\n{''.join(body)}</html>\n"
    )
    storage.write_text(path, text)


def show(path: str) -> None:
    """Opens the sheet in the browser of a desktop; elsewhere does nothing."""
    desktop = sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    if desktop and sys.stdout.isatty():
        webbrowser.open(f"file://{os.path.abspath(path)}")


def _item(index: Index, place: int, text: str) -> str:
    name = html.escape(index.names[place], quote=True)
    try:
        data = base64.b64encode(encode(index.file(place)[0], _SIDE)).decode()
        picture = f'<img src="data:image/jpeg;base64,{data}" alt="{name}" title="{name}">'
    except (ValueError, OSError):
        picture = '<span class="none">not shown</span>'
    caption = html.escape(" · ".join(filter(None, (text, index.captions[place]))))
    return f"<li>{picture}<small>{caption}</small><small>{name.rpartition('/')[2]}</small></li>\n"
