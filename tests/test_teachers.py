"""What `recaption` wrote for students, embeddings and scores: whether a run's sources have any."""

import json

import pytest

from coca_jax.config import Entry, Loss
from coca_jax.data import supervision, teachers
from coca_jax.data.sources import source as random_access
from coca_jax.data.sources.records import Record
from coca_jax.data.texts import check_scores


def test_one_record_with_a_teacher_s_embeddings_is_enough():
    """Among 600 of two sources; of another text than those that train it is none."""
    made = dict(recaption=dict(originals=[dict(text="a")], captions=[]), image_emb="", text_emb="")
    plain = Record(b"", ("a",), (), "key", "{}")

    def named(name, text):
        taught = Record(b"", (text,), (), "key", json.dumps(made))
        source = random_access.Source(
            name, 600, lambda rows: [taught if r == 599 else plain for r in rows]
        )
        source.kind = supervision.Caption()
        return source

    entries = [Entry(path="mine")] * 2
    loss = Loss(affinity_weight=0.5, teacher_width=4)
    teachers.check([named("x", "b"), named("y", "a")], entries, loss)
    line = (
        "affinity_weight=0.5: no record of x, z has .*; write data with `coca-jax recaption "
        r"--embeddings --to=array_record` \(those in tars and parquet are not read\), or set 0"
    )
    with pytest.raises(ValueError, match=line):
        teachers.check([named("x", "b"), named("z", "b")], entries, loss)
    teachers.check([named("x", "b")], entries, Loss())


def test_fields_of_the_data_s_own_are_no_teacher_s():
    record = Record(b"", ("a",), (), "key", '{"image_emb": [0.5, 1], "recaption": "yes"}')
    source = random_access.Source("mine", 1, lambda rows: [record for _ in rows])
    with pytest.raises(ValueError, match="loss.imitation_weight=5: no record of mine has a teach"):
        teachers.check(
            [source] * 2, [Entry(path="p")] * 2, Loss(imitation_weight=5.0, teacher_width=4)
        )


def test_texts_that_are_drawn_by_their_scores_have_some():
    """As those of the tars that `recaption` writes have none: a record has the first text alone,
    and of synthetic=1 the original was drawn at each visit."""

    def made(*scores):
        return json.dumps(dict(recaption=dict(originals=[dict(text="a")], scores=scores)))

    def named(name, texts, *extras):
        plain = Record(b"", texts, (), "key", "{}")
        taught = {599 - i: Record(b"", texts, (), "key", extra) for i, extra in enumerate(extras)}
        return random_access.Source(name, 600, lambda rows: [taught.get(r, plain) for r in rows])

    by_score = Entry(path="mine", captions="scored")
    both, one = named("x", ("a", "b"), made(0.3, 0.1), made(0.3)), named("y", ("a",), made(0.3))
    check_scores([both, one, named("z", ("a",))], [by_score] * 2 + [Entry(path="mine")])
    for texts, *extras in (
        (("a",), made(0.3, 0.1), made(0.3)),
        (("a", "b"), '{"recaption": {"scores": 2}}'),
        (("a", "b"), "{}"),
    ):
        line = "data source z: captions='scored', and its records have no scores of the texts that"
        with pytest.raises(ValueError, match=line):
            check_scores([both, named("z", texts, *extras)], [by_score] * 2)
