"""Kinds are asked, not compared: no file but the one that parses a kind's name knows it."""

import ast
import dataclasses
import functools
import json
import pathlib

import pytest

from coca_jax.config import Entry, heads, typed
from coca_jax.data import supervision
from coca_jax.data.mixture import Mixture
from coca_jax.evaluation.evaluators import base as declarations
from coca_jax.recipes import base
from coca_jax.training import data_flag

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "coca_jax"
PARSED_IN = {
    "head": (heads.HEADS, "config/heads.py"),
    "pooler": (heads.POOLERS, "config/heads.py"),
    "source": (supervision.KINDS, "data/supervision.py"),
    "evaluator": (declarations.kinds(), "evaluation/evaluators/base.py"),
}


def is_kind(node):
    """Whether an expression is called a kind: `head.kind`, `kind`, `data["kind"]`."""
    if isinstance(node, ast.Subscript):
        return isinstance(node.slice, ast.Constant) and node.slice.value == "kind"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return any(isinstance(a, ast.Constant) and a.value == "kind" for a in node.args)
    return getattr(node, "attr", getattr(node, "id", "")) in ("kind", "head_kind", "pooler_kind")


def names_in(node):
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}


@functools.cache
def asking():
    """(file, comparison or call) of the whole package, parsed once for all tests."""
    return [
        (str(path.relative_to(PACKAGE)), node)
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare | ast.Call)
    ]


@functools.cache
def compared():
    """(file, line, names) of each comparison of a kind with names."""
    found = []
    for file, node in asking():
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(is_kind(side) for side in sides):
                names = set().union(*(names_in(s) for s in sides if not is_kind(s)))
                found.append((file, node.lineno, names))
    return found


@pytest.mark.parametrize("what", PARSED_IN)
def test_no_kind_is_compared_by_its_name(what):
    known, parses = PARSED_IN[what]
    found = [
        f"{file}:{line}"
        for file, line, names in compared()
        if file != parses and names & set(known)
    ]
    assert not found


def test_no_source_is_asked_for_its_class():
    """Whoever asks `isinstance(kind, kinds.Label)` must be edited for a kind that is alike."""
    classes = {f"kinds.{one.__name__}" for one in supervision.KINDS.values()}
    for file, node in asking():
        asked: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif ast.unparse(node.func) in ("isinstance", "issubclass"):
            asked = node.args
        names = {ast.unparse(one) for part in asked for one in ast.walk(part)
                 if isinstance(one, ast.Attribute)}  # fmt: skip
        assert not names & classes, f"{file}:{node.lineno}"


class Amount(supervision.Kind):
    """How many objects a drawn scene has: a kind that the package does not know."""

    name, wanted, has_classes, drawn = "amount", "scene", False, "captions"

    @classmethod
    def tasks(cls, config):
        return [dict(kind="captioning")]

    def trains(self, record):
        return bool(record.extra)

    def choose(self, records, classes, draw):
        chosen = [f"{len(json.loads(r.extra)['scene']['objects'])} objects" for r in records]
        return chosen, chosen

    def vocabulary_texts(self, record, number):
        yield from self.choose([record], {}, None)[0]


def test_a_new_kind_is_one_class(monkeypatch):
    """What trains, learns a vocabulary, is inspected and set up for scores asks the class alone."""
    monkeypatch.setitem(supervision.KINDS, "amount", Amount)
    scenes = dict(builtin="scenes")
    data = typed(base.get_config()).change({"batch_size": 4, "data.sources": (scenes,)})
    found = Mixture(data)
    # Of files and flags config/data.py refuses a kind that it does not name.
    found.entries = [dataclasses.replace(found.entries[0], kind="amount")]
    assert found.sources[0].complete
    shown = [row["text"] for row in found.step_examples(0)]
    assert all(text in {f"{n} objects" for n in (1, 2, 3, 4)} for text in shown)
    assert set(found.sample_texts(50)) == {f"{n} objects" for n in (1, 2, 3, 4)}
    task = data_flag.evaluations(data, dict(builtin="scenes", kind="amount"), "held")
    assert [one["kind"] for one in task] == ["captioning"]


def test_what_kinds_name_is_there():
    config = typed(base.get_config())
    for name in supervision.KINDS:
        assert Entry(kind=name) == Entry.of(dict(kind=name))  # config/data.py names them too
    for kind in supervision.KINDS.values():
        for task in kind.tasks(config):
            evaluator = declarations.of(task["kind"])
            assert set(task) - {"kind"} <= set(evaluator.options), kind.name


def test_every_evaluator_declares_what_the_others_read():
    found = declarations.kinds()
    assert list(found)[:4] == ["zero_shot", "generative", "retrieval", "captioning"]
    for kind, evaluator in found.items():
        assert evaluator.title and evaluator.programs, kind
        assert evaluator.needs in ("", *supervision.KINDS), kind
        assert set(evaluator.headlines) <= set(evaluator.metrics), kind
