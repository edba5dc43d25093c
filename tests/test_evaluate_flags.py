"""What the flags of `evaluate` ask for, and which of them cannot be; without a model."""

import csv
import json
import pathlib
import re
import types

import pytest
from conftest import flags_of
from in_place_cases import write_tar
from test_own_data import by_class, captioned, recipe

from coca_jax import inference
from coca_jax.cli import evaluate, prepare
from coca_jax.config import typed
from coca_jax.data import evaluation_data, filters, leakage, source_index
from coca_jax.data import prepare as splits
from coca_jax.data.evaluation_data import Records
from coca_jax.data.mixture import Mixture
from coca_jax.evaluation import runner as evaluation
from coca_jax.evaluation.evaluators import base, inputs
from coca_jax.training import data_flag


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


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


def test_one_label_beside_captions_is_no_classification(ask, tmp_path, capsys):
    """The command ended at the classes, and scored no captions, of which there were some."""
    captioned(tmp_path / "one", 6, label=lambda i: "photo")
    captioned(tmp_path / "two", 6, label=lambda i: ("photo", "drawing")[i % 2])
    usual = ["zero_shot", "retrieval", "captioning"]
    for name, kinds in (("one", usual[1:]), ("two", usual)):
        ask(data=str(tmp_path / name))
        assert [task["kind"] for task in evaluate.tasks_of_flags()] == kinds
    assert capsys.readouterr().err.count("one has nothing for zero_shot: left out") == 1
    ask(data=str(tmp_path / "one"), tasks="zero_shot")
    (task,) = evaluate.tasks_of_flags()
    says = "zero_shot of one_test: all labels are 'photo'. "
    with pytest.raises(ValueError, match=says):
        inputs.names_and_labels(task)


def test_tasks_are_those_that_the_data_are_for(ask, tmp_path, capsys):
    captioned(tmp_path / "texts", 4)
    by_class(tmp_path / "labels", 2)
    ask(data=f"{tmp_path}/texts/", limit=3)
    tasks = evaluate.tasks_of_flags()
    assert [task["kind"] for task in tasks] == ["retrieval", "captioning"]
    assert {task["name"] for task in tasks} == {"texts_test-first3"} and tasks[0]["limit"] == 3
    assert "has nothing for zero_shot: left out" in capsys.readouterr().err
    for where, limit, wanted in (
        ("label=0", 0, "labels_test-label-0"),
        ("label=0,1", 2, "labels_test-label-0+1-first2"),
    ):
        ask(data=tmp_path / "labels", where=where, limit=limit)
        assert {task["name"] for task in evaluate.tasks_of_flags()} == {wanted}
    ask(data=tmp_path / "labels", name="mine", tasks="zero_shot", limit=2)
    (task,) = evaluate.tasks_of_flags()
    assert (task["kind"], task["name"]) == ("zero_shot", "mine")
    (tmp_path / "names.txt").write_text("0\tnought\n1\tone\n")
    for kind in ("zero_shot", "knn", "linear_probe"):
        probe = kind != "zero_shot"
        learned = dict(train_limit=300) if probe else {}
        ask(data="scenes", tasks=kind, class_names=tmp_path / "names.txt", **learned)
        (task,) = evaluate.tasks_of_flags()
        assert task["class_names"] == str(tmp_path / "names.txt")
        assert task.get("train_limit") == (300 if probe else None)
    ask(data=tmp_path / "texts", tasks="retrieval,zero_shot")
    with pytest.raises(ValueError, match=r"texts \[test\]: no example has a label"):
        evaluate.tasks_of_flags()
    ask(data=tmp_path / "texts", tasks="bleu")
    with pytest.raises(ValueError, match="--tasks=bleu: choose from zero_shot, "):
        evaluate.tasks_of_flags()


def test_two_parts_have_two_names():
    long = "a" * 40
    parts = [
        *({"vendor": [long, "b"]}, {"vendor": [long, "c"]}, {"vendor": [long]}),
        *({"v": ["a b"]}, {"v": ["a_b"]}, {"v": ["a/b"]}, {"v": ["a", "b"]}, {"v": ["a+b"]}),
        *({"v": ["a+b", "c"]}, {"v": ["a", "b+c"]}, {"v w": ["a"]}, {"v_w": ["a"]}),
    ]
    names = [evaluate._part(part, 0) for part in parts]
    assert len(set(names)) == len(parts)
    plain = [f"-vendor-{long}", "-v-a_b", "-v-a+b", "-v_w-a"]  # where nothing is lost
    assert [name for name in names if name in plain] == plain
    others = [name for name in names if name not in plain]
    assert all(re.fullmatch(r"[\w.+-]+-[0-9a-f]{8}", name) for name in others)
    assert evaluate._part({"v": ["a b"]}, 30) == f"{names[3]}-first30"


def with_field(folder, kind):
    """40 captioned pictures, whose field `split` says 'Train' of 30 and 'val' of 10."""
    captioned(folder, 40, split=lambda i: "val" if i % 4 == 0 else "Train")
    if kind == "imagefolder":
        return folder
    table = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    table.unlink()
    with open(folder / "list.csv", "w") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "list.csv"


@pytest.mark.parametrize("kind", ["imagefolder", "csv"])
def test_the_field_that_tells_splits_tells_them_to_evaluations(kind, ask, tmp_path, capsys):
    path = str(with_field(tmp_path / "a", kind))
    held = {f"picture {i}" for i in range(0, 40, 4)}
    ask(data=path)
    data = evaluate.data_of_flags()
    assert data == dict(path=path, split="validation")
    assert f"{path} has no split 'test': 'validation' is used" in capsys.readouterr().err
    assert {record["text"][0] for record in Records(data)} == held
    assert evaluation_data.splits(data) == ["train", "validation"]
    assert evaluation_data.counts(data) == dict(caption=10, label=0)
    for split, count in (("train", 30), ("val", 10), ("Dev", 10)):
        ask(data=path, split=split)
        assert len(Records(evaluate.data_of_flags())) == count
    for split in ("validaton", "test"):
        ask(data=path, split=split)
        with pytest.raises(ValueError, match=f"'{split}'; they have train, validation"):
            evaluate.data_of_flags()
        with pytest.raises(ValueError, match=f"no split '{split}'; their field 'split' tells t"):
            Records(dict(path=path, split=split))
        task = dict(kind="retrieval", name="x", data=dict(path=path, split=split))
        with pytest.raises(ValueError, match=f"retrieval of x: .*no split '{split}'"):
            base.check([task])
    # Whoever names the values decides.
    ask(data=path, where="split=val", split="mine")
    assert len(Records(evaluate.data_of_flags())) == 10
    # The same of a run on these data, in a recipe and by a flag.
    own = typed(recipe(data=dict(sources=(dict(path=path),))))
    for config in (
        source_index.of_sources(own, str(tmp_path / "of_recipe")),
        data_flag.apply(own, [path], str(tmp_path / "of_flag")),
    ):
        assert Mixture(config).sizes == [30]
        assert leakage.trained_on(config.data.sources, dict(path=path, split="train"))
        assert not leakage.trained_on(config.data.sources, data)
    assert leakage.trained_on(own.data.sources, dict(path=path, split="train"))


def test_a_run_goes_on_with_the_index_that_it_made_of_all_rows(tmp_path):
    path = str(with_field(tmp_path / "a", "csv"))
    config = typed(recipe(data=dict(sources=(dict(path=path),))))
    out = str(tmp_path / "run/data/list")
    source_index._make("csv", path, "train", out, source_index._options(config.data.sources[0]))
    found = source_index.of_sources(config, str(tmp_path / "run"))
    assert Mixture(found).sizes == [40]
    for split in ("train", "validation"):  # the rows of both trained
        assert leakage.trained_on(found.data.sources, dict(path=path, split=split))


def test_examples_that_trained_are_known_where_nothing_tells_a_split(ask, tmp_path):
    folder = str(captioned(tmp_path / "a", 60))
    config = data_flag.apply(typed(recipe()), [folder], str(tmp_path / "run"))
    (source,) = config.data.sources
    ask(data=f"{folder}/../a/")
    assert leakage.trained_on(config.data.sources, evaluate.data_of_flags()) == source
    held = f"; what was held out of them is --data={tmp_path}/run/data/a --split=test"
    assert leakage.held_out(source) == held
    assert not leakage.trained_on(config.data.sources, dict(path=source.path, split="test"))
    assert not leakage.trained_on(
        config.data.sources, dict(path=str(captioned(tmp_path / "b", 3)), split="")
    )
    gone = typed(recipe(data=dict(sources=(dict(path="nowhere://bucket/a"),))))
    assert not leakage.trained_on(gone.data.sources, dict(path=folder, split="test"))
    only = typed(recipe(data=dict(sources=(dict(path=folder, where={"site": ["x", "y"]}),))))
    asked = dict(path=folder, split="train", where={"site": "z"})
    assert not leakage.trained_on(only.data.sources, asked)
    assert leakage.trained_on(only.data.sources, dict(asked, where={"site": ["y", "z"]}))


def test_examples_that_trained_are_known_by_what_they_were_imported_from(tmp_path):
    folder = str(captioned(tmp_path / "a", 60))
    run = str(tmp_path / "run")
    splits.prepare_with_holdout("imagefolder", folder, run, 0.1, progress=False, processes=1)
    config = data_flag.apply(typed(recipe()), [run], str(tmp_path / "other_run"))
    by_name = data_flag.apply(typed(recipe()), [folder], str(tmp_path / "named"))
    (source,) = config.data.sources
    trained = {record.texts for record in filters.open_source(source)}
    for share in (0.05, 0.4):
        out = str(tmp_path / f"p{share}")
        how = dict(progress=False, processes=1)
        splits.prepare_with_holdout("imagefolder", folder, out, share, **how)
        held = {record.texts for record in filters.open_source(out, "test")}
        asked = dict(path=out, split="test")
        assert (
            bool(leakage.trained_on(config.data.sources, asked))
            == bool(held & trained)
            == (share > 0.1)
        )
        assert leakage.trained_on(config.data.sources, dict(asked, split="train")) == source
        # Another tenth, chosen by the examples' names, is in both of its splits.
        assert leakage.trained_on(by_name.data.sources, asked) == by_name.data.sources[0]
    assert leakage.part(source, asked) == "some of these" and 0 < len(held & trained) < len(trained)
    assert leakage.part(source, dict(path=folder, split="test")) == "these very"
    other = str(tmp_path / "other")
    prepare.prepare("imagefolder", str(captioned(tmp_path / "b", 9)), other, progress=False)
    assert not leakage.trained_on(config.data.sources, dict(path=other, split="train"))


def test_a_place_may_be_written_in_several_ways(tmp_path, monkeypatch, capsys):
    write_tar(tmp_path / "sets/vqa/0.tar", 0, 6)
    monkeypatch.chdir(tmp_path)
    config, sizes = None, []
    for path in (str(tmp_path / "sets/vqa"), "sets/vqa", "sets/vqa/", "./sets/../sets/vqa"):
        sizes.append(len(Records(dict(path=path, split="test"))))
        config = typed(recipe(data=dict(sources=(dict(path=path),))))
        sizes += Mixture(source_index.of_sources(config, str(tmp_path / "run"))).sizes
    assert sizes == [6] * 8
    assert capsys.readouterr().err.count("making an index of it") == 2  # to evaluate, and to train
    told = r"data source sets/vqa \[test\]: no record has {'kind': .*; no field is called 'kind'"
    with pytest.raises(ValueError, match=told):  # and no word of where the index is
        Records(dict(path="sets/vqa", split="test", where=dict(kind=["foo"])))


def test_data_that_are_named_twice_have_one_index(tmp_path, capsys):
    folder = str(captioned(tmp_path / "a", 60, label=lambda i: f"class {i % 3}"))
    entries = [dict(path=folder), dict(path=f"{folder}/", kind="label")]
    config = typed(recipe(data=dict(sources=entries)))
    for make in (
        lambda out: source_index.of_sources(config, out),
        lambda out: data_flag.apply(config, [folder, f"{folder}/:label"], out),
    ):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        found = make(str(out))
        sizes = Mixture(found).sizes
        assert [s.path for s in found.data.sources] == [str(out / "data/a")] * 2
        assert sizes[0] == sizes[1] and [p.name for p in (out / "data").iterdir()] == ["a"]
        assert make(str(out)).data.sources == found.data.sources
        assert capsys.readouterr().err.count("making an index of it") == 1
    # Two folders of one name, or two splits, are not read equally.
    other = dict(path=str(captioned(tmp_path / "b/a", 5)), weight=2.0)
    entries = [entries[0], other, entries[1]]
    other = typed(recipe(data=dict(sources=entries)))
    found = source_index.of_sources(other, str(tmp_path / "other"))
    assert Mixture(found).sizes == [60, 5, 60]
    names = [pathlib.Path(source.path).name for source in found.data.sources]
    assert names == ["a", "a-2", "a"]


@pytest.mark.parametrize(
    "given, says",
    [
        (dict(data="scenes"), "give --checkpoint=DIR --data=PATH"),
        (dict(checkpoint="x"), "give --checkpoint=DIR --data=PATH"),
        (dict(checkpoint="hf-hub:a/b", data="scenes"), "=hf-hub:a/b is a name; give --out=DIR"),
        (
            dict(suite="wds/a", checkpoint="x"),
            "give --suite=NAMES with --checkpoint=DIR and --root",
        ),
        (dict(suite="wds/a", checkpoint="x", root="y", data="z"), "--root=DIR, without --data"),
        (dict(suite="wds/a", checkpoint="x", root="y", num_processes=2), "runs in one process"),
        (dict(suite="wds/a", checkpoint="x", root="y", limit=3), "--limit=3: CLIP_benchmark"),
        (dict(suite="wds/a", checkpoint="x", root="y", rerank=5), "--rerank=5: .*; leave it out"),
        (dict(checkpoint="x", data="scenes", root="t"), "--root=t: it is for --suite; leave"),
        (dict(checkpoint="x", data="scenes", where="site"), "--where=site: write field=value"),
        (
            dict(checkpoint="x", data="scenes", where="a=b"),
            "^--where=a=b: scenes are drawn, .* out$",
        ),
        (dict(checkpoint="x", data="scenes", text_field="t"), "--text_field=t: scenes are drawn"),
    ],
)
def test_flags_that_do_not_go_together_are_a_line(ask, given, says):
    ask(**given)
    with pytest.raises(ValueError, match=says) as error:
        evaluate.main(["evaluate"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given, says",
    [
        (
            dict(tasks="zero_shot", rerank=20),
            "--rerank=20: it is of retrieval, and the tasks are z",
        ),
        (
            dict(tasks="zero_shot", querybank="a"),
            "--querybank=a: it is of retrieval, and the tasks",
        ),
        (dict(tasks="zero_shot", num_beams=4), "--num_beams=4: it is of captioning, and the tasks"),
        (dict(tasks="knn", questions="q"), "=q: it is of classification and answers, and the task"),
        (dict(tasks="captioning", prompts="no_such_set"), "--prompts=no_such_set: it is of zero_s"),
        (
            dict(tasks="retrieval", class_names="none.txt"),
            "--class_names=none.txt: it is of zero_s",
        ),
        (dict(tasks="zero_shot", train_limit=9), "--train_limit=9: it is of linear_probe and knn"),
        (dict(tasks="retrieval", attention=0), "--noattention: it is of captioning"),
        (dict(prompts="photo", data="texts"), "--prompts=photo: .* are retrieval, captioning"),
    ],
)
def test_flags_that_no_task_reads_are_refused(ask, given, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    captioned(tmp_path / "texts", 2)  # for which zero_shot, a usual one, is left out
    ask(**dict(dict(data="scenes"), **given))
    with pytest.raises(ValueError, match=f"{says}.*; leave it out") as error:
        evaluate.tasks_of_flags()
    assert "\n" not in str(error.value)


def test_flags_of_one_of_several_tasks_are_read(ask, tmp_path):
    captioned(tmp_path, 2)
    bank = str(tmp_path)
    ask(data="scenes", tasks="zero_shot,retrieval", rerank=3, prompts="bare", querybank=bank)
    zero_shot, retrieval = evaluate.tasks_of_flags()
    assert (zero_shot["prompts"], retrieval["rerank"]) == ("bare", 3)
    assert retrieval["querybank"] == dict(path=bank)


def test_whose_scores_a_folder_holds_is_noted_before_the_first(ask, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    model = types.SimpleNamespace(config=typed(recipe()), step=None)
    monkeypatch.setattr(inference, "load", lambda *_, **__: model)
    monkeypatch.setattr(evaluation, "run_tasks", killed)
    given = dict(data="scenes", tasks="retrieval", out=tmp_path / "scores")
    ask(checkpoint="runs/a", **given)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(["evaluate"])
    ask(checkpoint="runs/b", **given)
    with pytest.raises(ValueError, match="scores: contains the scores of runs/a"):
        evaluate.main(["evaluate"])


@pytest.mark.parametrize("place", ["none", "none.csv", "none/"])
def test_data_that_are_not_there_are_told_before_the_model_is_loaded(place, commands, tmp_path):
    done = commands.run(["evaluate", "--checkpoint=x", f"--data={place}"], tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: {place}: no such file or folder\n"


def test_bad_flags_are_one_line(commands, tmp_path):
    by_class(tmp_path / "x", 1)
    flags = ["--checkpoint=x", "--data=x", "--tasks=zero_shot,bleu"]
    done = commands.run(["evaluate", *flags], tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("error: --tasks=bleu: choose from zero_shot")
    )
