"""Draws docs/images: the way of a batch and of a photo, as CONTRIBUTING.md's tables have them.

python docs/site/figures.py          # writes batch.svg and photo.svg
"""

import pathlib
import re
from xml.sax.saxutils import escape

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TABLES = {"batch": "A batch, disk to gradient", "photo": "A photo, path to caption"}
WIDTH, ROW, TEXT = 760, 52, 'font-family="system-ui, sans-serif"'


def stations(title: str) -> list[tuple[str, str]]:
    """(what happens, files) of each row of the table below that heading."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?!station|---)(.+?) \| (.+?) \|$", text, re.M)
    return [(what.replace("`", ""), files.replace("`", "")) for what, files in rows]


def draw(title: str) -> str:
    """The SVG: a box a station, one below the other, arrows between them."""
    rows = stations(title)
    height = ROW * len(rows) + 8
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#fff"/>',
    ]
    for number, (what, files) in enumerate(rows):
        top = 8 + ROW * number
        lines += [
            f'<rect x="8" y="{top}" width="{WIDTH - 16}" height="38" rx="5" fill="#eef0fa" '
            'stroke="#3f51b5"/>',
            f'<text x="20" y="{top + 16}" {TEXT} font-size="13" fill="#111">{escape(what)}</text>',
            f'<text x="20" y="{top + 31}" {TEXT} font-size="11" fill="#3f51b5">{escape(files)}'
            "</text>",
        ]
        if number:
            middle = WIDTH // 2
            lines.append(
                f'<path d="M{middle} {top - 14}v8l-4 -4m4 4l4 -4" stroke="#3f51b5" fill="none"/>'
            )
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    for name, title in TABLES.items():
        (ROOT / f"docs/images/{name}.svg").write_text(draw(title))
