"""Whatever a command is given in place of what it wants, it says so in a line and ends with 2."""

import io
import os
import socket

import docs_walk
import forks
import pytest
from PIL import Image

# How each command is given a bad path; the rest of it is good, or not looked at before.
PLACES = {
    "train --config": ["train", "--config={}", "--workdir=run"],
    "train --workdir": ["train", "--config=tiny", "--workdir={}/run"],
    "train --data": ["train", "--config=tiny", "--workdir=run", "--data={}"],
    "train vocabulary": ["train", "--config=tiny", "--workdir=run", "--config.data.vocabulary={}"],
    "train init_from": ["train", "--config=tiny", "--workdir=run", "--config.init_from={}"],
    "fit": ["fit", "{}", "--workdir=run", "--dry_run"],
    "evaluate --checkpoint": ["evaluate", "--checkpoint={}", "--data=scenes", "--tasks=retrieval"],
    "caption --checkpoint": ["caption", "--checkpoint={}", "image.png"],
    "convert --input": ["convert", "--input={}", "--out=out"],
    "convert .safetensors": ["convert", "--input={}.safetensors", "--out=out"],
    "convert --to": ["convert", "--input={}", "--out=out", "--to=open_clip"],
    "compile --config": ["compile", "--config={}", "--topology=cpu:1"],
    "export --checkpoint": ["export", "--checkpoint={}", "--out=out"],
    "search index": ["search", "index", "{}", "--checkpoint=empty", "--out=new"],
    "search --checkpoint": ["search", "index", "pictures", "--checkpoint={}", "--out=new"],
    "search --index": ["search", "query", "a cat", "--index={}"],
    "recaption --input": ["recaption", "--input={}", "--checkpoint=empty", "--out=new"],
    "recaption --checkpoint": ["recaption", "--input=pictures", "--checkpoint={}", "--out=new"],
    "report --workdir": ["report", "--workdir={}"],
    "benchmark --config": ["benchmark", "input", "--config={}"],
    "prepare --input": ["prepare", "--input={}", "--out=data"],
    "prepare --out": ["prepare", "--input=pictures", "--out={}/data"],
    "prepare --class_names": ["prepare", "--input=pictures", "--out=data", "--class_names={}"],
    "prepare --exclude": ["prepare", "--input=pictures", "--out=data", "--exclude={}"],
    "prepare vocabulary": ["prepare", "vocabulary", "--input={}", "--out=words.model"],
} | {
    f"prepare {format}": ["prepare", f"--format={format}", "--input={}", "--out=data"]
    for format in ("imagefolder", "webdataset", "csv", "parquet", "prepared")
}  # fmt: skip
BAD = ("missing", "folder", "empty", "junk", "cut", "pipe", "zero", "socket", "loop", "long",
       "caf\udce9", "text", "json", "zip")  # fmt: skip
# Places that may be missing: they are made.
MADE = ("train --workdir", "prepare --out")
# Any text is a list of names.
GOOD = {("prepare --class_names", kind) for kind in ("caf\udce9", "text", "json")}


def _surroundings(folder):
    """Makes the bad files; {kind: its path}."""
    paths = {kind: kind for kind in BAD}
    (folder / "folder").mkdir()
    (folder / "pictures" / "cat").mkdir(parents=True)
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 20, 30)).save(out, "PNG")
    picture = out.getvalue()
    (folder / "pictures/cat/a.png").write_bytes(picture)
    (folder / "image.png").write_bytes(picture)
    (folder / "empty").touch()
    (folder / "junk").write_bytes(bytes(range(256)) * 9)
    (folder / "cut").write_bytes(picture[: len(picture) // 2])
    os.mkfifo(folder / "pipe")
    paths["zero"] = "/dev/zero"
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(folder / "socket"))
    (folder / "loop").symlink_to("loop")
    paths["long"] = "x" * 5000
    (folder / "caf\udce9").write_bytes(b"a name that is not UTF-8")
    (folder / "text").write_text("one line\nanother line\n")
    (folder / "json").write_text('{"a": [1]}\n')
    (folder / "zip").write_bytes(b"PK\x05\x06" + bytes(18))
    for kind in BAD:  # the same under the name that a format asks for
        if (
            kind not in ("missing", "long", "zero")
            and not (folder / f"{kind}.safetensors").exists()
        ):
            (folder / f"{kind}.safetensors").symlink_to(kind)
    return paths


def run_all(folder, pairs):
    """{(place, kind): (status, what was said)} of commands, each in a fork of one interpreter."""
    paths = _surroundings(folder)
    cases = [[one.replace("{}", paths[kind]) for one in PLACES[place]] for place, kind in pairs]
    env = os.environ | {"PYTHONPATH": str(docs_walk.ROOT), "JAX_PLATFORMS": "cpu"}
    with forks.Server(env) as server:
        done = [server.run(arguments, folder, timeout=600) for arguments in cases]
    return {pair: (one.returncode, one.stderr) for pair, one in zip(pairs, done)}


def wrong(found):
    """Those that are not one line and status 2."""
    bad = {}
    for (place, kind), (status, said) in found.items():
        last = said.splitlines()[-1] if said else ""
        fine = status == 2 and last.startswith("error: ") and "Traceback" not in said
        if not fine:
            bad[place, kind] = (status, said[-600:])
    return bad


def test_a_bad_path_is_one_line(tmp_path):
    """Each place of the commands that start at once, with another thing that it is not."""
    quick = ("prepare", "convert", "report", "fit")
    places = [place for place in PLACES if place.startswith(quick) and place not in MADE]
    pairs = [(place, BAD[n % len(BAD)]) for n, place in enumerate(places)]
    assert wrong(run_all(tmp_path, pairs)) == {}


@pytest.mark.slow
def test_every_bad_path_is_one_line(tmp_path):
    """Each place, with all that it is not: 427 starts of commands."""
    fine = GOOD | {(place, kind) for place in MADE for kind in ("missing", "folder")}
    pairs = [(place, kind) for place in PLACES for kind in BAD if (place, kind) not in fine]
    assert wrong(run_all(tmp_path, pairs)) == {}
