"""Recaptioning: what is written, that it survives kills to the byte, what the alarm says."""

import io
import itertools
import json
import pathlib
import subprocess
import tarfile

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import tiny_config
from PIL import Image
from test_inference import images, model, no_compile_cache, words  # noqa: F401

from coca_jax.apps.recaption import job, selection, shard, writers
from coca_jax.apps.recaption.captioner import Captioner, Picture
from coca_jax.apps.recaption.request import Request
from coca_jax.config import Entry, typed
from coca_jax.data import batches, filters, supervision
from coca_jax.data.sources.items import Item, Options
from coca_jax.data.sources.records import Record
from coca_jax.data.texts import Draw, choose_scored
from coca_jax.evaluation.evaluators import collapse
from coca_jax.evaluation.metrics import captions
from coca_jax.inference import export_folder
from coca_jax.recipes import tiny
from coca_jax.runtime.workers import Engine
from coca_jax.training import losses as objectives


def encoded(seed: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("checkpoint") / "export"
    export_folder.write(model, str(folder))
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def loaded_once(checkpoint):
    """All tests share one loaded model, on one device, and so its compiled programs."""
    first: list[Captioner] = []

    def loaded(request):
        if not first:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
                first.append(Captioner(request))
        first[0].request = request
        return first[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "Captioner", loaded)
        yield loaded(asked(checkpoint, checkpoint, "", format="parquet")).models[0]


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Three tars of seven pictures with texts, one of which is none."""
    root = tmp_path_factory.mktemp("tars")
    for number in range(3):
        with tarfile.open(root / f"{number:03d}.tar", "w") as tar:
            for i in range(7):
                key = f"{number}{i}"
                data = b"no picture" if (number, i) == (1, 2) else encoded(10 * number + i)
                text = b"a red circle" if i % 2 else b"green"
                for name, content in ((f"{key}.png", data), (f"{key}.txt", text)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(root)


def asked(checkpoint, input, out, **how) -> Request:
    how = (
        dict(
            ways=("nucleus,num_return_sequences=2,max_new_tokens=5",), batch_size=2, rows=4, part=4
        )
        | how
    )
    how.setdefault("format", "webdataset")
    options = Options(check=False)
    return Request(str(input), out=str(out), checkpoints=(checkpoint,), options=options, **how)


def do(request: Request, share: str = "") -> dict:
    engine = Engine(share=share)
    return job.run(request, job.plan(request), engine, say=lambda text: None, progress=False)


def tree(root) -> dict[str, bytes]:
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in pathlib.Path(root).rglob("*")
        if p.is_file()
    }


def members(path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {one.name: tar.extractfile(one).read() for one in tar}


@pytest.fixture(scope="module")
def calm(checkpoint, tars, tmp_path_factory):
    """A work that nothing disturbed: its folder and what it said."""
    out = tmp_path_factory.mktemp("calm") / "out"
    return out, do(asked(checkpoint, tars, out, embeddings=True))


def test_tars_keep_their_keys_and_get_captions_scores_and_embeddings(loaded_once, calm, tars):
    out, told = calm
    assert (told["read"], told["count"], told["filtered"]) == (21, 20, 0)
    assert told["quarantined"] == {"unreadable_image": 1}
    (line,) = (out / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "001.tar/12"
    assert [one["file"] for one in told["shards"]] == ["00000.tar", "00001.tar", "00002.tar"]
    found = members(out / "00001.tar")
    assert len(found) == 6 * 4 and found["10.png"] == encoded(10)
    about = json.loads(found["13.json"])["recaption"]
    assert [one["way"] for one in about["captions"]] == [0, 0]
    texts = [one["text"] for one in about["originals"] + about["captions"]]
    assert texts[0] == "a red circle"
    similar = loaded_once.similarity([encoded(13)] * 2, texts)[0]
    scores = [one["score"] for one in about["originals"] + about["captions"]]
    np.testing.assert_allclose(scores, similar, atol=1e-3)
    arrays = np.load(io.BytesIO(found["13.npz"]))
    assert arrays["image_emb"].dtype == np.float16 and arrays["text_emb"].shape == (3, 16)
    np.testing.assert_allclose(arrays["image_emb"] @ arrays["text_emb"].T, similar, atol=5e-3)
    sound = [one for one in about["captions"] if not selection.UNSOUND & set(one["flags"])]
    best = max(sound, key=lambda one: one["score"], default=dict(score=-1.0))
    (original,) = about["originals"]
    wins = best["score"] > original["score"] + Request.margin
    assert found["13.txt"].decode() == (best if wins else original)["text"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("quantile", [0.0, 0.3])
def test_a_work_that_was_ended_anywhere_ends_the_same(checkpoint, tars, tmp_path, quantile):
    really = shard.storage.place

    def work(out, stop_at):
        """Ends before file number `stop_at` gets its name."""
        request, written = asked(checkpoint, tars, out, quantile=quantile), itertools.count()
        replace = pathlib.Path.replace

        def counted(self, target):
            if next(written) == stop_at:
                raise Killed
            return replace(self, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pathlib.Path, "replace", counted)
            patch.setattr(type(really("/")), "replace", counted)
            try:
                return do(request)
            except Killed:
                return None

    assert work(tmp_path / "calm", -1)["count"] == (20 if not quantile else 14)
    wanted = tree(tmp_path / "calm")
    for stop_at in range(0, 16, 5):
        work(tmp_path / "out", stop_at)
        work(tmp_path / "out", stop_at + 1)
        assert work(tmp_path / "out", -1)
        assert tree(tmp_path / "out") == wanted
        subprocess.run(["rm", "-r", str(tmp_path / "out")], check=True)


def test_shards_done_apart_are_those_done_at_once(checkpoint, tars, calm, tmp_path):
    request = asked(checkpoint, tars, tmp_path / "out", embeddings=True)
    assert do(request, "1/2")["waiting"] == 2
    assert do(request, "0/2")["count"] == 20
    assert tree(tmp_path / "out") == tree(calm[0])
    with pytest.raises(ValueError, match=r"--shard=2/2: give i/n"):
        Engine(share="2/2")
    with pytest.raises(ValueError, match="was begun with ways="):
        job.plan(asked(checkpoint, tars, tmp_path / "out", embeddings=True, ways=("greedy",)))
    with pytest.raises(ValueError, match="holds something else"):
        job.plan(asked(checkpoint, tars, tars))
    with pytest.raises(ValueError, match="begun with other weights"):
        job.begin(request, ["0123"])


def test_parquet_and_array_record_hold_the_same_and_are_read(checkpoint, tars, tmp_path):
    how = dict(text="all", embeddings=True)
    do(asked(checkpoint, tars, tmp_path / "p", to="parquet", **how))
    do(asked(checkpoint, f"{tars}/*.tar", tmp_path / "a", to="array_record", **how))
    rows = pq.read_table(tmp_path / "p/00000.parquet").to_pylist()
    source = filters.open_source(dict(path=str(tmp_path / "a")))
    assert len(source) == 20 and len(rows) == 7
    for row, record in zip(rows, source.read(range(7))):
        assert (row["image"], tuple(row["text"])) == (record.image, record.texts)
        extra = json.loads(record.extra)
        assert row["scores"] == pytest.approx(extra["recaption"]["scores"])
        assert len(row["image_emb"]) == 16 and len(row["text_emb"]) == 3
    again = asked(checkpoint, tmp_path / "p", tmp_path / "again", format="parquet")
    assert do(again)["count"] == 20


def test_flags_tell_captions_that_are_no_use():
    assert selection.repeats("a dog dog dog") and selection.repeats(
        "on the mat on the mat on the mat"
    )
    assert not selection.repeats("a dog and a dog on the mat on the mat")
    same = [["a photo"]] * 4 + [["a red bird", "A red bird!"]]
    eye = np.eye(5, dtype=np.float32)
    captions = np.concatenate([np.full((4, 5), 0.4, np.float32), eye[4:], eye[4:]])
    found = selection.of_part(
        same, [["a photo."], [], [], [], []], [[True]] * 4 + [[True, False]], eye, captions
    )
    assert found[0] == [["duplicate", "collapsed", "generic"]]
    assert found[1] == [["collapsed", "generic"]]
    assert found[4] == [[], ["cut", "duplicate"]]


def result(originals, captions):
    return dict(
        originals=[dict(text=text, score=score) for text, score in originals],
        captions=[dict(text=t, score=s, flags=list(f)) for t, s, *f in captions],
    )


def test_the_better_text_is_kept_by_score():
    one = result([("alt", 0.2)], [("good", 0.3), ("cut off", 0.9, "cut")])
    assert selection.texts(one, "better") == [("good", 0.3)]
    assert selection.texts(one, "synthetic") == [("good", 0.3)]
    assert selection.texts(one, "original") == [("alt", 0.2)]
    assert selection.texts(one, "all") == [("alt", 0.2), ("good", 0.3)]
    bad = result([("alt", 0.2)], [("x x x", 0.9, "repeats")])
    assert selection.texts(bad, "better") == [("alt", 0.2)]
    assert selection.texts(result([], [("x x x", 0.9, "repeats")]), "better") == [("x x x", 0.9)]
    assert selection.texts(one, "better", margin=0.05) == [("good", 0.3)]
    assert selection.texts(one, "better", margin=0.15) == [("alt", 0.2)]
    assert selection.texts(one, "better", keep=True) == [("alt", 0.2)]
    assert selection.texts(result([], [("good", 0.3)]), "better", keep=True) == [("good", 0.3)]
    assert selection.quantile(selection.scores([one, bad], "all"), 0.5) == 0.2
    assert selection.quantile(selection.scores([], "all"), 0.5) == float("-inf")


def test_the_least_score_is_that_of_both_flags(monkeypatch):
    """--min_score and --quantile: the higher of both."""
    one = result([("alt", 0.2)], [("good", 0.3)])
    monkeypatch.setattr(shard, "read_parts", lambda job: [dict(results=[one])])

    def least(**how):
        return shard.threshold(["a job"], asked("c", "in", "out", text="all", **how))

    assert least() == float("-inf") and least(min_score=0.1) == 0.1
    scores = selection.scores([one], "all")
    assert least(quantile=0.9, min_score=0.1) == selection.quantile(scores, 0.9) > 0.1
    assert least(quantile=0.9, min_score=0.7) == 0.7


def test_self_bleu_is_bleu_against_all_others():
    texts = ["a red cat on a mat", "a red cat on a chair", "two dogs", "a a a b", "a red cat"]
    said = [captions.tokenize(text) for text in texts]
    rest = [said[:i] + said[i + 1 :] for i in range(len(said))]
    wanted = captions.bleu(captions.bleu_stats(said, rest))[:, 3].mean()
    assert collapse.self_bleu(texts).mean() == pytest.approx(wanted, rel=1e-6)
    assert collapse.self_bleu(["a photo of a dog"] * 9).mean() == pytest.approx(1, abs=1e-6)
    short = collapse.self_bleu(["", "", "a dog", "A dog!", "a cat", "the red car"])
    np.testing.assert_allclose(short, [1, 1, 1, 1, 0, 0], atol=1e-3)
    assert collapse.distinct(["A dog.", "a dog", "a cat"]).mean() == pytest.approx(2 / 3)


def test_the_alarm_names_what_is_wrong_and_its_threshold():
    good = dict(distinct=0.9, self_bleu=0.5, image_gain=0.4)
    assert collapse.warning(good, 100) == ""
    text = collapse.warning(dict(good, distinct=0.02), 100)
    assert "2.0% of 100 captions are distinct (threshold: 20.0%)" in text
    assert collapse.warning(dict(good, distinct=0.02), 100, of_references=0.03) == ""
    text = collapse.warning(dict(good, image_gain=0.001), 100)
    assert "0.0010 nats per token" in text
    assert "distinct" not in text
    assert collapse.warning(dict(good, distinct=0.02, image_gain=0.001), 100).count("; ") == 1
    assert collapse.warning(dict(good, distinct=0.02), 5) == ""


def test_the_alarm_looks_at_image_tokens_that_are_there(loaded_once, checkpoint):
    captioner = job.Captioner(asked(checkpoint, "", ""))
    pixels = np.random.default_rng(5).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    pictures = [Picture(i, str(i), ["a red circle"], (one,)) for i, one in enumerate(pixels)]
    found, told = captioner.part(pictures, look=True)  # in batches of 2
    texts = [one["captions"][0]["text"] for one in found]
    gain, tokens = collapse.gains(loaded_once, pixels, np.roll(pixels, 2, axis=0), texts)
    assert told == dict(gain=pytest.approx(gain.sum(), abs=2e-3), tokens=tokens.sum())
    assert abs(told["gain"]) > 0.1
    assert captioner.part(pictures[:1], look=True)[1] == {} and captioner.part([]) == ([], {})


def test_members_are_named_as_their_bytes_are():
    assert [writers.suffix(data) for data in (encoded(0), b"\xff\xd8\xff", b"RIFF1234WEBP")] == [
        "png",
        "jpg",
        "webp",
    ]
    assert writers.suffix(b"?") == "img"
    assert Item("a").problem == ""


def test_the_command_tells_a_wrong_way_before_it_loads_anything(tars, commands, tmp_path):
    command = ["recaption", "--checkpoint=none", f"--input={tars}", f"--out={tmp_path / 'out'}"]
    done = commands.run([*command, "--how=loud"], tmp_path)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "error: --how=loud: begin with one of greedy, beams" in done.stderr.splitlines()[-1]


def test_training_draws_captions_by_their_score():
    kind = supervision.of(Entry(captions="scored", synthetic=0.25))
    draw = Draw(0, 0, np.arange(4000))
    extra = json.dumps(dict(recaption=dict(originals=[dict(text="a")], scores=[0.3, 0.1])))
    record = Record(b"", ("a", "b"), (), "key", extra)
    chosen, _ = kind.choose([record] * 4000, {}, draw)
    assert chosen.count("b") == pytest.approx(1000, abs=120)
    made = dict(originals=[dict(text="a")], scores=[0.1, 0.3, 0.35])
    extra = json.dumps(dict(recaption=made))
    chosen = choose_scored([("a", "b", "c")] * 4000, [extra] * 4000, 1.0, draw)
    assert "a" not in chosen  # c is e times as likely as b, which is 0.05 below it
    assert chosen.count("c") / chosen.count("b") == pytest.approx(np.e, rel=0.15)
    chosen = choose_scored([("a", "b")] * 4000, ["{}"] * 4000, 1.0, draw)
    assert chosen.count("a") == pytest.approx(2000, abs=150)


def test_a_teacher_s_embeddings_reach_the_batch_and_its_losses_are_their_definitions(
    loaded_once, checkpoint, tars, tmp_path
):
    teacher, how = loaded_once, dict(to="array_record", text="all", embeddings=True)
    do(asked(checkpoint, f"{tars}/000.tar", tmp_path / "a", **how))
    config = tiny_config()
    config.batch_size = 8
    config.data.sources = (dict(path=str(tmp_path / "a"), captions="scored"),)
    config.loss.update(affinity_weight=1.0, teacher_width=16, teacher_scale=60.0)
    config.loss.imitation_weight = 1.0
    config.model.text.update(vocab_size=320, max_len=24)
    made = batches.Batches(typed(config), teacher.vocabulary).batch(0)
    image, text = made["teacher_image"], made["teacher_text"]
    source = filters.open_source(dict(path=str(tmp_path / "a")))
    pictures = [record.image for record in source.read(made["index"])]
    np.testing.assert_allclose(image, teacher.encode_image(pictures), atol=2e-3)
    said = [teacher.vocabulary.decode(row[v][1:-1].tolist())
            for row, v in zip(made["tokens"], made["text_valid"])]  # fmt: skip
    np.testing.assert_allclose(text, teacher.encode_text(said), atol=2e-3)

    known = np.arange(8) != 2
    rng = np.random.default_rng(0)
    own = rng.normal(size=(2, 8, 16)).astype(np.float32)
    losses = {one.name: one for one in objectives.of(typed(config))}
    given = dict(
        teacher_image=image * known[:, None],
        teacher_text=text,
        image_embedding=own[0],
        text_embedding=own[1],
        scale=np.float32(3),
    )
    found, _ = losses["affinity_loss"].value(given, None)
    p = softmax(60 * image[known] @ text[known].T)
    q = softmax(3 * own[0][known] @ own[1][known].T)
    pt = softmax(60 * text[known] @ image[known].T)
    qt = softmax(3 * own[1][known] @ own[0][known].T)
    wanted = ((p * np.log(p / q)).sum(1) + (pt * np.log(pt / qt)).sum(1)).mean() / 2
    assert float(found) == pytest.approx(wanted, rel=1e-3)

    loss = losses["imitation_loss"]
    halves = [{k: v if k == "scale" else v[rows] for k, v in given.items()}
              for rows in (np.s_[:3], np.s_[3:])]  # fmt: skip
    found = sum(float(loss.value(half, loss.totals(given))[0]) for half in halves)
    cosines = (own[0] * image).sum(1)[known].mean(), (own[1] * text).sum(1)[known].mean()
    assert found == pytest.approx(2 - sum(cosines), rel=1e-5)
    _, means = loss.value(given, loss.totals(given))
    assert float(means["image_imitation"][0] / means["image_imitation"][1]) == pytest.approx(
        cosines[0], rel=1e-5
    )


def test_a_teacher_s_width_must_be_told_and_be_that_of_who_imitates_it():
    config = tiny.get_config()
    config.loss.imitation_weight = 1.0
    with pytest.raises(ValueError, match="teacher_width=0 .*imitation_weight=1.0"):
        typed(config).check()
    config.loss.teacher_width = config.model.embed_dim + 8
    with pytest.raises(ValueError, match=r"imitation_weight=1.0 .* loss.teacher_width=\d+"):
        typed(config).check()
    config.loss.update(imitation_weight=0.0, affinity_weight=1.0)
    typed(config).check()


def softmax(x):
    weights = np.exp(x.astype(np.float64) - x.max(1, keepdims=True)) + 1e-300
    return weights / weights.sum(1, keepdims=True)
