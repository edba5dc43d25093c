"""What launchers install: the very archive of tpu_vm.sh, by launch/install.sh, and the image.

The Python of these tests' slices is one whose environments see the packages of this one, so that
only coca_jax itself is installed; a whole clean install takes minutes.
"""

import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig

import launch_stand_ins
import pytest
from conftest import COMPILE_FAST
from launch_stand_ins import LAUNCH, launch, program

from coca_jax.runtime.metric_log import read_metrics

ROOT = LAUNCH.parent
PACKAGES = sysconfig.get_path("purelib")
ALONE = {"PIP_FLAGS": "--no-deps --no-build-isolation", "JAX_PLATFORMS": "cpu"}
ALONE |= {"XLA_FLAGS": COMPILE_FAST, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def python_with_packages(folder):
    """A Python in `folder`, the packages of this one in every environment that it makes; pip among
    them, of which a copy of an environment's own takes ten seconds."""
    without = "--without-pip" if importlib.util.find_spec("pip") else ""
    text = f"""#!/usr/bin/env bash
[[ "$1 $2" == "-m venv" ]] || exec {sys.executable} "$@"
{sys.executable} -m venv {without} "${{@:3}}" || exit
echo {PACKAGES} >"$(echo "${{@: -1}}"/lib/python*/site-packages)/p.pth"
"""
    return program(folder / "python3", text)


@pytest.fixture(scope="module")
def slice_run(tmp_path_factory):
    """A run on a slice whose line drops once and which is then taken away, to its end."""
    folder = tmp_path_factory.mktemp("slice")
    workdir = folder / "bucket/run"
    env = launch_stand_ins.cloud(folder / "cloud") | ALONE | {"EXTRAS": ""}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}  # the second life takes it over
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    python_with_packages(folder / "cloud/bin")
    (folder / "cloud/faults").write_text("drop 3\npreempt 6\n")
    flags = ["--config=configs/tiny.py", "--config.steps=18", f"--workdir={workdir}"]
    flags += ["--config.model.bias=False", "--config.optimizer.name=adamw"]  # less to compile
    done = launch("tpu_vm.sh", "all", "--", *flags, **env, WORKDIR=str(workdir))
    return done, workdir, (folder / "cloud/calls").read_text()


@pytest.mark.long
def test_a_run_on_a_slice_goes_on_after_a_dropped_line_and_a_preemption(slice_run):
    done, workdir, calls = slice_run
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in read_metrics(str(workdir))] == list(range(1, 19))
    kinds = [line.split()[3] for line in calls.splitlines() if "describe" not in line]
    first, again = ["create", "scp", "ssh", "ssh"], ["delete", "create", "scp", "ssh", "ssh"]
    assert kinds == [*first, "ssh", *again, "delete"], done.stdout + done.stderr


@pytest.mark.long
def test_a_run_on_a_slice_shows_train_s_result_and_the_steps_of_installing(slice_run):
    done, workdir, _ = slice_run
    assert json.loads(done.stdout.splitlines()[-1])["workdir"] == str(workdir)
    for step in ("making the environment", "installing coca_jax", "ready after"):
        assert len(re.findall(f"^install.sh: {step}", done.stdout + done.stderr, re.M)) == 2


def tree(archive):
    names = subprocess.run(["tar", "-tzf", archive], capture_output=True, text=True).stdout
    return set(names.replace("./", "").splitlines())


def test_the_archive_is_the_product_and_nothing_of_the_user_s(tmp_path):
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".*", "tests", "runs"))
    for path in (
        "tests/test_x.py",
        "configs/mine.py",
        "data/x",
        "runs/x",
        ".venv/x",
        "pictures/x",
        "coca_jax/gone.py",
    ):
        program(checkout / path, "")
    shutil.copy(ROOT / ".gitignore", checkout)
    for command in (
        ["init", "-q"],
        ["add", "coca_jax", "configs/tiny.py", "launch", "setup.py", "tests"],
    ):
        subprocess.run(["git", *command], cwd=checkout, check=True)
    (checkout / "coca_jax/gone.py").unlink()
    env, _ = launch_stand_ins.train_with(tmp_path, [])
    env |= launch_stand_ins.cloud(tmp_path / "cloud")
    names = {}
    for kind in ("git", "plain"):
        launch("tpu_vm.sh", "create", **env)
        done = subprocess.run(
            ["bash", "launch/tpu_vm.sh", "install"], cwd=checkout, env=env, capture_output=True
        )
        assert done.returncode == 0, done.stderr
        names[kind] = tree(tmp_path / "cloud/0/coca_jax.tar.gz")
        launch("tpu_vm.sh", "delete", **env)
        shutil.rmtree(checkout / ".git", ignore_errors=True)
    code = {str(p.relative_to(ROOT)) for p in ROOT.glob("coca_jax/**/*.py")}
    assert code | {"configs/mine.py", "configs/tiny.py", "setup.py"} <= names["git"]
    assert names["git"] <= names["plain"] and "README.md" in names["plain"]
    for name in names["git"] | names["plain"]:
        assert not name.startswith(("data/", "runs/", ".venv/", "pictures/", "tests/")), name
        assert "__pycache__" not in name and name != "coca_jax/gone.py"


def test_a_slice_s_run_outlives_its_launcher_and_stops_when_asked(tmp_path):
    env, calls = launch_stand_ins.train_with(tmp_path, ["wait", "wait"])
    env |= launch_stand_ins.cloud(tmp_path / "cloud", workers=2)
    for command in ("create", "install"):
        assert launch("tpu_vm.sh", command, **env).returncode == 0
    flags = ["--", "--workdir=gs://b/r"]
    command = ["bash", str(LAUNCH / "tpu_vm.sh"), "run", *flags]
    killed = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, start_new_session=True)
    assert killed.stdout.readline() == killed.stdout.readline() == b"waits\n"  # both workers
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    busy = launch("tpu_vm.sh", "install", **env)
    assert busy.returncode == 2 and "train runs here; stop it first" in busy.stderr
    other = launch("tpu_vm.sh", "run", *flags, "--config.seed=1", **env)
    assert other.returncode == 2 and "other flags: --workdir=gs://b/r" in other.stderr
    again = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert again.stdout.readline() == again.stdout.readline() == "waits\n"
    stopped = launch("tpu_vm.sh", "stop", **env)
    assert stopped.stdout.count("train has stopped with status 75") == 2
    assert again.wait(30) == 75 and len(calls()) == 2


def test_install_refuses_what_cannot_be(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    bare = {"PATH": launch_stand_ins.path(tmp_path), "PYTHON": str(tmp_path / "none")}
    here = {"PATH": bare["PATH"], "PYTHON": sys.executable}
    for arguments, env, named in (
        ([], bare, "neither uv nor a Python with pip"),
        ([], here | {"VENV": str(tmp_path / "full")}, "is no virtual environment"),
        (["tpu gcs"], here, "'tpu gcs' is not a list of extras"),
    ):
        env = {"VENV": str(tmp_path / "venv")} | env
        done = launch("install.sh", *arguments, **env)
        assert done.returncode == 2 and named in done.stderr.splitlines()[-1], done.stderr
    assert list((tmp_path / "full").iterdir()) == [tmp_path / "full/x"]


UV = f"""#!/usr/bin/env bash
# Makes an environment, or puts the folder after --editable in one.
if [[ $1 == venv ]]; then exec {sys.executable} -m venv --without-pip --clear "${{@: -1}}"; fi
site=$(echo "$VENV"/lib/python*/site-packages)
mkdir -p "$site/coca_jax-0.dist-info"
echo "Name: coca_jax" >"$site/coca_jax-0.dist-info/METADATA"
echo "${{@: -1}}" >"$site/coca_jax.pth"
"""


def test_an_environment_is_done_only_while_it_runs_this_very_code(tmp_path):
    program(tmp_path / "bin/uv", UV)
    env = {"PATH": launch_stand_ins.path(tmp_path / "bin"), "PYTHON": sys.executable}
    env |= {"VENV": str(tmp_path / "venv"), "PYTHONPATH": str(tmp_path / "bin")}
    program(tmp_path / "bin/ensurepip.py", "")  # pip itself takes ten seconds

    def clone(name):
        (tmp_path / name / "coca_jax").mkdir(parents=True)
        (tmp_path / name / "coca_jax/__init__.py").touch()
        (tmp_path / name / "setup.py").touch()
        shutil.copytree(LAUNCH, tmp_path / name / "launch")
        return tmp_path / name

    def install(place):
        command = ["bash", place / "launch/install.sh"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        say = "import coca_jax; print(coca_jax.__file__)"
        python = tmp_path / "venv/bin/python"
        said = subprocess.run([python, "-c", say], capture_output=True, text=True, cwd="/", env={})
        assert said.stdout.strip() == str(place / "coca_jax/__init__.py"), said.stderr
        return done.stderr

    one, two = clone("one"), clone("two")
    assert "ready after" in install(one) and install(one) == ""
    assert f"ran the code in {one}; now it runs that in {two}" in install(two)
    assert "ready after" in install(one) and install(one) == ""
    moved = one.rename(tmp_path / "moved")
    assert "ready after" in install(moved) and install(moved) == ""
    shutil.rmtree(tmp_path / "venv/bin")  # as where the Python that it was made of is gone
    assert "making the environment" in install(moved)


@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
@pytest.mark.long
def test_uv_gets_a_python_where_the_machine_s_is_too_old_and_unknown_extras_are_named(tmp_path):
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    base = pathlib.Path(sys._base_executable)
    program(tmp_path / f"bin/python{version}", f'#!/usr/bin/env bash\nexec {base} "$@"\n')
    old = program(tmp_path / "bin/python3", "#!/usr/bin/env bash\nexit 1\n")
    program(
        tmp_path / "bin/uv",
        f"""#!/usr/bin/env bash
{shutil.which("uv")} "$@" || exit
[[ $1 != venv ]] || echo {PACKAGES} >"$(echo "$VENV"/lib/python*/site-packages)/p.pth"
""",
    )
    env = {"PATH": launch_stand_ins.path(tmp_path / "bin"), "PYTHON": str(old), **ALONE}
    env |= {
        "VENV": str(tmp_path / "venv"),
        "PYTHON_VERSION": version,
        "UV_PYTHON_DOWNLOADS": "never",
        "PYTHONPATH": str(tmp_path / "bin"),
    }
    program(tmp_path / "bin/ensurepip.py", "")  # pip itself takes ten seconds
    wrong = launch("install.sh", "tpu,gpu", **env)
    assert wrong.returncode == 2 and "no extra 'gpu'; there are " in wrong.stderr
    assert "is not Python 3.11 to 3.13" in wrong.stderr
    done = launch("install.sh", **env)
    assert done.returncode == 0 and "making the environment" not in done.stderr, done.stderr
    assert launch("install.sh", **env).stderr == ""  # nothing is left to do
    say = "import coca_jax, sys; print(coca_jax.__file__, sys.prefix)"
    said = subprocess.run(
        [tmp_path / "venv/bin/python", "-c", say], capture_output=True, text=True, cwd=tmp_path
    )
    assert said.stdout.split() == [f"{ROOT}/coca_jax/__init__.py", f"{tmp_path}/venv"], said.stderr


@pytest.mark.long
def test_the_image_s_steps_make_a_train_that_starts(tmp_path):
    """COPY, ENV and RUN of the Dockerfile, done here: /app is a folder, its base a Python."""
    app = tmp_path / "app"
    app.mkdir()
    base = python_with_packages(tmp_path / "base")
    env = {"PATH": launch_stand_ins.path(base.parent), "HOME": str(tmp_path), **ALONE}
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ").replace("/app", str(app))
    done = {}
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, app / target)
        elif word == "ENV":
            pairs = (pair.split("=", 1) for pair in shlex.split(rest))
            env |= {key: value.replace("$PATH", env["PATH"]) for key, value in pairs}
        elif word == "ARG":
            env |= {"EXTRAS": ""} if rest.startswith("EXTRAS=") else {}
        elif word in ("RUN", "CMD"):
            command = json.loads(rest) if word == "CMD" else ["sh", "-c", rest]
            done[word] = subprocess.run(command, cwd=app, env=env, capture_output=True, text=True)
            assert done[word].returncode == 0, done[word].stderr
    assert "--workdir" in done["CMD"].stdout
    assert (app / ".venv/bin/coca-jax").exists()


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing():
    done = subprocess.run(["hadolint", LAUNCH / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
