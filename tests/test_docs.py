"""Everything that README and docs tell people to type, run as it stands there.

From the built wheel, in an empty folder, page by page in order, on small stand-in data. Recipes are
made small by flags that are added here; nothing else of a command is changed. What a block needs
and a test does not have (`<!-- needs: ... -->` in the page) is parsed, or run with --dry_run.
"""

import io
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile

import conversion_cases
import docs_walk
import forks
import numpy as np
import pytest
from conftest import COMPILE_FAST
from docs_walk import ROOT, Step
from PIL import Image

SMALL = [
    *("--config.model.image_size=32", "--config.model.patch_size=16"),
    *("--config.model.embed_dim=16", "--config.model.dtype=float32"),
    *("--config.model.image.width=16", "--config.model.image.depth=1"),
    *("--config.model.image.mlp_dim=32", "--config.model.image.num_heads=2"),
    *("--config.model.text.width=16", "--config.model.text.unimodal_depth=1"),
    *("--config.model.text.multimodal_depth=1", "--config.model.text.mlp_dim=32"),
    *("--config.model.text.num_heads=2", "--config.model.text.vocab_size=400"),
    *("--config.model.text.max_len=24", "--config.model.pooler.num_queries=4"),
    "--config.model.pooler.num_heads=2",
]
# Without a convolutional stem, which has more to compile than the rest of an image encoder.
PLAIN = ["--config.model.image.conv_widths=()", "--config.model.image.conv_depths=()"]
# Nor biases, and by AdamW, which has less to compile than Muon and Adafactor.
LEAN = [*PLAIN, "--config.model.bias=False", "--config.optimizer.name=adamw"]
SHORT = ["--config.steps=2", "--config.batch_size=8", "--config.optimizer.warmup_steps=0"]
QUICK = [*SHORT, "--config.eval.tasks=()", "--config.text_lengths=()", "--config.text_parts=1"]
DEMO = [*SMALL, "--config.model.image_size=64", *LEAN, *QUICK]  # a page names this size
# Flags that make a command small: those of the first pattern that it matches.
ADDED: tuple[tuple[str, list[str]], ...] = (
    (r"train .*--config=\S*:", SHORT),  # the model is that of the weights
    (r"train .*--config=(demo|emoji|tiny)", DEMO),
    (r"train .*--config=\S+recipe.py", SHORT),
    (r"train ", [*SMALL, *SHORT]),
    # The choice of the other fits, whose programs are kept.
    (r"fit .*--dry_run", ["--minutes=0.1", *LEAN]),
    (r"fit ", ["--minutes=0.1", "--config.steps=3", *LEAN]),
    # METEOR's tables take Java 5 s to read.
    (r"evaluate (?!.*--tasks)|evaluate .*captioning", ["--nojava_metrics"]),
    (r"benchmark input", ["--seconds=1"]),
    (r"compile .*cpu:", SMALL),
)


def picture(seed: int, size: int = 32) -> Image.Image:
    """Of a size for which `fit` takes its smallest model."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size))


def encoded(seed: int, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    picture(seed).save(out, kind)
    return out.getvalue()


NAMES = ("cat", "dog", "horse")


def imagefolder(folder: pathlib.Path, count: int, **more: str) -> None:
    """Captioned and labelled pictures, with the usual metadata.jsonl."""
    folder.mkdir(parents=True)
    rows = []
    for i in range(count):
        (folder / f"{i:03d}.jpg").write_bytes(encoded(i))
        name = NAMES[i % len(NAMES)]
        text = f"a {name} on field number {i}"
        rows.append(dict(file_name=f"{i:03d}.jpg", text=text, label=name, **more))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def tars(folder: pathlib.Path, count: int) -> None:
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i in range(count):
            for name, data in ((f"{i}.jpg", encoded(i)), (f"{i}.txt", b"a field %d" % i)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def clips(folder: pathlib.Path, count: int) -> None:
    """Animations with a caption and a class each."""
    folder.mkdir()
    rows = []
    for i in range(count):
        first, *rest = [picture(10 * i + frame, 24) for frame in range(4)]
        first.save(folder / f"{i}.gif", save_all=True, append_images=rest)
        name = NAMES[i % len(NAMES)]
        text = f"a {name} that turns, {i}"
        rows.append(dict(file_name=f"{i}.gif", text=text, label=name, split="train"))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> pathlib.Path:
    """The package as its wheel installs it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split("\n") if listed.returncode == 0 else os.listdir(ROOT)
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
        elif (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, dirs_exist_ok=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--no-build-isolation"]  # setuptools is here
    done = subprocess.run(
        [*command, f"--target={target}", str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return target


class Walk:
    """A folder in which the pages are walked, and a Python that stays for their examples."""

    def __init__(self, folder: pathlib.Path, site: pathlib.Path):
        self.folder, self.ran = folder, list[str]()
        paths = [str(site / "bin"), str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
        self.env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        self.env |= dict(
            PATH=":".join(paths),
            PYTHONPATH=str(site),
            JAX_PLATFORMS="cpu",
            XLA_FLAGS=COMPILE_FAST,
            XDG_CACHE_HOME=str(folder.parent / "cache"),
            HOME=str(folder.parent),
        )
        if shutil.which("c++"):  # kernels of models so small need not be quick, but compiled soon
            script = folder.parent / "quick-c++"
            script.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
            script.chmod(0o755)
            self.env["CXX"] = str(script)
        self.server = forks.Server(self.env)
        self.python = subprocess.Popen(
            [sys.executable, "-c", PYTHON],
            cwd=folder,
            env=self.server.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def shell(self, text: str, env: dict[str, str] | None = None) -> None:
        """Runs a command, made small; once, where pages say it word by word alike, as what it made
        stays. Fails with what it said."""
        if text in self.ran:
            return
        done = subprocess.run(
            ["bash", "-c", small(text)],
            cwd=self.folder,
            env=env or self.server.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, f"{small(text)}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
        self.ran.append(text)

    def example(self, page: str, text: str) -> None:
        """Runs Python where the page's earlier examples have run."""
        assert self.python.stdin and self.python.stdout
        self.python.stdin.write(json.dumps([page, text]) + "\n")
        self.python.stdin.flush()
        said = json.loads(self.python.stdout.readline())
        assert not said, f"{text}\n{said}"
        self.ran.append(text)

    def parse(self, text: str) -> None:
        """A command that cannot run here: its flags and recipe are read, a launcher dry-runs."""
        if "launch/" in text:
            if re.search(r"launch/(tpu_vm|gke|slurm|local)\.sh", text):
                text = text.replace(" -- ", " --dry_run -- ", 1)
                self.shell(text)
            else:
                script = re.search(r"launch/[\w.]+", text)
                assert script and (ROOT / script[0]).exists(), text
            return
        text = re.sub(r":(runs/\w+|weights)", ":runs/demo", text)  # weights that are there
        words = re.sub(r"^python3? -m coca_jax\.?", "coca-jax ", text).split()
        if words[0] == "coca-jax":
            done = self.server.run(words[1:], self.folder, {forks.PARSE: "1"})
            assert done.returncode == 0, f"{text}\n{done.stderr[-1500:]}"

    def end(self) -> None:
        self.server.__exit__()
        assert self.python.stdin
        self.python.stdin.close()
        self.python.wait(timeout=60)


PYTHON = """
import contextlib, json, os, shutil, sys, traceback
sys.executable = shutil.which("python")  # by which notebooks start commands: those are forks too
answers = os.fdopen(os.dup(1), "w")  # what examples start must not write among the answers
os.dup2(2, 1)
spaces = {}
for line in sys.stdin:
    page, text = json.loads(line)
    said = ""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            exec(compile(text, page, "exec"), spaces.setdefault(page, {}))
    except BaseException:
        said = traceback.format_exc()
    print(json.dumps(said), file=answers, flush=True)
"""


def small(text: str) -> str:
    """The command with what makes it small behind it, ahead of a here-document or a pipe."""
    words = re.sub(r"python3? -m coca_jax\.?", "coca-jax ", text)
    for pattern, flags in ADDED:
        if re.search(rf"coca-jax +{pattern}", words):
            return " ".join([text, *map(shlex.quote, flags)])
    return text


@pytest.fixture(scope="module")
def walk(tmp_path_factory, site):
    folder = tmp_path_factory.mktemp("walk") / "empty"
    imagefolder(folder / "FOLDER", 40)
    imagefolder(folder / "IMAGES", 24)
    imagefolder(folder / "photos", 24)  # of which a tenth, by name, is one
    imagefolder(folder / "more", 1)
    tars(folder / "laion", 12)
    for number, name in enumerate(("cat.jpg", "dog.jpg", "shapes.png", "more/cat.jpg")):
        picture(100 + number).save(folder / name)
    (folder / "launch").symlink_to(ROOT / "launch")
    conversion_cases.write_source(folder / "DIR", conversion_cases.small_weights())
    clips(folder / "CLIPS", 6)
    for name in ("a.mp4", "b.gif"):  # content decides, not the name
        shutil.copy(folder / "CLIPS/0.gif", folder / name)
    found = Walk(folder, site)
    # What launch/demo.sh trains, by the program that the wheel installs; all others are forks.
    found.shell("coca-jax train --config=demo --workdir=runs/demo", found.env)
    # What README begins with, which other pages go on with in whichever order they are read.
    found.shell("coca-jax fit FOLDER --workdir=runs/mine --minutes=10")
    found.shell("coca-jax prepare --input=FOLDER --out=data/mine --holdout=0.1")
    yield found
    found.end()


@pytest.mark.parametrize("page", docs_walk.PAGES)
@pytest.mark.long
def test_a_page_s_commands_and_examples_do_what_it_says(page, walk):
    for step in docs_walk.steps(page):
        run(step, walk)
    whole = [step.text for step in docs_walk.steps(page) if not step.needs]
    assert [t for t in whole if t not in walk.ran and not t.startswith(("pip ", "uv "))] == []


# What takes the place of a notebook's cell of parameters, so that it is quick.
PARAMETERS = {
    "train_and_caption.ipynb": f'RUN = "runs/notebook"; FLAGS = {DEMO}',
    "search_a_folder.ipynb": 'WEIGHTS = "runs/demo"; FOLDER = "pictures"',
}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda p: p.name)
@pytest.mark.long
def test_a_notebook_s_cells_run_in_their_order(path, walk):
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert tagged == cells[:1]
    for text in (PARAMETERS[path.name], *("".join(c["source"]) for c in cells[1:])):
        walk.example(path.name, text)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda p: p.name)
def test_a_notebook_calls_the_package_of_its_own_kernel(path):
    """Whose environment need not be on PATH."""
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    text = "".join("".join(c["source"]) for c in cells)
    assert '"coca-jax"' not in text and '[sys.executable, "-m", "coca_jax"]' in text


def run(step: Step, walk: Walk) -> None:
    """One step. pip is not run: a test installs nothing into the environment that it runs in."""
    if step.text.startswith(("pip ", "uv ")):
        assert "coca_jax" not in step.text.replace("coca_jax-", ""), (
            f"{step.page}: {step.text}: there is no such name on an index"
        )
    elif step.needs:
        if step.language == "python":
            compile(step.text, step.page, "exec")
        else:
            walk.parse(step.text)
    elif step.language == "python":
        walk.example(step.page, step.text)
    else:
        walk.shell(step.text)


def test_every_page_is_walked():
    """A page that is new, or a command behind an unusual prompt, is found."""
    found = sum(len(docs_walk.steps(page)) for page in docs_walk.PAGES)
    assert found >= 40
    for page in docs_walk.PAGES:
        text = (ROOT / page).read_text()
        text = docs_walk.BLOCK.sub(lambda b: "" if b["kind"] == "not run" else b[0], text)
        mentioned = len(re.findall(r"^(?: {4})?(?:python -m coca_jax|coca-jax )", text, re.M))
        walked = [
            s for s in docs_walk.steps(page) if re.match(r"(python -m coca_jax|coca-jax )", s.text)
        ]
        assert len(walked) >= mentioned, f"{page}: {mentioned} commands, {len(walked)} found"
