"""Duplicates: over splits of one import, of pairs of images, and of rows that name one file."""

import io
import json

import pytest
from PIL import Image
from prepare_cases import encode, import_data

from coca_jax.data import sources
from coca_jax.importers.items import Options
from coca_jax.importers.splits import prepare_with_holdout

BIG = (96, 72)


def write_rows(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def pairs(tmp_path):
    """Pairs of files: of six pictures, and of two of them in other files, and of other bytes."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for n in range(6):
        (folder / f"{n}.jpg").write_bytes(encode(n, size=BIG))
    for n in (0, 1):
        (folder / f"copy{n}.jpg").write_bytes(encode(n, size=BIG))
        out = io.BytesIO()
        Image.open(io.BytesIO(encode(n, size=BIG))).save(out, "PNG")
        (folder / f"png{n}.png").write_bytes(out.getvalue())
    named = ["0 1", "0 2", "1 0", "copy0 copy1", "copy0 2", "png0 png1", "3 4", "5 3"]
    endings = {n: ".png" if n.startswith("png") else ".jpg" for row in named for n in row.split()}
    rows = [[one + endings[one] for one in row.split()] for row in named]
    told = [dict(left=left, right=right, text=f"{n}") for n, (left, right) in enumerate(rows)]
    write_rows(folder, told)
    return folder


def read_pairs(pairs, out, **options):
    done = import_data("imagefolder", pairs, out, image_field="left,right", **options)
    return done, [int(record.texts[0]) for record in sources.open_source(str(out))]


@pytest.mark.parametrize("prepared_before", [False, True])
def test_a_holdout_of_pairs_is_refused(prepared_before, pairs, tmp_path):
    """By the first image alone, all that stood in the held-out pairs trained as well."""
    where, options = ("imagefolder", str(pairs)), Options(image_field="left,right")
    if prepared_before:
        read_pairs(pairs, tmp_path / "made")
        where, options = ("prepared", str(tmp_path / "made")), Options()
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="--holdout keeps no pairs of images apart.*'split'"):
        prepare_with_holdout(*where, str(out), 0.5, options=options, processes=1, progress=False)
    assert not out.exists()
