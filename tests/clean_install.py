"""Runs the README's commands as a newcomer does: the wheel, alone, in an empty environment and an
empty folder, then with the extras that some commands need. launch/wheel_test.sh starts it; a
package that only the tests' own environment has is missing here.

Names of public weights resolve to a local server with random weights in the public layout.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import urllib.request

import hub_stand_in
import numpy as np
from conftest import COMPILE_FAST
from docs_walk import ROOT, steps
from PIL import Image
from test_hub import open_clip_weights

import coca_jax
from coca_jax.interop import hub

COLORS = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 220)}
# Few steps of a model with little to compile; a fit of its own choice would train for minutes.
FEW = (
    *("--config.steps=2", "--config.text_lengths=()", "--config.text_parts=1"),
    *("--config.model.image.conv_widths=()", "--config.model.image.conv_depths=()"),
    "--config.optimizer.name=adamw",
)
BARE = (
    ("train", "--config=tiny", "--workdir=runs/demo", *FEW),
    ("caption", "--checkpoint=runs/demo", "photos/"),
    ("fit", "photos", "--workdir=runs/mine", "--minutes=1", *FEW),
    ("prepare", "--input=photos", "--out=data/mine", "--holdout=0.2"),
    ("evaluate", "--checkpoint=runs/demo", "--data=data/mine", "--tasks=retrieval,captioning"),
    ("export", "--checkpoint=runs/demo", "--out=exported"),
    ("search", "index", "photos", "--checkpoint=runs/demo", "--out=photos.index"),
    ("search", "query", "a red square", "--index=photos.index"),
    ("search", "duplicates", "--index=photos.index"),
    ("convert", "--help"),
)
BARE_OUTPUTS = (
    *("runs/demo/report.html", "runs/demo/config.json", "runs/mine/report.html"),
    *("runs/mine/recipe.py", "runs/mine/export/config.json", "exported/config.json"),
    *("data/mine/manifest.json", "photos.index/metadata/metadata_0.jsonl"),
)
EXTRAS = "hf,serve"
PUBLIC = "coca_ViT-L-14:mscoco_finetuned_laion2b_s13b_b90k"
WITH_EXTRAS = (
    ("caption", f"--checkpoint={PUBLIC}", "--max_new_tokens=4", "photos/0.png"),
    ("search", "index", "photos", f"--checkpoint={PUBLIC}", "--out=public.index"),
)
EXTRA_OUTPUTS = ("public.index/metadata/metadata_0.jsonl",)
SERVE = "serve"


def covered() -> set[str]:
    return {command[0] for command in (*BARE, *WITH_EXTRAS)} | {SERVE}


def write_photos(folder: pathlib.Path) -> None:
    folder.mkdir()
    rows = []
    for number in range(60):
        color = list(COLORS)[number % 3]
        pixels = np.random.default_rng(number).integers(0, 40, (32, 32, 3)) + COLORS[color]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        row = dict(file_name=f"{number}.png", text=f"a {color} square, number {number}")
        rows.append(json.dumps(row) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))


class Install:
    """A virtual environment with the wheel in it."""

    def __init__(self, name: str, wheel: pathlib.Path, extras: str, root: pathlib.Path):
        self._bin, self._folder = root / name / "bin", root / "work"
        self._env = dict(
            PATH=f"{self._bin}:/usr/bin:/bin",
            HOME=str(root / "home"),
            JAX_PLATFORMS="cpu",
            XLA_FLAGS=COMPILE_FAST,
            JAX_COMPILATION_CACHE_DIR=str(root / "compiled"),
        )
        uv = pathlib.Path(sys.executable).with_name("uv")
        target = f"{wheel}[{extras}]" if extras else str(wheel)
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, root / name], check=True)
        subprocess.run(
            [uv, "pip", "install", "--quiet", "--python", self._bin / "python", target], check=True
        )

    def size(self) -> int:
        """MiB of the packages."""
        (packages,) = self._bin.parent.glob("lib/python*/site-packages")
        return int(subprocess.check_output(["du", "-sm", packages]).split()[0])

    def run(self, command: tuple[str, ...], **env: str) -> None:
        start = time.time()
        done = subprocess.run(
            [self._bin / "coca-jax", *command],
            cwd=self._folder,
            env=self._env | env,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            fail(f"coca-jax {' '.join(command)}: status {done.returncode}\n{done.stderr[-3000:]}")
        print(f"wheel: {time.time() - start:5.0f} s  coca-jax {' '.join(command)}", flush=True)

    def serve(self) -> None:
        """Starts the server, waits for its page, and ends it."""
        command = [self._bin / "coca-jax", SERVE, "--checkpoint=runs/demo", "--port=8731"]
        process = subprocess.Popen(command, cwd=self._folder, env=self._env)
        try:
            for _ in range(300):
                time.sleep(1)
                if process.poll() is not None:
                    fail(f"coca-jax serve ended with status {process.returncode}")
                try:
                    page = urllib.request.urlopen("http://127.0.0.1:8731/").read()
                except OSError:
                    continue
                if b"<html" not in page.lower():
                    fail("coca-jax serve answers no page")
                return
            fail("coca-jax serve does not answer within 300 seconds")
        finally:
            process.terminate()
            process.wait()

    def check(self, outputs: tuple[str, ...]) -> None:
        missing = [name for name in outputs if not (self._folder / name).exists()]
        if missing:
            there = sorted(p.relative_to(self._folder).as_posix() for p in self._folder.glob("*/*"))
            fail(f"not written: {', '.join(missing)}; there are {', '.join(there)}")


def fail(text: str) -> None:
    raise SystemExit(f"wheel: {text}")


def main() -> None:
    shell = [step.text.split() for step in steps("README.md") if step.language == "shell"]
    named = {words[1] for words in shell if words[0] == "coca-jax"}
    if named - covered():
        fail(f"README.md names {', '.join(sorted(named - covered()))}; run it in {__file__} too")
    with tempfile.TemporaryDirectory(prefix="coca-jax-wheel-") as folder:
        root = pathlib.Path(folder)
        (root / "work").mkdir()
        build = [sys.executable, "-c", "from setuptools import build_meta as b; b.build_sdist"]
        build[-1] += f"({str(root)!r})"
        subprocess.run(build, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (source,) = root.glob("*.tar.gz")
        uv = pathlib.Path(sys.executable).with_name("uv")
        # From the source archive, so that nothing is left in this folder.
        subprocess.run([uv, "build", "--quiet", "--wheel", "--out-dir", root, source], check=True)
        (wheel,) = root.glob("*.whl")
        write_photos(root / "work/photos")
        bare = Install("bare", wheel, "", root)
        print(f"wheel: {bare.size()} MB of packages without extras, before Python compiles them")
        for command in BARE:
            bare.run(command)
        bare.check(BARE_OUTPUTS)
        more = Install("more", wheel, EXTRAS, root)
        for name, tag in coca_jax.list_pretrained():
            place = hub.resolve(name, tag).removeprefix("hf-hub:")
            if place.startswith("laion/"):
                open_clip_weights(root / "hub" / place)
        with hub_stand_in.Hub(root / "hub") as server:
            for command in WITH_EXTRAS:
                more.run(command, HF_ENDPOINT=server.url)
        more.check(EXTRA_OUTPUTS)
        more.serve()


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
