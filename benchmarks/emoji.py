"""The emoji of four vendors from npm packages, as a folder for `coca-jax prepare`.

    pip install resvg-py        # draws openmoji's SVG files
    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    npm pack @lobehub/fluent-emoji-3d@1.1.0 openmoji@17.0.0
    python benchmarks/emoji.py --packages=. --out=emoji
    coca-jax prepare --format=imagefolder --input=emoji --out=data/emoji

Names and groups are those of emoji-datasource, and the concepts those that it has: 1,911 without
variants of skin. Licences: google Apache-2.0, twitter CC-BY-4.0, fluent MIT, openmoji CC-BY-SA-4.0.
"""

from __future__ import annotations

import argparse
import io
import json
import pathlib
import sys
import tarfile

from PIL import Image

SIZE = 72
# Vendor -> (start of the package's file name, where a drawing of a code point lies in it).
VENDORS = {
    "google": ("emoji-datasource-google-", "package/img/google/64/{lower}.png"),
    "twitter": ("emoji-datasource-twitter-", "package/img/twitter/64/{lower}.png"),
    "fluent": ("lobehub-fluent-emoji-3d-", "package/assets/{lower}.webp"),
    "openmoji": ("openmoji-", "package/color/svg/{upper}.svg"),
}


def archive(folder: pathlib.Path, start: str) -> pathlib.Path:
    """The package whose file name begins so. SystemExit where there is none, or several."""
    found = sorted(p for p in folder.glob(f"{start}*.tgz") if p.name[len(start)].isdigit())
    if len(found) != 1:
        raise SystemExit(f"{folder}: {len(found)} files {start}*.tgz, one is wanted; see --help")
    return found[0]


def places(one: dict, pattern: str) -> list[str]:
    """Where the drawing of an emoji may lie in a package: with and without variation selectors."""
    codes = [one["unified"], one.get("non_qualified") or ""]
    codes += ["-".join(c for c in one["unified"].split("-") if c != "FE0F")]
    return [pattern.format(lower=c.lower(), upper=c.upper()) for c in codes if c]


def opened(data: bytes, vector: bool) -> Image.Image:
    """A drawing, RGBA, SIZE x SIZE."""
    if vector:
        import resvg_py

        data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), width=SIZE, height=SIZE))
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def main() -> None:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packages", required=True, type=pathlib.Path, help="folder of the .tgz")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder to write")
    args = parser.parse_args()
    files = {name: archive(args.packages, start) for name, (start, _) in VENDORS.items()}
    with tarfile.open(files["google"]) as tar:
        concepts = json.load(tar.extractfile("package/emoji.json"))
    lines = []
    for vendor, (_, pattern) in VENDORS.items():
        wanted = {place: one for one in concepts for place in reversed(places(one, pattern))}
        (args.out / vendor).mkdir(parents=True, exist_ok=True)
        done = set()
        with tarfile.open(files[vendor]) as tar:
            for member in tar:
                one = wanted.get(member.name)
                if one is None or one["unified"] in done:
                    continue
                done.add(one["unified"])
                picture = opened(tar.extractfile(member).read(), pattern.endswith(".svg"))
                name = f"{vendor}/{one['unified'].lower()}.png"
                picture.save(args.out / name)
                about = dict(vendor=vendor, concept=one["unified"])
                labels = [one["category"].lower(), one["subcategory"]]
                text = one["name"].lower()
                lines.append(dict(file_name=name, text=text, label=labels) | about)
        print(f"{vendor}: {len(done)} of {len(concepts)}", file=sys.stderr)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (args.out / "metadata.jsonl").write_text(text)
    print(json.dumps(dict(out=str(args.out), drawings=len(lines))))


if __name__ == "__main__":
    main()
