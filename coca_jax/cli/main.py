"""The command `coca-jax`, and how every sub-command starts and ends.

`coca-jax NAME ...` and `python -m coca_jax NAME ...` are the same; so is `python -m coca_jax.train`.
A command is a module with `define_flags()` and `main(argv)`, and a line in `COMMANDS`. It may have
`summary(result)`, the lines that a terminal shows of its result; see `show`.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import json
import logging as py_logging
import os
import pathlib
import re
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

from absl import app, flags, logging

import coca_jax
from coca_jax.cli import data_flags
from coca_jax.runtime import (
    activity,
    extras,
    machine,
    multihost,
    notes,
    signals,
    storage,
    text_tables,
    workers,
)
from coca_jax.training import recipes

COMMANDS = {
    "fit": "from a folder of pictures to a trained model: looks, chooses, says why, trains",
    "train": "train a recipe in a workdir; go on from what is there",
    "evaluate": "score a model: zero-shot, retrieval, captions, probes",
    "caption": "caption image files and folders, one JSON line an image",
    "recaption": "data in, data with captions, scores and embeddings out",
    "search": "index pictures; find them by text or picture, find duplicates",
    "serve": "a page and an API: captions, labels, questions, search",
    "prepare": "turn a folder, tar, parquet or CSV of images into training data",
    "convert": "read open_clip weights, or write them",
    "compile": "compile a train step for devices that are not here, and say what it needs",
    "export": "write a folder of weights and programs that run without this package",
    "report": "write the HTML report of a run",
    "benchmark": "time training, encoding, captioning, input or losses",
}
CHECKPOINT = (  # what --checkpoint takes
    "A run, an export or open_clip weights; or a name: hf-hub:org/name, coca_ViT-L-14:TAG."
)
FOLDERS = ("workdir", "out")  # flags that name where a command writes
HELP_FLAGS = ("-h", "-help", "--help", "--helpshort")


def main() -> None:
    """`coca-jax`: hands over to a sub-command, or lists them."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    if not arguments or arguments[0] in HELP_FLAGS:
        print(usage())
    elif arguments[0] in ("--version", "-version"):
        print(f"coca_jax {coca_jax.__version__}")
    elif arguments[0] in COMMANDS:
        command(arguments[0], arguments[1:])
    else:
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        guess = f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}"
        fail(f"coca-jax {arguments[0]}: no such command; {guess}")


def usage() -> str:
    """The commands, one line each."""
    lines = [f"  {name:10s} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "coca-jax COMMAND ...: contrastive captioners (CoCa) in JAX.",
            "",
            *lines,
            "",
            "coca-jax COMMAND --help says more; coca-jax --version prints the version.",
        ]
    )


def command(name: str, arguments: Sequence[str] | None = None) -> None:
    """Runs a sub-command; prints its result, see `show`.

    A ValueError or OSError is bad input: it becomes one line on standard error and exit
    status 2. Anything else is a defect and keeps its traceback. `--help` ends with status 0,
    Ctrl-C with 130, or as runtime/signals.py says where the command saves.
    """
    redirect: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if name in signals.SAVED:
        signals.install()  # again, or at last: `coca-jax fit` comes straight here
        redirect = contextlib.redirect_stderr(LossyStream(sys.stderr))  # type: ignore[type-var]
    else:
        signals.end_on_interrupt()
    try:
        with redirect:
            _start(name, arguments)
    except KeyboardInterrupt:
        signals.leave(f"coca-jax {name}: ended by Ctrl-C", signals.AT_ONCE)


def _start(name: str, arguments: Sequence[str] | None) -> None:
    given = [_from_home(one) for one in (sys.argv[1:] if arguments is None else arguments)]
    given = _with_underscores(given, lambda flag: flag.startswith("config."))
    before = given[: given.index("--")] if "--" in given else given
    wants_help = any(argument in HELP_FLAGS for argument in before)
    # absl and config_flags read the command line themselves; help needs the flags, not a recipe.
    sys.argv = [f"coca-jax {name}", *([] if wants_help else given)]
    quiet_libraries()
    check_platforms(os.environ.get("JAX_PLATFORMS", ""))
    if name != "compile":  # it says how long the compiler took
        machine.use()
    module = importlib.import_module(f"coca_jax.cli.{name}")
    try:
        module.define_flags()
        flags.DEFINE_bool(
            "json", False, "Print the result as one line of JSON, as without a terminal."
        )
        sys.argv[1:] = _with_underscores(sys.argv[1:], flags.FLAGS.__contains__)
    except (flags.Error, ValueError, OSError) as error:  # as --config.a=X behind --config.a.b
        fail(str(error))
    if wants_help:
        with _pipe_may_close():
            print(help_text(name, module), flush=True)
        return

    def run(argv: Sequence[str]) -> None:
        set_up_logging(verbose=bool(flags.FLAGS["verbosity"].present))
        # One process that was given a coordinator speaks through Gloo too.
        if "num_processes" in flags.FLAGS and flags.FLAGS.num_processes > 0:
            multihost.keep_gloo_off_standard_output()
        try:
            with _pipe_may_close():
                result = module.main(argv)
                if result is not None:
                    show(result, getattr(module, "summary", text_tables.fields)(result))
        except (ValueError, OSError) as error:
            fail(error_text(error))
        except Exception as error:
            if storage.is_disk_full(error):
                fail(error_text(error))
            if "Unable to initialize backend" not in str(error):
                raise
            fail(f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: {error}")

    app.run(run, flags_parser=lambda argv: parse_flags(argv, module))


class LossyStream:
    """Standard error of a run of days. A full disk or a closed pipe loses its lines and does not
    end the run."""

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, text: str) -> int:
        """Writes what can be written."""
        with contextlib.suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes what can be written."""
        with contextlib.suppress(OSError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def quiet_libraries() -> None:
    """Settings that libraries read when they are imported. Values that a user set stay."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow reports every GPU it misses
    # images.py has its own limit and its own line on large pictures.
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
    # Meant for programs, once a call. A command makes one call for each batch.
    warnings.filterwarnings("ignore", r"\d+ of \d+ texts are cut: ")
    machine.skip_absent_tpu()


def set_up_logging(verbose: bool = False) -> None:
    """Logs and warnings are plain lines on standard error from now on. verbose: with the lines at
    INFO and the tracebacks of the libraries, as --verbosity=0 asks for."""
    logging.get_absl_handler().setFormatter(PlainFormatter())
    if not verbose:
        logging.set_verbosity(logging.WARNING)
        for name in ("absl", "asyncio"):
            py_logging.getLogger(name).addFilter(_no_error_of_orbax)
        warnings.filterwarnings("ignore", "coroutine '.*write_fragment' was never awaited")
    former = warnings.formatwarning

    def plain(message: Any, category: Any, filename: str, lineno: int, line: Any = None) -> str:
        if category is UserWarning:  # ours; those of libraries name their place
            return f"warning: {message}\n"
        return former(message, category, filename, lineno, line)

    warnings.formatwarning = plain


def _no_error_of_orbax(record: py_logging.LogRecord) -> bool:
    """Orbax logs hundreds of lines of tracebacks when a disk is full, and asyncio those of the
    writes that Orbax abandons; the exception that it raises is reported in one line."""
    of_asyncio = record.name == "asyncio" and "orbax" in record.getMessage()
    of_orbax = of_asyncio or "orbax" in pathlib.PurePath(record.pathname).parts
    return not of_orbax or record.levelno < py_logging.ERROR


class PlainFormatter(py_logging.Formatter):
    """'warning: text' in place of absl's prefix with a time, a thread and a source line."""

    def format(self, record: py_logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < py_logging.WARNING or text.startswith(("warning: ", "error: ")):
            return text
        return f"{'error' if record.levelno >= py_logging.ERROR else 'warning'}: {text}"


def wants_json() -> bool:
    """Whether results are lines of JSON: without a terminal, and with --json."""
    return ("json" in flags.FLAGS and flags.FLAGS.json) or not sys.stdout.isatty()


def show(result: Any, lines: Sequence[str]) -> None:
    """Prints a command's result: on a terminal these lines, which fit on a screen. Otherwise the
    result as JSON, the last line of standard output; the lines go to standard error then, unless
    --json asks for nothing else. Warnings that matter for the result follow it."""
    lines = [*lines, *notes.take()]
    if not wants_json():
        print("\n".join(lines), flush=True)
        return
    if not ("json" in flags.FLAGS and flags.FLAGS.json):
        for line in lines:
            say(line)
    print(json_line(result), flush=True)


def show_one(result: Any, line: str) -> None:
    """Prints one of many results, such as a caption: on a terminal the line, otherwise JSON."""
    print(json_line(result) if wants_json() else line, flush=True)


def json_line(result: Any, encoding: str | None = None) -> str:
    """A result as one line of JSON. What an encoding (of standard output, where none is given) does
    not have, and a name of a file that is not UTF-8, is escaped, as JSON can."""
    text = json.dumps(result, ensure_ascii=False)
    try:
        text.encode()
        text.encode(encoding or sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(result)
    return text


def check_platforms(wanted: str) -> None:
    """Fails for a JAX_PLATFORMS of GPUs alone where JAX's package for them is missing: JAX itself
    would end with an AssertionError without a text."""
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if wanted in ("cuda", "gpu") and not any(map(importlib.util.find_spec, plugins)):
        fail(
            f"JAX_PLATFORMS={wanted}: JAX has no CUDA in this environment; unset it to run on the "
            f"CPU, or {extras.remedy('cuda')}"
        )


@contextlib.contextmanager
def _pipe_may_close() -> Iterator[None]:
    """Ends the command quietly, as the shell's own do, where `| head` has read enough, and with a
    line where standard output has no room for more."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + 13) from None  # SIGPIPE
    except OSError as error:
        try:
            # Fails again where it was this that failed, which has no name. Without a buffer
            # (PYTHONUNBUFFERED) nobody can tell.
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            fail(f"standard output cannot be written: {error}")
        raise


def say(text: str) -> None:
    """What the command does now, on standard error: before whatever takes more than a second."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def waiting(text: str, every: float = 10.0) -> Iterator[None]:
    """Says what the command waits for, and inside, each `every` seconds, for how long already: for
    what has no steps that a bar could count."""
    say(f"{text} ...")
    began = time.monotonic()

    def report() -> None:
        say(f"{text} ... {time.monotonic() - began:.0f} s so far")

    with activity.periodically(report, every, every):
        yield


def fail(text: str) -> NoReturn:
    """Bad input: one line on standard error, exit status 2."""
    lines = filter(None, map(str.strip, text.splitlines()))  # blanks within are a file's name
    print(f"error: {' '.join(lines)}", file=sys.stderr)
    raise SystemExit(2)


def error_text(error: Exception) -> str:
    """What went wrong. A full disk is called that, with the file, or what the command writes where
    the system names no file."""
    if not storage.is_disk_full(error):
        return str(error)
    given = [f"--{name}={flags.FLAGS[name].value}" for name in FOLDERS if name in flags.FLAGS]
    place = getattr(error, "filename", None) or (given[0] if given else "")
    return f"{place}{': ' if place else ''}the disk is full. Make room and run the command again."


def help_text(name: str, module: Any) -> str:
    """What a command does, its flags and, where it takes one, the recipes."""
    lines = [f"coca-jax {name}: {COMMANDS[name]}", "", (module.__doc__ or "").strip(), "", "Flags:"]
    for flag in _own_flags(module):
        default = flag.default_as_str.strip("'") if flag.value not in (None, "", []) else ""
        if flag.name == "config" and default:  # a command that takes values, but no recipe
            lines.append("  --config.KEY=VALUE")
        else:
            lines.append(f"  --{flag.name}{'=' if default else ''}{default}")
        note = flag.help.split(";\n")[0]  # absl adds that a flag may be repeated
        lines += textwrap.wrap(note, 98, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if "config" in flags.FLAGS and flags.FLAGS["config"].value is None:
        lines += ["", "`coca-jax train --recipes` lists the recipes for --config."]
    return "\n".join(lines)


def _own_flags(module: Any) -> list[flags.Flag]:
    """The flags that the command defines, or takes over from others in `SHARES_FLAGS_OF`; none of
    the libraries'."""
    names = [module.__name__, *getattr(module, "SHARES_FLAGS_OF", ())]
    names += [workers.__name__, recipes.__name__, data_flags.__name__, __name__]
    return [flag for name in names for flag in flags.FLAGS.get_flags_for_module(name)]


def _with_underscores(arguments: Sequence[str], known: Callable[[str], bool]) -> list[str]:
    """Command line arguments with --dry-run as --dry_run, for the flags that are known by that
    name. Values stay as they are, and all behind '--'."""
    found: list[str] = []
    for number, argument in enumerate(arguments):
        if argument == "--":
            return [*found, *arguments[number:]]
        match = re.fullmatch(r"(--?)([a-z][\w.-]*)(=.*)?", argument, re.DOTALL)
        if match and "-" in match[2]:
            name = match[2].replace("-", "_")
            if not known(name) and name.startswith("no_") and known(name[3:]):
                name = f"no{name[3:]}"  # as absl spells it
                argument = f"{match[1]}{name}{match[3] or ''}"
            elif known(name):
                argument = f"{match[1]}{name}{match[3] or ''}"
        found.append(argument)
    return found


def _from_home(argument: str) -> str:
    """`local_files.from_home` of a flag's value, which would be a folder called '~' here."""
    name, equals, value = argument.partition("=")
    if not name.startswith("-"):
        return argument
    return f"{name}{equals}{storage.from_home(value)}"


def parse_flags(argv: Sequence[str], module: Any) -> list[str]:
    """Parses flags; an unknown flag or key, or a value of the wrong type, is a line and exit 2.

    A folder to write to that is given as file:// is the path that it means.
    """
    try:
        if "config" in flags.FLAGS:
            argv = recipes.split(flags.FLAGS.read_flags_from_files(argv, force_gnu=False))[1]
        rest = flags.FLAGS(argv)
        _check_one_checkpoint()
        for name in FOLDERS:
            if name in flags.FLAGS and isinstance(flags.FLAGS[name].value, str):
                flags.FLAGS[name].value = storage.plain_path(flags.FLAGS[name].value)
        if "config" in flags.FLAGS:
            for line in recipes.settle():
                say(line)
        return rest
    except flags.UnrecognizedFlagError as error:
        fail(_unknown_flag(error.flagname, argv, module))
    except flags.IllegalFlagValueError as error:
        fail(_plain_value_error(recipes.explain(str(error))))
    except (flags.Error, AttributeError, LookupError, TypeError, ValueError, OSError) as error:
        fail(str(error).replace("\\'", "'").replace("\\n", " "))


def _plain_value_error(text: str) -> str:
    """absl's line for a value that is not a number or not among the choices, in plain words; others
    as they are."""
    if match := re.match(r"flag (--\w+=.*): value should be one of <(.*)>$", text, re.DOTALL):
        return f"{match[1]}: give {' or '.join(match[2].split('|'))}"
    pattern = r"flag (--\w+=.*): (invalid literal for int|could not convert string to float)"
    if not (match := re.match(pattern, text, re.DOTALL)):
        return text
    return f"{match[1]}: give a {'whole ' if match[2].endswith('int') else ''}number"


def _check_one_checkpoint() -> None:
    """`check_once` for --checkpoint, where the command has it."""
    if "checkpoint" in flags.FLAGS:
        commas = flags.FLAGS["checkpoint"].flag_type().startswith("comma")
        check_once("checkpoint", "separate them by commas" if commas else "give one")


def check_once(name: str, fix: str) -> None:
    """Raises ValueError where a flag stands there several times, of which the last would count.
    fix: how to give one, or more than one, for the text."""
    if (times := flags.FLAGS[name].present) > 1:
        raise ValueError(
            f"--{name} stands there {times} times, of which the last would count; {fix}"
        )


def refuse_given(names: Sequence[str], why: str) -> None:
    """Raises ValueError for the first of the flags that is given. why: it has no effect."""
    for name in names:
        flag = flags.FLAGS[name]
        if flag.present:
            raise ValueError(f"{' '.join(flag.serialize().split())}: {why}; leave it out")


def where_of(clauses: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """(field, values) of each --where, 'field=value,value'.

    Raises ValueError for one that is written otherwise.
    """
    found = []
    for clause in clauses:
        field, equals, values = clause.partition("=")
        if not field or not equals or not values:
            raise ValueError(f"--where={clause}: write field=value or field=value,value")
        found.append((field, tuple(values.split(","))))
    return found


# Names that other commands, and other programs, have for the same.
_SAME = (
    ("data", "input", "dataset", "folder", "images", "image", "path"),
    ("checkpoint", "init_from", "input", "model", "weights", "ckpt", "run", "pretrained"),
    ("workdir", "out", "output", "output_dir", "outdir", "save_dir"),
    ("num_beams", "beams", "beam_size"),
    ("max_new_tokens", "max_new_tokens", "max_length", "max_len", "seq_len"),
    *recipes.SAME,
)


def _unknown_flag(name: str, argv: Sequence[str], module: Any) -> str:
    """The line for a flag that there is not: the key of the recipe or the flag it may mean."""
    pattern = rf"--?(no)?{re.escape(name)}(=|$)"
    given = next((a for a in argv if re.match(pattern, a)), f"--{name}")
    text, value = f"{given}: no such flag", given.partition("=")[2]
    name, names = name.replace("-", "_"), [flag.name for flag in _own_flags(module)]
    if name == "resume" and "workdir" in names:
        return f"{text}, and none is needed: the same command again goes on where the run stood"
    if name in ("device", "gpu", "cuda"):
        return f"{text}; JAX_PLATFORMS=cpu, cuda or tpu before the command chooses the devices"
    if name == "generation_type" and "num_beams" in names:
        return f"{text}; --num_beams=6 searches by beams, --do_sample samples (--top_p, --top_k)"
    same = next((group for group in _SAME if name in group), ())
    meant = next((other for other in (name, *same) if other in names), None)
    if meant:
        return f"{text}; did you mean --{meant}?"
    if same == _SAME[0] and hasattr(module, "OPERANDS"):
        return f"{text}; {module.OPERANDS} stand without one" + (f": {value}" if value else "")
    if "config" in flags.FLAGS:
        if name.startswith("config."):
            return f"{given} needs a recipe to change: give --config=NAME too"
        aliases = () if same == _SAME[0] else same
        paths = next((found for a in (name, *aliases) if (found := recipes.paths_of(a))), [])
        if paths:
            forms = [f"--config.{path}" + (f"={value}" if value else "") for path in paths[:4]]
            return f"{text}; the key of the recipe is {' or '.join(forms)}"
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"{text}; " + (f"did you mean --{near[0]}?" if near else "--help lists the flags")
