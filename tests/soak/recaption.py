"""Kills recaptioning again and again, at any moment; each work must end as an undisturbed one does.

    python tests/soak/recaption.py --checkpoint=runs/demo --kills=100 --dtype=bfloat16

Drawn pictures in tars are captioned once without a kill. Then works begin, each in a folder of its
own; SIGKILL comes a random time after each start, and the work is started again until it ends by
itself. All files must then be those of the undisturbed work, to the byte. Starts are forks of an
interpreter that has imported everything and begun nothing. The last line of output is one JSON
object; the exit status is 0 when no file differs.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import time

from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import forks  # noqa: E402

from coca_jax.data.synthetic_source import Scenes  # noqa: E402

TARS, PICTURES = 4, 40  # of each tar
HOW = "--how=nucleus,num_return_sequences=2,max_new_tokens=20"
SIZES = ("--batch_size=8", "--rows=16", "--part=8", "--embeddings")
STARTS = 50  # of a work that is to end by itself: one that never does has failed


def draw(folder: pathlib.Path) -> None:
    """Writes tars of pictures with texts, one picture of which is none."""
    records = Scenes().read(range(TARS * PICTURES))
    for number in range(TARS):
        with tarfile.open(folder / f"{number:03d}.tar", "w") as archive:
            for n in range(number * PICTURES, (number + 1) * PICTURES):
                out = io.BytesIO()
                Image.fromarray(records[n]["image"]).save(out, "PNG")
                data = b"no picture" if n == PICTURES + 3 else out.getvalue()
                for name, content in (("png", data), ("txt", records[n]["text"].encode())):
                    member = tarfile.TarInfo(f"{n:05d}.{name}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def start(arguments: list[str], log: pathlib.Path) -> int:
    """The process id of a command that was started."""
    child = os.fork()
    if not child:
        streams = [os.open(os.devnull, os.O_RDONLY)]
        streams += [os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)] * 2
        forks.run(arguments, str(log.parent), dict(os.environ), streams)
    return child


def tree(root: pathlib.Path) -> dict[str, bytes]:
    """{path: bytes} of the files of a folder."""
    found = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def work(
    arguments: list[str], folder: pathlib.Path, seconds: float, draws: random.Random, kills: int
) -> list[int]:
    """Starts a work until it ends by itself, killing each start but the last ones; the files that
    were there at each kill. Raises RuntimeError: it ended with an error, or did not end."""
    log, there = folder / "log", []
    for _ in range(STARTS):
        child, end = start(arguments, log), time.monotonic() + draws.uniform(0, seconds)
        while len(there) < kills and time.monotonic() < end:
            if os.waitpid(child, os.WNOHANG)[0]:
                return there
            time.sleep(0.002)
        if len(there) < kills:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            return there
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            break
        there.append(len(tree(folder / "out")))
    raise RuntimeError(f"{folder} did not end: {log.read_text()[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="a run, or an export")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in ("recaption", "recaptioning.running", "recaptioning.whole", "inference"):
        importlib.import_module(f"coca_jax.cli.{name}")
    draws, kept, works, differences = random.Random(args.seed), [], 0, set()
    with tempfile.TemporaryDirectory() as scratch:
        root = pathlib.Path(scratch)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "compiled"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
        (root / "tars").mkdir()
        draw(root / "tars")
        checkpoint = pathlib.Path(args.checkpoint).resolve()
        arguments = ["recaption", f"--checkpoint={checkpoint}", f"--input={root}/tars", HOW, *SIZES]
        arguments += [f"--dtype={args.dtype}", "--format=webdataset"]

        def done(folder: pathlib.Path, seconds: float, kills: int) -> dict[str, bytes]:
            folder.mkdir()
            kept.extend(work([*arguments, f"--out={folder}/out"], folder, seconds, draws, kills))
            files = tree(folder / "out")
            shutil.rmtree(folder)
            return files

        done(root / "compiling", 0, 0)
        begun = time.monotonic()
        calm = done(root / "calm", 0, 0)
        seconds = time.monotonic() - begun
        print(f"{len(calm)} files in {seconds:.1f} s", flush=True)
        while len(kept) < args.kills:
            files = done(root / f"work-{works}", seconds, args.kills - len(kept))
            works += 1
            names = {n for n in calm.keys() | files.keys() if calm.get(n) != files.get(n)}
            differences |= names
            print(f"{len(kept)} kills, {works} works: {sorted(names)}", flush=True)
    told = dict(kills=len(kept), works=works, differences=sorted(differences), files=len(calm))
    told |= dict(kills_with_files=sum(map(bool, kept)), dtype=args.dtype)
    print(json.dumps(told))
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
