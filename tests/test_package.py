"""The source archive and the wheel: what they hold, and the recipes and commands of the wheel."""

import ast
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
OWN = """
from coca_jax.recipes import tiny


def get_config(size="16"):
    config = tiny.get_config()
    config.batch_size = int(size)
    return config
"""
# What is asked of the wheel in one interpreter, from an empty folder.
ASK = """
import json, sys
import coca_jax
from coca_jax.training import recipes
values = {value: recipes.load(value).batch_size for value in sys.argv[1:]}
print(json.dumps(dict(file=coca_jax.__file__, names=list(recipes.names()), values=values)))
"""
# What the script that an installer writes does.
SCRIPT = """
import sys
from importlib.metadata import entry_points
(command,) = {e.value: e for e in entry_points(group="console_scripts", name="coca-jax")}.values()
sys.exit(command.load()())
"""


def build(kind: str, source: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """Calls the build backend as an installer does; kind: 'sdist' or 'wheel'."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (made,) = out.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return made


def files_of(folder: pathlib.Path) -> set[str]:
    found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What of this checkout belongs to the product, in a folder of its own."""
    copy = tmp_path_factory.mktemp("source") / "coca_jax"
    copy.mkdir()
    for name in ("coca_jax", "configs", "docs", "launch", "tests", ".ci"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for pattern in ("*.md", "*.py", "*.toml", "LICENSE", "MANIFEST.in"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, copy)
    return copy


@pytest.fixture(scope="module")
def archive(source, tmp_path_factory):
    """The source archive, unpacked."""
    wanted, folder = files_of(source), tmp_path_factory.mktemp("archive")
    with tarfile.open(build("sdist", source, folder)) as tar:
        tar.extractall(folder, filter="data")
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    return wanted, unpacked


@pytest.fixture(scope="module")
def wheel(archive, tmp_path_factory):
    """The wheel that the source archive gives, unpacked as an installer does it."""
    made = build("wheel", archive[1], tmp_path_factory.mktemp("wheel"))
    target = tmp_path_factory.mktemp("target")
    with zipfile.ZipFile(made) as file:
        file.extractall(target)
    return target


def run(wheel, folder, code, *arguments):
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(wheel), "HOME": str(folder)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_the_source_archive_holds_what_a_clone_holds(archive):
    wanted, unpacked = archive
    missing = wanted - files_of(unpacked)
    assert not missing
    assert {"tests/conftest.py", "tests/golden/tiny.pt", "configs/base.py"} <= wanted


def test_the_wheel_holds_the_package_its_data_and_the_recipes(wheel):
    found = files_of(wheel)
    package = {f"coca_jax/{name}" for name in files_of(ROOT / "coca_jax")}
    assert package - found == set()
    assert {f"coca_jax/recipes/{name}" for name in files_of(ROOT / "configs")} <= found
    assert {"coca_jax/py.typed", "coca_jax/ops/cpu_kernels/decode_kernels.cc"} <= found
    assert {
        "coca_jax/evaluation/templates/report.html",
        "coca_jax/apps/serve/page/serve.js",
    } <= found
    assert {name.split("/")[0] for name in found if ".dist-info" not in name} == {"coca_jax"}


def test_recipes_of_the_wheel_load_from_an_empty_folder(wheel, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/mine.py").write_text(OWN)
    values = ["coca_large", "configs/coca_large.py", "own/mine.py", "own/mine.py:24"]
    done = run(wheel, tmp_path, ASK, *values)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert pathlib.Path(found["file"]).is_relative_to(wheel)
    assert {"demo", "coca_2b", "tiny"} < set(found["names"])
    assert list(found["values"].values()) == [65536, 65536, 16, 24]


def test_the_command_of_the_wheel_works_from_an_empty_folder(wheel, tmp_path):
    listed = run(wheel, tmp_path, SCRIPT)
    assert listed.returncode == 0 and "\n  train " in listed.stdout
    (tmp_path / "photos/cat").mkdir(parents=True)
    for index in range(3):
        Image.new("RGB", (20, 20), (80 * index, 0, 0)).save(tmp_path / f"photos/cat/{index}.png")
    done = run(wheel, tmp_path, SCRIPT, "prepare", "--input=photos", "--out=data/mine")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["written"] == 3
    wrong = run(wheel, tmp_path, SCRIPT, "train", "--config=coca_lrge", "--workdir=run")
    assert wrong.returncode == 2 and "did you mean coca_large" in wrong.stderr
    assert wrong.stderr.count("\n") == 1


# Modules whose distribution has another name.
OF_MODULE = dict(
    PIL="pillow",
    absl="absl_py",
    cv2="opencv_python_headless",
    google="protobuf",
    open_clip="open_clip_torch",
    open_clip_train="open_clip_torch",
    orbax="orbax_checkpoint",
    yaml="pyyaml",
)
NOT_IMPORTED = {"filelock", "flatbuffers"}  # JAX's, see setup.py


def distributions() -> tuple[set[str], set[str]]:
    """What setup.py asks for at every install, and all that its extras name."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    found: list[set[str]] = [set(), set()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if name := re.match(r"[A-Za-z][\w.-]*(?=$|[\[<>=])", node.value):
                found[1].add(name[0].lower().replace("-", "_"))
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            wanted = [re.match(r"[\w.-]+", one)[0] for one in ast.literal_eval(node.value)]
            found[0] = {name.lower().replace("-", "_") for name in wanted}
    return found[0], found[1]


def imported() -> dict[str, str]:
    """{distribution: a file that imports it} of the package and its recipes."""
    found = {}
    for path in (*(ROOT / "coca_jax").rglob("*.py"), *(ROOT / "configs").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module]
            for module in (name.split(".")[0] for name in modules):
                if module not in sys.stdlib_module_names and module != "coca_jax":
                    found[OF_MODULE.get(module, module).lower()] = str(path)
    return found


def test_what_is_imported_is_asked_for_and_the_other_way_round():
    always, named = distributions()
    used = imported()
    assert len(always) > 20 and len(used) > 30
    assert not {name: path for name, path in used.items() if name not in named}
    assert always - set(used) == NOT_IMPORTED
