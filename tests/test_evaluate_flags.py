"""What the flags of `evaluate` ask for, and which of them cannot be; without a model."""

import pytest
from test_own_data import by_class, captioned
from test_version_0_1 import flags_of

from coca_jax import evaluate, prepare


@pytest.fixture
def ask(monkeypatch):
    flags_of("evaluate", monkeypatch)

    def parse(**given):
        evaluate.flags.FLAGS.unparse_flags()
        arguments = [f"--{name}={value}" for name, value in given.items()]
        evaluate.flags.FLAGS(["evaluate", *arguments])

    return parse


def test_flags_name_the_data_and_their_split(ask, tmp_path, capsys):
    for given, wanted in (
        (dict(data="scenes"), dict(builtin="scenes", split="test")),
        (dict(data="scenes", split="heldout"), dict(builtin="scenes", split="heldout")),
        (dict(data="tfds:a/b", split="validation"), dict(tfds="a/b", split="validation")),
    ):
        ask(**given)
        assert evaluate.data_of_flags() == wanted
    captioned(tmp_path / "raw", 3)
    out = str(tmp_path / "p")
    prepare.prepare("imagefolder", str(tmp_path / "raw"), out, progress=False)
    ask(data=out, where="site=a,b", text_field="alt")
    wanted = dict(path=out, split="train", where={"site": ["a", "b"]}, text_field="alt")
    assert evaluate.data_of_flags() == wanted
    assert f"{out} has no split 'test': 'train' is used" in capsys.readouterr().err


def test_tasks_are_those_that_the_data_are_for(ask, tmp_path, capsys):
    captioned(tmp_path / "texts", 4)
    by_class(tmp_path / "labels", 2)
    ask(data=f"{tmp_path}/texts/", limit=3)
    tasks = evaluate.tasks_of_flags()
    assert [task["kind"] for task in tasks] == ["retrieval", "captioning"]
    assert {task["name"] for task in tasks} == {"texts_test"} and tasks[0]["limit"] == 3
    assert "has nothing for zeroshot: left out" in capsys.readouterr().err
    ask(data=tmp_path / "labels", name="mine", tasks="zeroshot")
    (task,) = evaluate.tasks_of_flags()
    assert (task["kind"], task["name"]) == ("zeroshot", "mine")
    (tmp_path / "names.txt").write_text("0\tnought\n1\tone\n")
    for kind in ("zeroshot", "knn", "linear_probe"):
        ask(data="scenes", tasks=kind, class_names=tmp_path / "names.txt")
        (task,) = evaluate.tasks_of_flags()
        assert task["class_names"] == str(tmp_path / "names.txt")
    ask(data=tmp_path / "texts", tasks="retrieval,zeroshot")
    with pytest.raises(ValueError, match=r"texts \[test\]: no example has a label"):
        evaluate.tasks_of_flags()
    ask(data=tmp_path / "texts", tasks="bleu")
    with pytest.raises(ValueError, match="--tasks=bleu: choose from zeroshot, "):
        evaluate.tasks_of_flags()


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(data="scenes"), "give --checkpoint=DIR --data=PATH"),
        (dict(checkpoint="x"), "give --checkpoint=DIR --data=PATH"),
        (dict(checkpoint="hf-hub:a/b", data="scenes"), "=hf-hub:a/b is a name; give --out=DIR"),
        (dict(suite="datacomp", checkpoint="x"), "give --suite=NAME with --checkpoint=DIR and --r"),
        (dict(suite="datacomp", checkpoint="x", root="y", data="z"), "and --root=DIR, without --d"),
        (dict(suite="datacomp", checkpoint="x", root="y", num_processes=2), "runs in one process"),
        (
            dict(suite="datacomp", checkpoint="x", root="y", limit=3),
            "--limit=3: a suite scores all",
        ),
        (
            dict(suite="datacomp", checkpoint="x", root="y", rerank=5),
            "--rerank=5: .*; leave it out",
        ),
        (
            dict(suite="datacomp", checkpoint="x", root="y", attention=0),
            "--noattention: a suite",
        ),
        (dict(suite="datacomp", checkpoint="x", root="y", where="a=b"), "^--where=a=b: a suite"),
        (dict(checkpoint="x", data="scenes", csv="t.csv"), "--csv=t.csv: it is for --suite; leave"),
        (dict(checkpoint="x", data="scenes", where="site"), "--where=site: write field=value"),
        (dict(compare="one"), "--compare=one: give two folders or more, with a comma"),
    ],
)
def test_flags_that_do_not_go_together_are_a_line(ask, given, says):
    ask(**given)
    with pytest.raises(ValueError, match=says) as error:
        evaluate.main(["evaluate"])
    assert "\n" not in str(error.value)
