"""Some hundred damaged and hostile inputs of every kind; tests/fuzz/run.py reads more of them."""

import pathlib
import random
import re
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent / "fuzz"))
import run  # noqa: E402
from kinds import NAMES, load, surroundings  # noqa: E402

KINDS = [name for name in NAMES if name != "broken"]


@pytest.mark.long
def test_no_input_of_any_kind_gives_more_than_a_line():
    accounts = list(run.fuzz(KINDS, range(20), seed=1))
    assert [account.kind for account in accounts] == KINDS
    assert not [(account.kind, account.findings) for account in accounts if account.findings]
    refused = sum(account.outcomes["refused"] for account in accounts)
    assert 0 < refused < sum(account.inputs for account in accounts) == 20 * len(KINDS)


def test_an_input_is_a_function_of_its_number_alone():
    kind = load("jsonl")
    (seed,) = kind.seeds()

    def drawn(number):
        return kind.mutate(random.Random(number), seed)

    first = [drawn(number) for number in range(300)]
    assert [drawn(number) for number in range(299, -1, -1)] == first[::-1]


DEEP = 20_000  # brackets: newer interpreters read some thousands
HUGE = b"{'descr': '<f2', 'fortran_order': False, 'shape': (1000000000000, 4), }".ljust(117) + b"\n"
# What long runs have found: (kind, the input, the line that it gives now).
FOUND = [
    (
        "overrides",
        b'["--config=base", "--config.data.augment[0]=x"]',
        "is no tuple and has no elem",
    ),
    ("overrides", b'["--config=base", "--config.seed[0].x=1"]', "is no tuple and has no elements"),
    ("manifests", b'{"class_names": [], "splits": {"train": {}}}', "'train' has no list of shards"),
    ("manifests", b'{"splits": ' + b"[" * DEEP + b"]" * DEEP + b"}", "nested too deep"),
    ("manifests", b'{"splits": {"a": {"shards": [{"file": "../x"}]}}}', "no file of the folder"),
    ("captions", b"[" * DEEP + b"]" * DEEP + b"\n", "line 1 is not a caption"),
    ("configs", b"[" * DEEP + b"]" * DEEP, "nested too deep"),
    ("searches", b"\0{}", "names no model, checkpoint and width"),
    ("searches", b"\1\x93NUMPY\1\0v\0" + HUGE, "0 bytes of float16 (1000000000000, 4)"),
    ("searches", b"\1\x93NUMPY\1\0v\0" + HUGE.replace(b"}", b"("), "not a .npy file"),
    ("configs", b'{"model": [], "steps": 1}', "config.json: config.model="),
    ("configs", b'{"model": {"text": {"max_len": {"a": 1}}}}', "max_len={'a': 1}: give a whole"),
]


@pytest.mark.parametrize("kind, data, line", FOUND)
def test_what_was_found_is_a_line_now(kind, data, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    surroundings(tmp_path)
    (tmp_path / "input").write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(line)):
        load(kind).run(tmp_path / "input")


FILES = {
    "parquet-aborts": "damaged_archive",
    "videos-no-code": "unreadable_image",
    "images-tags": "",
}


@pytest.mark.parametrize("name", FILES)
def test_what_was_found_in_files_of_other_formats_is_told(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    surroundings(tmp_path)
    found = pathlib.Path(__file__).parent / "fuzz/found" / name
    (tmp_path / "input").write_bytes(found.read_bytes())
    assert load(name.split("-")[0]).run(tmp_path / "input").startswith(FILES[name])


def test_each_fault_of_a_reader_is_found():
    # After "large" a new worker begins again with "none".
    (account,) = run.fuzz(["broken"], range(6), seed=0)
    found = {finding["number"]: finding["what"] for finding in account.findings}
    assert sorted(found) == [2, 3, 4, 5]
    assert found[2].startswith("traceback at broken.py:") and "KeyError: 'no line'" in found[2]
    assert found[3].startswith("differs: 'reading: 0', then 'reading: 1'")
    assert found[4].startswith("took 2.") and found[5].startswith("memory: ")
    assert account.outcomes["refused"] == 1


@pytest.mark.parametrize("fault, said", [("asks", "memory: "), ("dies", "died: SIGABRT")])
def test_a_reader_that_asks_for_too_much_or_dies_is_found(fault, said, monkeypatch):
    monkeypatch.setenv("COCA_JAX_FUZZ_FAULTS", fault)
    (account,) = run.fuzz(["broken"], range(1), seed=0)
    assert account.findings[0]["what"].startswith(said)
