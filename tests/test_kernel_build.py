"""How kernels of C++ come to be: compiled once, several at a time, and life without a compiler."""

import ctypes
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
from concurrent import futures

import numpy as np
import pytest
from conftest import needs_compiler, scenes_words, tiny_config

from coca_jax.config import typed
from coca_jax.ops.cpu import Cpu
from coca_jax.ops.cpu_kernels import build
from coca_jax.parallel import sharding
from coca_jax.training import setup, trainer


@pytest.mark.long
def test_without_a_compiler_a_warning_says_what_to_do(tmp_path):
    code = """
from coca_jax.ops.cpu_kernels import conv as conv_kernels, decode as decode_kernels
print(decode_kernels.available(), conv_kernels.available())
"""
    env = dict(os.environ, CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False False\n"), done.stderr
    assert done.stderr.count("there is no C++ compiler 'no-such-compiler'") == 1
    assert "Install g++" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """(a source file, the folder of what is compiled, what makes a compiler of lines of shell)."""
    source = tmp_path / "seven.cc"
    source.write_text('extern "C" int coca_jax_seven() { return 7; }\n')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def compiler(lines: str) -> None:
        script = tmp_path / "own-c++"
        script.write_text(f"#!/bin/sh\n{lines}\n")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))

    return source, tmp_path / "cache/coca_jax", compiler


def test_a_compiler_that_may_not_be_run_is_named(place, tmp_path, monkeypatch):
    source, folder, compiler = place
    compiler("exit 0")
    (tmp_path / "own-c++").chmod(0o644)
    with pytest.raises(
        ValueError, match=r"cannot run the C\+\+ compiler '.*/own-c\+\+' \(.*denied"
    ):
        build._build(source, "")
    monkeypatch.setenv("CXX", " ")  # as if there were none
    if shutil.which("c++"):
        assert build._build(source, "").coca_jax_seven() == 7


EXPONENTIALS = """
#include "vectors.h"
extern "C" void exponentials(float* x, int count) { Map(x, count, Exp); }
"""


@needs_compiler
@pytest.mark.parametrize("machine", ["native", "x86-64"])
def test_exponentials_are_exact_to_the_last_places(machine, tmp_path):
    """Though the compiler may regroup sums; whole vectors, and what is left behind them."""
    if machine == "x86-64" and platform.machine() != "x86_64":
        pytest.skip("needs a processor of that kind")
    (tmp_path / "e.cc").write_text(EXPONENTIALS)
    flags = build.FLAGS.replace("-march=native", f"-march={machine}").split()
    headers = pathlib.Path(build.__file__).parent
    command = ["c++", *flags, f"-I{headers}", "e.cc", "-o", "e.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    exponentials = ctypes.CDLL(str(tmp_path / "e.so")).exponentials
    x = np.linspace(-87, 80, 1 << 16, dtype=np.float32)
    for count in (x.size, 1, 7, 19):
        found = np.append(x[-count:], np.float32(5))
        exponentials(found.ctypes.data_as(ctypes.c_void_p), count)
        want = np.exp(x[-count:].astype(np.float64))
        np.testing.assert_allclose(found[:-1], want, rtol=2.5e-7)
        assert found[-1] == 5
    lowest = np.asarray([-87.5, -1e30, -np.inf], np.float32)
    exponentials(lowest.ctypes.data_as(ctypes.c_void_p), 3)
    assert lowest.tolist() == [0, 0, 0]


@needs_compiler
def test_one_of_another_system_stays_and_is_not_taken(place, tmp_path):
    """As two images that share a home folder have them; each compiles its own once."""
    source, folder, compiler = place
    compiler(f'echo >> {tmp_path}/compiled; exec c++ "$@"')
    assert build._build(source, "").coca_jax_seven() == 7
    (own,) = folder.glob("*.so")
    other = folder / "other"
    other.write_bytes(b"of another system")
    other.chmod(0o700)
    other = other.rename(own.with_stem(own.stem.rsplit("-", 1)[0] + "-" + build._digest(other)))
    own.unlink()
    for _ in range(2):
        assert build._build(source, "").coca_jax_seven() == 7
        assert {*folder.glob("*.so")} == {own, other}
    assert (tmp_path / "compiled").read_text() == 2 * "\n"
    assert not build._is_whole(folder / "removed.so")


@pytest.mark.parametrize(
    "lines, says",
    [
        ('for last; do :; done; echo no > "$last"', "Name a folder in XDG_CACHE_HOME"),
        ("exit 1", "cannot compile seven.cc .failed.. Install g"),
    ],
)
def test_a_compiler_is_asked_for_only_where_compiling_failed(place, caplog, lines, says):
    source, _, compiler = place
    compiler(lines)
    for _ in range(2):
        assert not build.register(source, ("seven",), "It is slow")
    assert len(re.findall(f"It is slow: .*{says}", caplog.text)) == 1
    assert ("Install" in caplog.text) == ("Install" in says)


@needs_compiler
def test_it_is_compiled_once_and_again_where_others_may_have_changed_it(place, tmp_path):
    source, folder, compiler = place
    compiler(f'echo >> {tmp_path}/compiled; exec c++ "$@"')

    def times():
        assert build._build(source, "").coca_jax_seven() == 7
        return len((tmp_path / "compiled").read_text())

    assert times() == 1
    (library,) = folder.glob("*.so")
    left, running = library.with_name("compiling-old"), library.with_name("compiling-now")
    for scratch in (left, running):  # of a process that was killed, and of one that works
        scratch.mkdir()
        (scratch / "kernels.so").touch()
    os.utime(left, (0, 0))
    assert times() == 1
    assert {p.name for p in folder.iterdir()} == {library.name, left.name, running.name}
    whole = library.read_bytes()
    other = shutil.copy(library, tmp_path / "other")  # the library itself is loaded here
    other.write_bytes(whole[:-1] + b"\xff")  # other contents than its name tells
    other.replace(library)
    assert times() == 2
    assert running.is_dir() and not left.exists()
    assert library.read_bytes() == whole  # compiled again in its place
    library.chmod(0o777)
    assert times() == 3
    assert library.stat().st_mode & 0o777 == 0o700


@needs_compiler
@pytest.mark.long
def test_those_of_a_step_are_compiled_at_the_same_time(tmp_path):
    """Each compiler waits until all four have been started."""
    together = tmp_path / "together-c++"
    together.write_text(
        f"""#!/bin/sh
touch {tmp_path}/started-$$
for i in $(seq 300); do
  [ $(ls {tmp_path} | grep -c started) -ge 3 ] && exec c++ "$@" -O0
  sleep 0.1
done
exit 1
"""
    )
    together.chmod(0o755)
    code = """
import os
import jax
from coca_jax import ops; from coca_jax.parallel import sharding as partitioning
from coca_jax.ops.cpu_kernels import build, conv as conv_kernels, muon as muon_kernels, turn as turn_kernels

def told():
    some = ("xla", "bfloat16", True, True), ("auto", "bfloat16", True, True)
    some += (("auto", "float32", False),)
    counts = [len(ops.choose("cpu", kind).begin_kernels(*how)) for kind, *how in some]
    with jax.set_mesh(partitioning.make_mesh(8, 1, 1)):  # others need one device
        counts.append(len(ops.choose("cpu").begin_kernels("bfloat16", True, True)))
    of_step = [turn_kernels.available]
    for either in (conv_kernels, muon_kernels):
        halves = build.multiplies_bfloat16()
        of_step.append(either.available_in_bfloat16 if halves else either.available)
    return *counts, *[available() for available in of_step]

os.environ["COCA_JAX_CPU_KERNELS"] = "0"
print(*told())
del os.environ["COCA_JAX_CPU_KERNELS"]
build.register.cache_clear()
print(*told())
"""
    env = dict(os.environ, CXX=str(together), XDG_CACHE_HOME=str(tmp_path / "cache"))
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["0 0 0 0" + 3 * " False", "0 3 0 1" + 3 * " True"]
    assert len(list(tmp_path.glob("started-*"))) == 3  # none twice


@needs_compiler
def test_what_several_want_at_once_is_compiled_once(tmp_path, monkeypatch):
    """As the processes of a run on one machine do, and one whose compiler fails keeps none back."""
    script, source = tmp_path / "slow-c++", tmp_path / "one.cc"
    source.write_text("int one() { return 1; }")
    monkeypatch.setattr(build.cache_folder, "folder", lambda: tmp_path)
    monkeypatch.setenv("CXX", str(script))
    for then, libraries in (("exit 1", 0), ('exec c++ "$@" -O0', 1)):
        script.write_text(f"#!/bin/sh\nmktemp {tmp_path}/started-XXXXXX\nsleep 0.2\n{then}\n")
        script.chmod(0o755)
        with futures.ThreadPoolExecutor(3) as threads:
            built = [threads.submit(build._build, source, "") for _ in range(3)]
        assert len(list(tmp_path.glob("*.so"))) == libraries
        assert sum(one.exception() is None for one in built) == 3 * libraries
    assert len(list(tmp_path.glob("started-*"))) == 3 + 1
    assert not list(tmp_path.glob(f"{build.SCRATCH}*"))


def test_a_run_says_that_it_waits_for_them(tmp_path, monkeypatch, capsys):
    config = tiny_config()
    config.model.text.vocab_size = 320
    config.data.sources = (dict(builtin="scenes", split="train", kind="caption"),)
    config.data.vocabulary = scenes_words()
    config = typed(config)
    asked = []

    def lines(workdir: str, compiled: futures.Future) -> list[str]:
        monkeypatch.setattr(
            Cpu, "begin_kernels", lambda _, *of, **how: asked.append((of, how)) or [compiled]
        )
        run = trainer.Trainer(config, workdir)
        run.mesh = sharding.make_mesh(8, 1, 1)
        run.open_data()
        assert compiled.done()
        return capsys.readouterr().err.splitlines()

    ready: futures.Future[pathlib.Path] = futures.Future()
    ready.set_result(tmp_path)
    assert lines(str(tmp_path / "a"), ready) == ["reading data ..."]
    late: futures.Future[pathlib.Path] = futures.Future()
    real = setup.begin

    def begin(stop, work):
        real(stop, work)
        if work.startswith("compiling"):
            late.set_result(tmp_path)

    monkeypatch.setattr(setup, "begin", begin)
    said = lines(str(tmp_path / "b"), late)
    assert said == ["reading data ...", "compiling kernels for this processor, once ..."]
    assert asked == [(("float32",), dict(convolutions=False, muon=False))] * 2
