"""The command `coca-jax`: its list, help, first words and what each command does without JAX."""

import contextlib
import importlib
import importlib.util
import io
import json
import os
import pathlib
import pty
import runpy
import subprocess
import sys
import time

import forks
import pytest
from absl import flags
from conftest import flags_of
from in_place_cases import write_tar

from coca_jax.cli import convert, main
from coca_jax.data.sources import manifest
from coca_jax.inference.generation import config
from coca_jax.training import recipes

# A line for each command that starts it on what is not there or needs the heavy libraries next.
STARTS = {
    "fit": ["photos", "--workdir=run"],
    "train": ["--config=tiny", "--workdir=run"],
    "evaluate": ["--checkpoint=weights", "--data=scenes"],
    "caption": ["--checkpoint=weights", "image.png"],
    "recaption": ["--checkpoint=weights", "--input=list.csv", "--out=better"],
    "search": ["index", "image.png", "--checkpoint=weights", "--out=index"],
    "serve": ["--checkpoint=weights", "--port=0"],
    "prepare": ["--format=csv", "--input=list.csv", "--out=data"],
    "convert": ["--input=weights.bin", "--out=out"],
    "compile": ["--config=tiny", "--topology=cpu:1"],
    "export": ["--checkpoint=weights", "--out=out"],
    "report": ["--workdir=run"],
    "benchmark": ["losses"],
}
HEAVY = ("jax", "tensorflow", "orbax", "flax")  # a command that imports one of them ends there


@pytest.fixture(scope="module")
def light():
    """Runs commands where the heavy libraries cannot be imported: {command: (exit status, standard
    output, standard error)} of each in a fork."""
    with forks.Server(dict(os.environ), HEAVY) as server:

        def run_all(folder, arguments):
            done = {name: server.run([name, *rest], folder) for name, rest in arguments.items()}
            return {name: (one.returncode, one.stdout, one.stderr) for name, one in done.items()}

        yield run_all


def test_an_unknown_command_names_the_nearest(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["coca-jax", "trian"])
    with pytest.raises(SystemExit, match="2"):
        main.main()
    assert (
        capsys.readouterr().err == "error: coca-jax trian: no such command; did you mean train?\n"
    )


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_alone_it_lists_every_command_in_a_line(arguments, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["coca-jax", *arguments])
    main.main()
    lines = capsys.readouterr().out.splitlines()
    named = [line.split()[0] for line in lines if line.startswith("  ")]
    assert named == list(main.COMMANDS) == list(STARTS)


def test_a_platform_that_jax_has_no_package_for_is_a_line(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for wanted in ("", "cpu", "cuda,cpu", "tpu"):
        main.check_platforms(wanted)
    with pytest.raises(SystemExit, match="2"):
        main.check_platforms("cuda")
    said = capsys.readouterr().err
    assert said.startswith("error: JAX_PLATFORMS=cuda: JAX has no CUDA in this environment; unset")
    assert "pip install" in said and said.count("\n") == 1


def test_ctrl_c_while_commands_are_imported_is_a_line():
    code = "import os, signal, sys; from coca_jax.__main__ import main; light = set(sys.modules)\n"
    code += "assert not {'absl', 'coca_jax.cli.main', 'ml_collections'} & light\n"
    code += "sys.argv = ['coca-jax', 'caption']\n"
    # Who runs the tests in the background of a shell has them begin with Ctrl-C ignored.
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "class Early:\n    def find_spec(self, name, path=None, target=None):\n"
    code += "        if name == 'coca_jax.cli.main': os.kill(os.getpid(), signal.SIGINT)\n"
    code += "sys.meta_path.insert(0, Early())\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "ended by Ctrl-C\n")


def test_warnings_and_logs_are_plain_lines(commands, tmp_path):
    code = "import sys, warnings; from coca_jax.cli import main as cli, convert; from absl import logging\n"
    code += "def main(argv):\n    logging.warning('a %s', 'file'); warnings.warn('a text')\n"
    code += "    logging.error('no'); return {}\n"
    code += "convert.main = main\nconvert.summary = lambda result: []\n"
    code += "cli.command('convert', [])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "warning: a file\nwarning: a text\nerror: no\n" and done.stdout == "{}\n"


@pytest.fixture(scope="module")
def started(light, tmp_path_factory):
    """What each command says and does where neither JAX nor TensorFlow can be imported."""
    folder = tmp_path_factory.mktemp("started")
    (folder / "image.png").write_bytes(b"no image")
    (folder / "weights.bin").write_bytes(b"no weights")
    (folder / "list.csv").write_text("path,text\nimage.png,a cat\n")
    (folder / "run").mkdir()
    (folder / "table.toml").write_text("config = 'tiny'\n[variants.one]\n")
    return light(folder, STARTS)


@pytest.mark.parametrize("name", STARTS)
def test_a_command_says_what_it_does_before_it_imports_jax(name, started):
    status, _, errors = started[name]
    first, *others = errors.splitlines()
    words = {"prepare": "reading list.csv", "convert": "converting weights.bin"}
    words |= dict.fromkeys(("evaluate", "caption", "search", "serve", "export"), "loading weights")
    words |= {"recaption": "list.csv: read as --format=csv"}
    words |= {"fit": "fitting photos in run: starting JAX"}
    words |= {"train": "training in run: starting JAX", "compile": "compiling for cpu:1"}
    words |= {"benchmark": "benchmark losses: starting JAX", "report": "error: workdir "}
    assert first.startswith(words[name])
    if name in ("prepare", "convert", "report"):  # these need no JAX at all
        assert status == 2 and errors.splitlines()[-1].startswith("error: ")
    else:
        assert status == 1 and "import of jax halted" in others[-1]


OTHER_NAMES = {  # of flags, as other commands and programs have them; what is said of each
    "caption --images=pics": "pictures and folders of them stand without one: pics",
    "search index --input=pics": "pictures, folders and texts stand without one: pics",
    "fit --data=pics": "folders of pictures stand without one: pics",
    "train --input=pics": "did you mean --data?",
    "caption --model=runs/x": "did you mean --checkpoint?",
    "fit --checkpoint=x": "did you mean --init_from?",
    "train --checkpoint=x": "the key of the recipe is --config.init_from=x",
    "caption --beam_size=3": "did you mean --num_beams?",
    "caption --seq_len=20": "did you mean --max_new_tokens?",
    "caption --generation_type=top_p": "--num_beams=6 searches by beams, --do_sample samples "
    "(--top_p, --top_k)",
    "caption --device=cpu": "JAX_PLATFORMS=cpu, cuda or tpu before the command chooses the devices",
    "train --max_len=4": "the key of the recipe is --config.model.text.max_len=4",
    "train --lr=3e-4": "the key of the recipe is --config.optimizer.learning_rate=3e-4",
    "train --batch-size=64": "the key of the recipe is --config.batch_size=64",
    "convert --out_put=x": "did you mean --out?",
    "report --colour=red": "--help lists the flags",
}


def test_a_line_of_results_has_letters_as_they_are_where_they_can_be_shown(monkeypatch):
    texts = ["\u0635\u0648\u0631\u0629", "caf\u00e9"]
    for encoding, shown in (
        ("utf-8", (True, True)),
        ("latin-1", (False, True)),
        ("ascii", (False,) * 2),
    ):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        for text, as_it_is in zip(texts, shown):
            line = main.json_line(dict(texts=[text]))
            print(line, flush=True)
            assert (text in line) is as_it_is and json.loads(line) == dict(texts=[text])


@pytest.mark.parametrize("line", OTHER_NAMES)
def test_a_flag_that_is_called_otherwise_here_is_told(line, commands, tmp_path):
    done = commands.run(line.split(), tmp_path)
    flag = line.split()[-1]
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"error: {flag}: no such flag; {OTHER_NAMES[line]}\n"


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("train demo", "give --config=demo"),
        ("train --config=demo pics", "give --data=pics"),
        ("compile coca_base", "give --config=coca_base"),
    ],
)
def test_what_stands_without_its_flag_is_told_which(line, remedy, commands, tmp_path):
    done = commands.run(line.split(), tmp_path)
    unexpected = f"unexpected argument {line.split()[-1]!r}; {remedy}"
    assert done.returncode == 2 and done.stderr == f"error: {unexpected}\n"


def test_nothing_is_needed_to_resume(commands, tmp_path):
    done = commands.run(["train", "--config=demo", "--resume"], tmp_path)
    assert done.returncode == 2 and "the same command again goes on" in done.stderr


HELP = {name: ["--help"] for name in STARTS}


@pytest.fixture(scope="module")
def helped(light, tmp_path_factory):
    return light(tmp_path_factory.mktemp("helped"), HELP)


@pytest.mark.parametrize("name", HELP)
def test_help_is_quick_complete_and_no_failure(name, helped):
    status, text, errors = helped[name]
    assert status == 0 and not errors
    assert text.startswith(f"coca-jax {name}")
    assert "Examples:" in text and f"  coca-jax {name} " in text
    flags = {argument.split("=")[0] for argument in STARTS[name] if argument.startswith("--")}
    assert all(f"\n  {flag}" in text for flag in flags)
    assert ("train --recipes" in text) == (name in ("train", "compile", "benchmark", "prepare"))
    assert "\n  --json=" in text and "coca_large" not in text


def test_recipes_are_listed_in_one_place_on_a_screen(light, tmp_path):
    status, text, errors = light(tmp_path, {"train": ["--recipes"]})["train"]
    assert status == 0 and not errors
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    assert sorted(listed) == sorted(recipes.names()) and "others:" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_flags_have_dashes_or_underscores_and_values_stay(commands, tmp_path):
    write_tar(tmp_path / "a-b.tar", 0, 3)
    out = "--out=my-out-put"
    done = commands.run(
        ["prepare", "--input=a-b.tar", "--in-place", "--no-overwrite", out], tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my-out-put").exists()
    done = commands.run(["compile", "--config=tiny", "--config.batch-size=x-y"], tmp_path)
    assert done.returncode == 2 and "batch_size" in done.stderr and "x-y" in done.stderr


def on_terminal(arguments, folder):
    """(Exit status, what a command prints on a terminal)."""
    root = pathlib.Path(__file__).resolve().parent.parent
    ours, its = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "coca_jax", *arguments],
        stdout=its,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(root)},
    ) as process:
        os.close(its)
        found = b""
        with contextlib.suppress(OSError):  # how a terminal ends on Linux
            while data := os.read(ours, 4096):
                found += data
        os.close(ours)
    return process.returncode, found.decode().replace("\r\n", "\n")


def test_results_are_json_except_on_a_terminal(commands, tmp_path):
    write_tar(tmp_path / "a.tar", 0, 3)
    status, shown = on_terminal(["prepare", "--input=a.tar", "--out=shown"], tmp_path)
    first, following, *commands_shown = shown.splitlines()
    assert status == 0 and first == "3 of 3 examples -> shown" and following == "next:"
    assert commands_shown[0] == "  coca-jax fit shown --workdir=FOLDER" and "{" not in shown
    given = ["prepare", "--input=a.tar", "--out=forced", "--json"]
    status, shown = on_terminal(given, tmp_path)
    assert status == 0 and json.loads(shown)["written"] == 3
    done = commands.run(["prepare", "--input=a.tar", "--out=piped"], tmp_path)
    assert json.loads(done.stdout)["written"] == 3 and done.stdout.count("\n") == 1
    assert "3 of 3 examples -> piped" in done.stderr.splitlines()


WRITERS = {
    "export": ["--checkpoint=weights.bin", "--out=run"],
    "convert": ["--input=weights.bin", "--out=run"],
}


def test_no_command_writes_a_model_into_the_folder_of_a_run(light, tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"no weights")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text("{}")
    for status, _, errors in light(tmp_path, WRITERS).values():
        assert status == 2
        assert "error: --out=run is the folder of a run; give another one" in errors
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoints", "config.json"]


def test_train_refuses_what_the_command_line_names_in_vain(commands, tmp_path):
    write_tar(tmp_path / "a.tar", 0, 3)
    done = commands.run(["prepare", "--input=a.tar", "--out=out", "--processes=1"], tmp_path)
    assert done.returncode == 0, done.stderr
    train = ["train", "--config=tiny", "--workdir=out"]
    done = commands.run(train, tmp_path)
    line = (
        "--workdir=out holds prepared data; give a folder of the run's own, and --data=out to train"
    )
    assert done.returncode == 2 and done.stderr == f"error: {line} on them\n"
    done = commands.run([*train, "--data=out", "--config.data.sources=()"], tmp_path)
    line = "--config.data.sources and --data both say what trains; give one of them"
    assert done.returncode == 2 and done.stderr == f"error: {line}\n"
    if importlib.util.find_spec("tensorboardX") is None:
        done = commands.run([*train, "--config.log.trackers=('tensorboard',)"], tmp_path)
        assert done.returncode == 2 and "log.trackers=('tensorboard',): tensorboard" in done.stderr


def test_a_folder_to_write_to_may_be_a_url_of_a_file(commands, tmp_path):
    write_tar(tmp_path / "a.tar", 0, 3)
    out = f"--out=file://{tmp_path}/my%20index"
    done = commands.run(["prepare", "--input=a.tar", "--in_place", out], tmp_path)
    assert done.returncode == 0, done.stderr
    assert manifest.read_manifest(str(tmp_path / "my index"))["splits"]["train"]["count"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "my index"]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # imported by other tests
@pytest.mark.parametrize("name", main.COMMANDS)
def test_python_m_starts_the_same_command(name, monkeypatch):
    begun = []
    monkeypatch.setattr(main, "command", begun.append)
    runpy.run_module(f"coca_jax.cli.{name}", run_name="__main__")
    assert begun == [name]


SIGNED = ("seed", "min_score")
# Where they are read, in one line too.
CHECKED = (
    *("minutes", "sample", "quantile", "threshold", "step", "rank"),
    *("hosts", "host_hours", "save_seconds", "restart_seconds", *config.KINDS),
)


@pytest.mark.parametrize("name", STARTS)
def test_a_number_that_counts_has_a_lowest_value(name, monkeypatch):
    """--limit=-4 or --batch_size=-1 is refused by its flag, not met in the middle of the work."""
    monkeypatch.setattr(recipes, "define_overrides", lambda note: None)  # keys have rules
    flags_of(name, monkeypatch)
    for flag in map(flags.FLAGS.__getitem__, flags.FLAGS):
        if flag.flag_type() in ("int", "float") and flag.name not in SIGNED + CHECKED:
            assert flag.parser.lower_bound is not None, flag.name


def test_an_error_is_one_line_in_which_names_are_as_they_are(capsys):
    with pytest.raises(SystemExit):
        main.fail("my  photos/a\tb.png: no such\n  file\r\n\n; give one\n")
    assert capsys.readouterr().err == "error: my  photos/a\tb.png: no such file ; give one\n"


LAST = "times, of which the last would count"


@pytest.mark.parametrize(
    "name, given, says",
    [
        ("serve", ["--port=http"], "--port=http: give a whole number"),
        ("serve", ["--wait_ms=some: time"], "--wait_ms=some: time: give a number"),
        ("caption", ["--dtype=float16"], "--dtype=float16: give float32 or bfloat16"),
        ("serve", ["--port=-1"], "--port=-1: -1 is not an integer in the range [0, 65535]"),
        ("caption", ["--checkpoint=a"] * 2, f"--checkpoint stands there 2 {LAST}; give one"),
        ("recaption", ["--checkpoint=a"] * 3, f"--checkpoint stands there 3 {LAST}; separate"),
    ],
)
def test_a_value_that_cannot_be_is_a_plain_line(name, given, says, monkeypatch, capsys):
    flags_of(name, monkeypatch)
    with pytest.raises(SystemExit, match="2"):
        main.parse_flags([name, *given], importlib.import_module(f"coca_jax.cli.{name}"))
    assert capsys.readouterr().err.removeprefix("error: ").removeprefix("flag ").startswith(says)


def test_what_waits_says_for_how_long(capsys):
    with main.waiting("compiling", every=0.02):
        time.sleep(0.1)
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "compiling ..."
    assert others and set(others) <= {f"compiling ... {n} s so far" for n in range(5)}
    time.sleep(0.05)
    assert not capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_a_full_standard_output_is_named_and_another_file_is_not_taken_for_it(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OSError, match="of a file"), main._pipe_may_close():
            raise OSError(28, "of a file")
        with pytest.raises(SystemExit) as ended, main._pipe_may_close():
            print("a line", flush=True)
    assert ended.value.code == 2
    said = "error: standard output cannot be written: [Errno 28] No space left on device"
    assert said in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_a_full_disk_is_named(monkeypatch, capsys):
    """The system says which file only where it cannot be opened, not where it has no room."""
    flags_of("convert", monkeypatch)
    flags.DEFINE_integer("verbosity", 0, "As absl has it.")
    monkeypatch.setattr(convert, "define_flags", lambda: None)

    def writes(argv):
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)

    monkeypatch.setattr(convert, "main", writes)
    monkeypatch.setattr(main.app, "run", lambda run, flags_parser: run(flags_parser(sys.argv)))
    with pytest.raises(SystemExit) as ended:
        main._start("convert", ["--out=some/model", "--verbosity=0"])
    assert ended.value.code == 2
    said = "error: --out=some/model: the disk is full. Make room and run the command again.\n"
    assert capsys.readouterr().err.endswith(said)
    assert main.error_text(OSError(28, "full", "a/b")).startswith("a/b: the disk is full.")
    assert main.error_text(FileNotFoundError(2, "none")) == "[Errno 2] none"
