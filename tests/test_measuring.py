"""How figures are measured: what is drawn for them, and what is made of runs that are there."""

import io
import json
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image, ImageColor

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "benchmarks"))

import earlier_recipe  # noqa: E402
import figure_rows  # noqa: E402
import locked_recipe  # noqa: E402
import measuring  # noqa: E402
import measuring_ablations  # noqa: E402
import measuring_faults  # noqa: E402
import measuring_peers  # noqa: E402
import measuring_runs  # noqa: E402
import pictures  # noqa: E402
import pictures_recipe  # noqa: E402
import released_recipe  # noqa: E402
import text_lengths  # noqa: E402

from coca_jax.apps.ablating import table  # noqa: E402
from coca_jax.checkpoints import config_file  # noqa: E402
from coca_jax.config import checks, typed  # noqa: E402


@pytest.fixture
def given(tmp_path):
    return measuring.Given(tmp_path, tmp_path / "runs")


def run(given, name, seed=0, **scores):
    """A run that is done."""
    folder = given.runs / name / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "eval.json").write_text(json.dumps(scores))
    life = dict(life=dict(seconds=dict(step=90.0, eval=30.0)))
    (folder / "goodput.json").write_text(json.dumps(life))
    return folder


def with_interval(key, value):
    return {key: value, f"{key}_low": value - 0.1, f"{key}_high": value + 0.1}


def test_pictures_are_drawn_once_and_alike(tmp_path):
    folder = pictures.drawn("jpegs", tmp_path / "jpegs", 3)
    data = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    sizes = [Image.open(io.BytesIO(one)).size for one in data]
    assert len(data) == 3 and all(375 <= side <= 640 for size in sizes for side in size)
    assert 30_000 < np.mean([len(one) for one in data]) < 100_000
    assert len((folder / "metadata.jsonl").read_text().splitlines()) == 3
    (folder / "00001.jpg").write_bytes(b"")
    assert (pictures.drawn("jpegs", folder, 3) / "00001.jpg").read_bytes() == b""  # it is there
    again = pictures.drawn("jpegs", tmp_path / "again", 3)
    assert [path.read_bytes() for path in sorted(again.glob("*.jpg"))] == data


def test_a_folder_is_told_by_its_pictures(tmp_path):
    for path in pictures.drawn("labels", tmp_path / "labels", 30).glob("*/*.png"):
        colours = {colour for _, colour in Image.open(path).getcolors()}
        assert colours == {(255, 255, 255), ImageColor.getrgb(path.parent.name)}


@pytest.mark.parametrize("kind, other", [("captions", "jpegs"), ("labels", "captions")])
def test_pictures_that_are_others_are_not_taken_for_these(tmp_path, kind, other, monkeypatch):
    place = tmp_path / "drawn"
    place.mkdir()  # an empty folder is one to draw in
    place.with_name("drawn.half").mkdir()
    (tmp_path / "drawn.half/99999.png").touch()  # as a killed call for more pictures leaves it
    pictures.drawn(kind, place, 3)
    assert pictures.there(kind, place) == 3 and not (place / "99999.png").exists()
    monkeypatch.setattr(sys, "argv", ["pictures.py", kind, str(place), "--count=4"])
    with pytest.raises(
        SystemExit, match=f"drawn has 3 pictures of the kind {kind}, not 4: remove it"
    ):
        pictures.main()
    with pytest.raises(ValueError, match=f"drawn has 0 pictures of the kind {other}, not 3"):
        pictures.drawn(other, place, 3)


def test_a_tar_of_another_count_is_not_taken_for_it(tmp_path):
    tar = pictures.drawn("tar", tmp_path / "two.tar", 2)
    assert pictures.drawn("tar", tar, 2) == tar
    with pytest.raises(ValueError, match="two.tar has 2 pictures of the kind tar, not 3"):
        pictures.drawn("tar", tar, 3)


def test_shapes_have_captions_that_say_what_is_there(tmp_path):
    folder = pictures.drawn("captions", tmp_path / "captions", 40)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len({line["text"] for line in lines}) > 35
    for line in lines[:10]:
        colour = line["text"].split()[1]
        seen = Image.open(folder / line["file_name"]).getcolors(maxcolors=10_000)
        assert Image.new("RGB", (1, 1), colour).getpixel((0, 0)) in [rgb for _, rgb in seen]
    labels = pictures.drawn("labels", tmp_path / "labels", 40)
    assert {path.name for path in labels.iterdir()} == set(pictures.COLOURS)


def test_texts_are_cut_as_the_program_cuts_them():
    made = text_lengths.config(4)
    counts = np.full(16, 5)
    counts[3] = 30  # goes to the long quarter
    assert text_lengths.cut(counts, made) == (8, 32)
    assert text_lengths.share((8, 32), 4) == (3 * 8 + 32) / 4 / 64
    assert text_lengths.cut(counts, text_lengths.config(1)) == (32, 32)
    assert text_lengths.share((32, 32), 1) == 0.5
    assert 0 < text_lengths.saved(24) < text_lengths.saved(16) < 0.75


def test_runs_that_are_there_are_not_trained_again(given):
    scores = {}
    for key in measuring_runs.EMOJI.values():
        scores |= with_interval(key, 0.5)
    for key in measuring_runs.EMOJI_CAPTIONS:
        scores |= with_interval(f"captioning/emoji_openmoji/{key}", 0.4)
    run(given, "emoji", 0, **scores)
    found = measuring_runs.emoji(given)
    assert found["emoji/exact"] == pytest.approx(dict(value=40, low=30, high=50))
    assert found["emoji/reranked_image_to_text"] == pytest.approx(dict(value=50, low=40, high=60))
    assert found["emoji/minutes"] == dict(value=2.0)
    assert found["twins/emoji"]["exact"] == pytest.approx(40.0)
    assert found["twins/emoji"]["bleu4_low"] == pytest.approx(0.3)  # no share of a hundred


def test_seed_0_stands_with_the_intervals_of_its_examples(given):
    run(given, "demo", **with_interval("a/top1", 0.8), **with_interval("b/attribute_f1", 0.7))
    found = measuring_runs.one_run("demo", {"x": "a/top1", "y": "b/attribute_f1"})(given)
    assert found["x"] == pytest.approx(dict(value=80, low=70, high=90))
    assert found["y"] == pytest.approx(dict(value=0.7, low=0.6, high=0.8))


def test_the_demo_has_two_seeds_beside_the_first(given):
    for seed in range(3):
        scores = {}
        for key in measuring_runs.DEMO.values():
            scores |= with_interval(key, 0.5 + seed / 10)
        run(given, "demo", seed, **scores)
    found = measuring_runs.demo(given)
    assert found.keys() == measuring_runs.DEMO.keys()
    row = dict(value=50, low=40, high=60, seed_1=60, seed_2=70)
    assert found["demo/exact"] == pytest.approx(row)


def test_three_seeds_of_a_recipe(given):
    for seed in range(3):
        run(given, "tiny", seed, **{"a/top1": seed / 10})
    found = measuring_runs.trained("tiny", {"x": "a/top1"})(given)
    assert found == {"x": dict(seed_0=0.0, seed_1=10.0, seed_2=20.0)}


def whole(given):
    """A recipe as a run has it, its values checked against each other."""
    config = typed(given)
    checks.check(config)
    return config


def test_the_recipes_of_benchmarks_are_whole():
    assert whole(pictures_recipe.get_config("data/x")).data.sources[0].path == "data/x"
    assert whole(released_recipe.get_config("coca_ViT-L-14")).model.image.depth == 24
    assert whole(earlier_recipe.get_config("emoji")).steps == measuring_runs.EARLIER_STEPS
    for name in ("emoji", "emoji_reinforced"):
        emoji = whole(earlier_recipe.get_config(name))
        assert (emoji.data.resize, emoji.model.dtype) == ("squash", "float32")
        assert (emoji.loss.min_temperature, emoji.model.temperature) == (0.0, 0.07)
        assert emoji.optimizer.projection_rate == 1.0
    demo = whole(earlier_recipe.get_config("demo"))
    assert demo.optimizer.schedule == "cosine" and demo.optimizer.average_share == 0
    assert [source.scenery for source in demo.data.sources] == ["plain", "plain"]
    captioner = whole(locked_recipe.get_config("captioner,500,runs/a"))
    assert captioner.init_from == "runs/a" and captioner.steps == 500
    assert set(captioner.data.sources[0].where["label"]) == set(locked_recipe.GROUPS)
    assert [task["kind"] for task in captioner.eval.tasks] == ["retrieval", "captioning"]
    contrastive = whole(locked_recipe.get_config("contrastive,700"))
    assert [task["kind"] for task in contrastive.eval.tasks] == ["retrieval"]


def test_a_failed_command_is_told_by_its_last_line(given):
    with pytest.raises(RuntimeError, match="status 3: too bad"):
        given.python("-c", "import sys; print('too bad', file=sys.stderr); sys.exit(3)")
    with pytest.raises(RuntimeError, match=r"status 3: at last \| what was found"):
        code = "print('at last', file=sys.stderr); print('what was found'); sys.exit(3)"
        given.python("-c", f"import sys; {code}")
    assert json.loads(given.python("-c", "print(1)", one_core=True)) == 1


def test_quick_rows_of_the_clock_come_first_and_fit_an_hour():
    """A quiet hour gets through them in order, whatever comes later."""
    one = [m for m in figure_rows.MEASUREMENTS if m.clock and m.quick]
    assert one == [m for m in figure_rows.MEASUREMENTS[: len(one)]]
    assert sum(m.minutes for m in one) < 25


class Told(measuring.Given):
    """Scripts and commands answer with what they are given."""

    def __init__(self, *given, answer):
        super().__init__(*given)
        object.__setattr__(self, "answer", answer)  # it is frozen

    def script(self, name, *words, one_core=False):
        return self.answer(name, words)

    def coca(self, *words, one_core=False, **more):
        return self.answer(words[0], words)


def test_kills_of_pairs_say_how_long_a_restart_took(tmp_path):
    told = dict(restarts=dict(SIGKILL=[1.0, 5.0], SIGSTOP=[42.0, 61.0, 50.0]), longest=83.0)
    told["median_seconds_from_kill_to_first_new_step"] = 29.0
    found = measuring_faults.pair_kills(Told(tmp_path, tmp_path, answer=lambda *_: told))
    assert found["pairs/kills"] == dict(kills=2, restart_most_seconds=5.0)
    stops = dict(stops=3, restart_least_seconds=42.0, restart_most_seconds=61.0)
    assert found["pairs/stops"] == stops
    assert found["pairs/recovery"] == dict(median_seconds=29.0, most_seconds=83.0)


def test_damages_are_read_off_what_the_tests_print(monkeypatch, given):
    said = {
        "tests/test_checkpointing.py": "Counter({'as it was': 142, 'went back': 58})\n.\n1 passed",
        "tests/test_damaged_weights.py": "exported {'told in a line': 111, 'told as a warning': 5}"
        "\n.hub {'told in a line': 106}\n..2 passed",
    }
    monkeypatch.setattr(measuring_faults, "tests", lambda given, file, *words: said[file])
    found = measuring_faults.damaged(given)
    row = dict(damages=200, line=58, warned=0, no_effect=142, used=0)
    assert found["damaged/checkpoint"] == row
    assert found["damaged/export"] == dict(damages=116, line=111, warned=5, no_effect=0, used=0)
    assert found["damaged/hub"]["line"] == 106


def test_fuzzing_is_summed_over_its_kinds(tmp_path):
    one = dict(inputs=3600, findings=[], worst_seconds=0.5, worst_mib=10)
    told = [one, one | dict(worst_seconds=0.8, findings=[1])]
    found = measuring_faults.fuzzed(Told(tmp_path, tmp_path, answer=lambda *_: told))
    values = dict(inputs=7200, kinds=2, findings=1, most_seconds=0.8, most_mib=10)
    assert found == {"fuzzed": values}


def test_input_is_told_with_its_peer(tmp_path):
    def answer(name, words):
        rate = 700 if "--config.data.fast_resize=True" in words else 400
        names = ("", "_low", "_high")
        key = "images_per_second_per_core"
        ours = {f"{key}{end}": rate for end in names}
        return ours | {f"peer_{key}{end}": 200 for end in names} | dict(times_peer=rate / 200)

    (tmp_path / "pictures/data").mkdir(parents=True)
    (tmp_path / "pictures/data/dataset_info.json").touch()
    found = measuring_peers.read_beside(Told(tmp_path, tmp_path / "runs", answer=answer))
    assert found["input/plain"]["ratio"] == 2.0 and found["input/fast"]["ratio"] == 3.5
    assert found["input/fast"]["ours_low"] == 700 and found["input/fast"]["peer_high"] == 200


class Trains(measuring.Given):
    """`train` makes runs of one score; `calls` are its flags and whether on one core."""

    calls: list = []
    keys = (
        *measuring_runs.EMOJI.values(),
        *measuring_runs.QUESTIONS.values(),
        *measuring_runs.AVERAGING.values(),
        *measuring_runs.TUNED.values(),
        *measuring_runs.VIDEO.values(),
        "classification/animated_emoji/top1",
    )

    def coca(self, *words, one_core=False, **more):
        flags = dict(word[2:].split("=", 1) for word in words if "=" in word)
        if words[0] == "train":
            self.calls.append((flags, one_core))
        if place := flags.get("workdir") or (words[0] == "evaluate" and flags["out"]):
            folder = pathlib.Path(place)
            folder.mkdir(parents=True)
            told = dict(pair for key in self.keys for pair in with_interval(key, 0.5).items())
            (folder / "eval.json").write_text(json.dumps(told))
            (folder / "goodput.json").write_text('{"life": {"seconds": {"step": 60}}}')
            (folder / "evaluations.jsonl").write_text(json.dumps(dict(scores=told)))
        return {}


@pytest.mark.parametrize(
    "measured, recipes",
    [
        ("reinforced", {"emoji", "emoji_reinforced"}),
        ("tuned", {"emoji"}),
        ("animated", {"emoji"}),
        ("easy_vqa", {"demo"}),
    ],
)
def test_what_pages_tell_of_earlier_recipes_is_measured_by_these(tmp_path, measured, recipes):
    given = Trains(tmp_path, tmp_path / "runs")
    given.calls.clear()
    found = getattr(measuring_runs, measured)(given)
    used = {flags["config"] for flags, _ in given.calls}
    earlier = {f"{measuring_runs.EARLIER}:{name}" for name in recipes}
    assert earlier <= used
    assert all(":" in config for config in used)  # what follows starts from such a run
    if measured == "animated":
        assert found["video/steps"] == dict(ranks=3600, logistic=3600, of=3600)
    if measured == "reinforced":
        plain = [flags for flags, _ in given.calls if flags.get("config.steps") == "1200"]
        assert len(plain) == 3 and all(p["config"].endswith("recipe.py:emoji") for p in plain)


def test_runs_beside_one_another_have_one_core_each(tmp_path):
    given = Trains(tmp_path, tmp_path / "runs")
    given.calls.clear()
    found = measuring_runs.averaging(given)
    assert found["averaging/demo_f1"] == dict(cosine=0.5, mean=0.5)
    assert len(given.calls) == 4 and all(one_core for _, one_core in given.calls)


def test_captions_beside_a_peer_name_the_slowest_of_their_runs(tmp_path):
    rates = iter([(536, 37), (499, 34), (555, 38)])

    def answer(name, words):
        rate, times = next(rates)
        return dict(tokens_per_second=rate, times_peer=times, late_over_early=1.0)

    found = measuring_peers.captions(16, 1, 3)(Told(tmp_path, tmp_path, answer=answer))
    row = found["captions/batch_16"]
    assert row["slowest_ours"] == 499 and row["slowest_peer"] == pytest.approx(499 / 34)
    assert row["ours_3"] == 555 and found["captions/batch_16_ratio"]["run_2"] == 34


def test_ablations_give_a_mean_with_its_range_and_seed_0_alone(given):
    rows = dict(both=[0.9, 0.6, 0.3], one_query=[0.4, 0.2, 0.0])
    runs = {
        row: {
            str(seed): dict(scores=dict.fromkeys(measuring_ablations.SCORES.values(), value))
            for seed, value in enumerate(rows.get(row, [0, 0, 0]))
        }
        for row in measuring_ablations.ABLATIONS
    }
    told = json.dumps(dict(variants={row: dict(runs=of) for row, of in runs.items()}))

    class Ablates(measuring.Given):
        def python(self, *words, one_core=False, **more):
            assert self.folder == measuring.ROOT  # from there the table names its recipe
            out = self.runs / pathlib.Path(words[3]).stem
            out.mkdir(parents=True)
            (out / "results.json").write_text(told)

    there = Ablates(given.folder, given.runs)
    found = measuring_ablations.ablations(there) | measuring_ablations.ablations_one_seed(there)
    both = found["ablations/both"]
    ends = [both[f"zero_shot{end}"] for end in ("", "_low", "_high")]
    assert ends == pytest.approx([60, 30, 90])
    assert found["ablations/one_query"]["zero_shot"] == pytest.approx(40)
    assert "zero_shot_low" not in found["ablations/one_query"]


def test_the_ablations_of_training_md_are_those_of_their_table(monkeypatch):
    monkeypatch.chdir(measuring.ROOT)
    names = ("ablations", "ablations_one_seed")
    ranged, alone = (table.read(str(measuring.HERE / f"{name}.toml"), {}) for name in names)
    assert tuple(one.name for one in ranged.variants) == measuring_ablations.RANGED
    assert ranged.seeds == measuring.SEEDS and alone.seeds == measuring.SEEDS[:1]
    variants = ranged.variants + alone.variants
    assert {one.name for one in variants} == set(measuring_ablations.ABLATIONS)
    assert all(one.config().steps == 2600 for one in variants)


def test_the_options_of_blocks_md_are_those_of_their_table():
    found = table.read(str(measuring.HERE / "options.toml"), {})
    assert tuple(one.name for one in found.variants) == measuring_ablations.OPTIONS
    assert tuple(found.seeds) == measuring.SEEDS


@pytest.mark.parametrize("path", sorted(measuring.HERE.glob("*.toml")), ids=lambda path: path.stem)
def test_every_variant_of_the_tables_is_a_run_that_can_be(path, monkeypatch):
    """A recipe that changes may not go with what a table sets over it any more."""
    monkeypatch.chdir(measuring.ROOT)
    refused = {}
    for variant in table.read(str(path), {}).variants:
        try:
            config_file.check(variant.config())
        except ValueError as error:
            refused[variant.name] = str(error)
    assert refused == {}


def test_the_rows_of_packing_differ_in_how_images_are_resized():
    one, other = table.read(str(measuring.HERE / "packing.toml"), {}).variants
    assert {one.name: one.config().data.resize, other.name: other.config().data.resize} == {
        "squash": "squash",
        "native": "native",
    }
    assert one.config().change({"data.resize": "native"}) == other.config()
