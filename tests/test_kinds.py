"""Kinds of data sources and evaluators: what a new one has to say."""

import copy
import json

from coca_jax.config import Entry, typed
from coca_jax.data import supervision
from coca_jax.data.mixture import Mixture
from coca_jax.evaluation.evaluators import base as declarations
from coca_jax.recipes import base
from coca_jax.training import data_flag


class Amount(supervision.Kind):
    """How many objects a drawn scene has: a kind that the package does not know."""

    name, wanted, has_classes, drawn = "amount", "scene", False, "captions"

    @classmethod
    def tasks(cls, loss, data):
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
    entry = copy.copy(found.entries[0])
    object.__setattr__(entry, "kind", "amount")
    found.entries = [entry]
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
        for task in kind.tasks(config.loss, config.data):
            evaluator = declarations.get(task["kind"])
            assert set(task) - {"kind"} <= set(evaluator.options), kind.name


def test_every_evaluator_declares_what_the_others_read():
    found = declarations.kinds()
    assert list(found)[:4] == ["zero_shot", "generative", "retrieval", "captioning"]
    for kind, evaluator in found.items():
        assert evaluator.title and evaluator.programs, kind
        assert evaluator.needs in ("", *supervision.KINDS), kind
        assert set(evaluator.headlines) <= set(evaluator.metrics), kind
