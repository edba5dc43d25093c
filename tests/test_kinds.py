"""Kinds are asked, not compared: no file but the one that parses a kind's name knows it."""

import ast
import pathlib

import pytest

from coca_jax.data import kinds
from coca_jax.evaluators import declarations
from coca_jax.models import head_kinds, pooler_kinds

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "coca_jax"
PARSED_IN = {
    "head": (head_kinds.KINDS, "models/head_kinds.py"),
    "pooler": (pooler_kinds.KINDS, "models/pooler_kinds.py"),
    "source": (kinds.KINDS, "data/kinds.py"),
    "evaluator": (declarations.kinds(), "evaluators/declarations.py"),
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


def compared(path):
    """(line, names) of each comparison of a kind with names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(is_kind(side) for side in sides):
                yield node.lineno, set().union(*(names_in(s) for s in sides if not is_kind(s)))


@pytest.mark.parametrize("what", PARSED_IN)
def test_no_kind_is_compared_by_its_name(what):
    known, file = PARSED_IN[what]
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in PACKAGE.rglob("*.py")
        if str(path.relative_to(PACKAGE)) != file
        for line, names in compared(path)
        if names & set(known)
    ]
    assert not found


def test_every_evaluator_declares_what_the_others_read():
    found = declarations.kinds()
    assert list(found)[:4] == ["zeroshot", "generative", "retrieval", "captioning"]
    for kind, evaluator in found.items():
        assert evaluator.title and evaluator.programs, kind
        assert evaluator.needs in ("", *kinds.KINDS), kind
        assert set(evaluator.headlines) <= set(evaluator.metrics), kind
