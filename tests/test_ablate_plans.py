"""Ablations: what a variant is, that one that has begun stays it, its steps, what its runs read,
and what is shown."""

import json
import pathlib

import pytest
from PIL import Image
from test_ablate import TABLE, quietly, written

from coca_jax.apps.ablating import outcome, running, table
from coca_jax.config import typed
from coca_jax.data import filters, source_index
from coca_jax.evaluation import report_ablation
from coca_jax.runtime import json_files, metric_log
from coca_jax.training import bad_steps, recipes, setup
from coca_jax.training import trainer as training


def test_other_variants_of_a_name_are_refused(tmp_path):
    found = table.read(written(tmp_path, TABLE), {})
    running.Plan(tmp_path / "plan.json", 0).check(found.variants)
    running.Plan(tmp_path / "plan.json", 0).check(found.variants[:1])  # the others stay
    text = TABLE.replace("keep = 1", "keep = 2")
    changed = table.read(written(tmp_path, text), {})
    with pytest.raises(ValueError, match="'again': checkpoint.keep is 1 there, 2 here; give"):
        (tmp_path / "again").mkdir()
        running.Plan(tmp_path / "plan.json", 0).check(changed.variants)
    (tmp_path / "again").rmdir()  # nothing has begun
    running.Plan(tmp_path / "plan.json", 0).check(changed.variants)
    with pytest.raises(ValueError, match="holds runs without --minutes, not with --minutes=2;"):
        running.Plan(tmp_path / "plan.json", 2.0)


def test_a_name_with_a_dot_stands_in_quotes(tmp_path):
    given = "config = 'tiny'\n[variants.{}]\n'optimizer.learning_rate' = 0.5\n"
    said = r"""variant lr0: no key '5'; a name with a dot stands in quotes, \[variants."lr0.5"\]"""
    with pytest.raises(ValueError, match=said):
        table.read(written(tmp_path, given.format("lr0.5")), {})
    (variant,) = table.read(written(tmp_path, given.format('"lr0.5"')), {}).variants
    assert (variant.name, variant.config().optimizer.learning_rate) == ("lr0.5", 0.5)


def test_an_edited_recipe_is_another_variant(tmp_path):
    """By its values, not by its name, which is the same; a plan of before has no values."""
    recipe = tmp_path / "mine.py"
    source = "from coca_jax.recipes import tiny\n\n\ndef get_config():\n"
    source += "    config = tiny.get_config()\n    config.batch_size = 8\n    return config\n"
    recipe.write_text(source)
    text = TABLE.replace('"tiny"', f'"{recipe}"').replace("batch_size = 8\n", "")
    found = table.read(written(tmp_path, text), {})
    (tmp_path / "both").mkdir()
    running.Plan(tmp_path / "plan.json", 0).check(found.variants)
    recipe.write_text(source + "# as before\n")
    running.Plan(tmp_path / "plan.json", 0).check(found.variants)
    recipe.write_text(source.replace("= 8", "= 16"))
    with pytest.raises(ValueError, match="another variant 'both': batch_size is 8 there, 16 here;"):
        running.Plan(tmp_path / "plan.json", 0).check(found.variants)
    plan = json_files.read_sealed(tmp_path / "plan.json")
    for variant in plan["variants"].values():
        del variant["config"]
    json_files.write_sealed(tmp_path / "plan.json", plan)
    running.Plan(tmp_path / "plan.json", 0).check(found.variants)
    recipe.write_text(source)  # from here on it is known
    with pytest.raises(ValueError, match="batch_size is 16 there, 8 here"):
        running.Plan(tmp_path / "plan.json", 0).check(found.variants)


def test_a_mapping_that_is_a_value_takes_the_place_of_the_one_before_it(tmp_path):
    text = """
    config = "tiny"
    [overrides]
    model.image.block = {norm_eps = 1e-6, bias = false}
    [variants.base]
    [variants.plain]
    model.image.block = {}
    [variants.other.model.image.block]
    norm_eps = 1e-5
    """
    found = table.read(written(tmp_path, text), {})
    blocks = {variant.name: variant.config().model.image.block for variant in found.variants}
    assert blocks == dict(base=dict(norm_eps=1e-6, bias=False), plain={}, other=dict(norm_eps=1e-5))
    assert found.variants[0].config().model.image.depth == recipes.load("tiny").model.image.depth
    running.Plan(tmp_path / "plan.json", 0).check(found.variants)
    (tmp_path / "plain").mkdir()
    mended = table.read(written(tmp_path, text.replace("block = {}", "block = {bias = false}")), {})
    with pytest.raises(ValueError, match="'plain': model.image.block is {} there, {'bias': False}"):
        running.Plan(tmp_path / "plan.json", 0).check(mended.variants)


@pytest.fixture
def timed(monkeypatch):
    """Configs of runs that take half a second a step, by a stand-in for training that checks them
    as training does."""
    ran = []

    def train(config, workdir):
        setup.check_config(config)
        ran.append(config)
        rows = [dict(step=n + 1, loss=2.0, processor_time=0.5) for n in range(config.steps)]
        pathlib.Path(workdir).mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        pathlib.Path(workdir, "metrics.jsonl").write_text(lines)
        return dict(steps=config.steps)

    monkeypatch.setattr(training, "train", train)
    return ran


def test_a_warm_up_that_its_minutes_do_not_hold_is_told_before_anything_is_trained(tmp_path, timed):
    text = TABLE + "[variants.warm]\noptimizer.warmup_steps = 400\n"
    line = "variant warm: optimizer.warmup_steps=400 is not below the run's 60 steps; shorten it"
    with pytest.raises(ValueError, match=line):
        running.ablate(table.read(written(tmp_path, text), {}), str(tmp_path), 0.5, quietly)
    assert [one.steps for one in timed] == [running.PACE] * 3
    mended = table.read(written(tmp_path, text.replace("400", "40")), {})
    assert running.ablate(mended, str(tmp_path), 0.5, quietly)["runs"] == 6
    assert [one.steps for one in timed] == [running.PACE] * 7 + [60] * 6


def test_quick_steps_are_timed_again_and_more_of_them(tmp_path, monkeypatch):
    """With a stand-in for training, whose first 30 steps take half as long as the others."""
    ran, said = [], []

    def train(config, workdir):
        ran.append(config.steps)
        every = config.log.every_steps
        took = [0.01 if step <= 30 else 0.02 for step in range(1, config.steps + 1)]
        rows = [
            dict(step=step, loss=2.0, processor_time=sum(took[step - every : step]))
            for step in range(every, config.steps + 1, every)
        ]
        pathlib.Path(workdir).mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        pathlib.Path(workdir, "metrics.jsonl").write_text(lines)
        return dict(steps=config.steps)

    monkeypatch.setattr(training, "train", train)
    text = TABLE.replace("[0, 3]", "[0]").split("[variants.again]")[0] + "log.every_steps = 1\n"
    found = table.read(written(tmp_path, text), {})
    running.ablate(found, str(tmp_path), 0.1, said.append)  # 6 s: 400 of the timed steps fit in 4
    assert ran[0] == running.PACE and 402 <= ran[1] <= 403 and 300 <= ran[2] <= 306
    assert not any("asked for" in line for line in said)
    assert "asked for" not in (tmp_path / "results.md").read_text()
    monkeypatch.setattr(running, "PACE_SECONDS", 0.1)  # as if the first steps were all
    del ran[:]
    running.ablate(found, str(tmp_path / "short"), 0.1, said.append)
    assert ran == [running.PACE, 600]
    line = "both, seed 0: it took 0.19 minutes, 1.9 times the 0.1 asked for"
    assert line in said
    assert (tmp_path / "short/results.md").read_text().endswith(f" |\n\n- {line}\n")


def test_a_processor_that_becomes_slower_takes_no_steps_from_those_behind(tmp_path, monkeypatch):
    """With a stand-in for training that is a tenth of a second slower each time, stopped once."""
    ran = []

    def train(config, workdir):
        if len(ran) == 3:
            ran.append(None)
            raise KeyboardInterrupt
        ran.append(config.steps)
        took = 1 + 0.1 * len([steps for steps in ran if steps])
        rows = [dict(step=n + 1, loss=2.0, processor_time=took) for n in range(config.steps)]
        pathlib.Path(workdir).mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        pathlib.Path(workdir, "metrics.jsonl").write_text(lines)
        return dict(steps=config.steps)

    monkeypatch.setattr(training, "train", train)
    found = table.read(written(tmp_path, TABLE.replace("[0, 3]", "[0]")), {})
    with pytest.raises(KeyboardInterrupt):
        running.ablate(found, str(tmp_path), 0.5, quietly)
    running.ablate(found, str(tmp_path), 0.5, quietly)
    assert ran == [running.PACE] * 3 + [None, running.PACE, 24, 24]  # at (1.1 + 1.4) / 2 s a step


@pytest.mark.parametrize(("tasks", "end"), [("eval.tasks = []\n", ""), ("", " for the scores")])
def test_no_scores_are_promised_where_the_table_takes_all_evaluations(tasks, end, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for number in range(40):
        picture = Image.new("RGB", (24, 24), (6 * number, 90, 90))
        picture.save(tmp_path / "pictures" / f"{number}.png")
        (tmp_path / "pictures" / f"{number}.txt").write_text(f"a shade of number {number}")
    text = TABLE.replace("[variants.both]", f"{tasks}[variants.both]")
    found = table.read(written(tmp_path, text), {})
    running.with_data(found, [str(tmp_path / "pictures")], str(tmp_path / "out"), {})
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "are held out" in one]
    assert line.endswith(f"of 'test' are held out{end}")


def test_minutes_have_two_digits_however_few_they_are():
    runs = {str(n): dict(steps=9, minutes=took) for n, took in enumerate((0.0706, 0.106))}
    found = dict(variants=dict(a=dict(runs=runs, metrics={})))
    assert report_ablation.rows(found, [])[0]["counts"] == ["2", "9", "0.071 to 0.11"]
    for run, took in zip(runs.values(), (12.4, 1234.5), strict=True):
        run["minutes"] = took
    assert report_ablation.rows(found, [])[0]["counts"][2] == "12 to 1,234"


def test_an_ablation_shows_a_metric_that_is_no_share_as_it_is():
    """In all variants alike, and its interval in the scale of its value."""

    def of(*values):
        values = {str(seed): value for seed, value in enumerate(values)}
        return dict(values=values, **outcome.interval(list(values.values())), difference=None)

    names = ["mine/d/loss_per_token", "mine/d/found"]
    variants = {
        name: dict(runs={}, metrics=dict(zip(names, (of(*loss), of(0.4, 0.6)))))
        for name, loss in (("a", (2.2, 2.4)), ("b", (0.8, 0.9)))
    }
    first, second = (row["cells"] for row in report_ablation.rows(dict(variants=variants), names))
    assert first[0] == dict(value="2.3", interval="(1.029 to 3.571)")
    assert second[0] == dict(value="0.85", interval="(0.2147 to 1.485)")
    assert first[1] == second[1] == dict(value="50.0%", interval="(0.0 to 100.0)")


def test_folders_that_train_reads_in_place_are_indexed_once_for_all_runs(
    tmp_path, monkeypatch, capsys
):
    """With a stand-in for training, which sees what the runs have. They were refused."""
    for place, names in (("one", "cat dog"), ("other", "ant bee")):
        for name in names.split():
            (tmp_path / place / "fm" / name).mkdir(parents=True)
            for number in range(2):
                picture = Image.new("RGB", (24, 24), (60 * number, len(name), ord(name[0])))
                picture.save(tmp_path / place / "fm" / name / f"{number}.png")
    saw = {}

    def train(config, workdir):
        (source,) = config.data.sources
        saw[workdir.removeprefix(f"{out}/")] = filters.open_whole(source).labels(), source.path
        pathlib.Path(workdir).mkdir(parents=True)
        return dict(steps=config.steps)

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(metric_log, "read_metrics", lambda place: [dict(loss=1.0)])
    of = 'data.sources = [{path = "%s/fm", kind = "label"}]\n'
    text = TABLE.replace("[variants.again]", "eval.tasks = []\n" + of % (tmp_path / "one"))
    text = text.replace("checkpoint.keep = 1\n", "")
    text += f"[variants.again]\ncheckpoint.keep = 1\n{of % (tmp_path / 'one')}"
    text += f"[variants.other]\n{of % (tmp_path / 'other')}"
    found, out = table.read(written(tmp_path, text), {}), tmp_path / "out"
    assert running.ablate(found, str(out), 0, quietly)["failed"] == {}
    assert len(saw) == 6 and {path for _, path in saw.values()} == {
        str(path.parent) for path in out.glob("data/*/data/fm/manifest.json")
    }
    for name, labels in dict(both="cat dog", again="cat dog", other="ant bee").items():
        assert [saw[f"{name}/seed{seed}"][0] for seed in (0, 3)] == [labels.split()] * 2
    assert capsys.readouterr().err.count("making an index") == 2


def test_variants_of_other_images_read_other_images(tmp_path):
    """Of one list with two columns of images: what one variant reads is not what the other does."""
    for number in range(4):
        Image.new("RGB", (24, 24), (60 * number, 9, 9)).save(tmp_path / f"{number}.png")
    rows = [f"{n}.png,{3 - n}.png,no. {n}\n" for n in range(4)]
    (tmp_path / "list.csv").write_text("one,two,text\n" + "".join(rows))

    def images(field, folder):
        entry = dict(path=str(tmp_path / "list.csv"), kind="caption", image_field=field)
        config = typed(recipes.load("tiny")).change({"data.sources": (entry,)})
        (source,) = running.indexed(config, folder).data.sources
        return [record.image for record in filters.open_whole(source).read([0, 1, 2, 3])]

    kept = [(tmp_path / f"{n}.png").read_bytes() for n in range(4)]
    assert images("one", tmp_path / "out") == kept
    assert images("two", tmp_path / "out") == images("two", tmp_path / "new") == kept[::-1]
    # A run's own workdir has one index of a path.
    entry = dict(path=str(tmp_path / "list.csv"), kind="caption", image_field="one")
    config = typed(recipes.load("tiny")).change({"data.sources": (entry,)})
    assert source_index.of_sources(config, str(tmp_path / "run")).data.sources[0].image_field == ""
    other = config.change({"data.sources": (entry | dict(image_field="two"),)})
    with pytest.raises(ValueError, match="is of image_field='one', not 'two'; use a new --workdir"):
        source_index.of_sources(other, str(tmp_path / "run"))
    # The texts of a field that is named no longer would train as if they were the usual ones.
    named = config.change({"data.sources": (entry | dict(text_field="two"),)})
    workdir = str(tmp_path / "named")
    assert source_index.of_sources(named, workdir).data.sources[0].text_field == ""
    with pytest.raises(ValueError, match="is of text_field='two', not ''; use a new --workdir"):
        source_index.of_sources(config, workdir)
    third = config.change({"data.sources": (entry | dict(text_field="text"),)})
    assert source_index.of_sources(third, workdir).data.sources[0].text_field == "text"


def test_runs_that_the_table_no_longer_asks_for_are_named(tmp_path):
    """Of a seed and of a variant that were taken out; what is done stays."""
    out = tmp_path / "out"
    for name in ("both", "again"):
        for seed in (0, 3):
            told = dict(steps=2, minutes=1.5, scores={"train/batches/loss": 2.0})
            (out / name / f"seed{seed}").mkdir(parents=True)
            json_files.write_sealed(out / name / f"seed{seed}" / outcome.DONE, told)
    said: list[str] = []
    for seeds, variants, others in (
        ("[0, 3]", 2, ""),
        ("[0]", 2, "again/seed3, both/seed3"),
        ("[0]", 1, "again/seed0, again/seed3, both/seed3"),
    ):
        text = TABLE.replace("[0, 3]", seeds)
        text = text if variants == 2 else text.split("[variants.again]")[0]
        found = table.read(written(tmp_path, text), {})
        done = running.ablate(found, str(out), 0, said.append)
        line = f"left out of the results, as the table does not ask for them: {others}"
        assert said == ([line] if others else [])
        assert done["runs"] == len(found.seeds) * variants
        said.clear()
    assert len([*out.glob("*/seed*")]) == 4


def test_a_recipe_that_keeps_its_best_step_has_minutes_too(timed, tmp_path):
    """The steps that are timed have no evaluation that could be compared."""
    text = TABLE.replace("[0, 3]", "[0]").split("[variants.again]")[0]
    text += """
    eval.every_steps = 20
    eval.tasks = [{kind = "retrieval", name = "x", data = {builtin = "scenes"}}]
    checkpoint.best = "retrieval/x/mean_recall"
    """
    found = running.ablate(table.read(written(tmp_path, text), {}), str(tmp_path), 0.5, quietly)
    assert found["runs"] == 1 and not found["failed"]
    best = "retrieval/x/mean_recall"
    told = [(one.steps, one.checkpoint.best, len(one.eval.tasks)) for one in timed]
    assert told == [(running.PACE, "", 0), (60, best, 1)]


def test_no_tracker_is_told_of_steps_that_are_only_timed(timed, tmp_path):
    """A service would list a run '.pace-...' beside those of the table, for each variant."""
    text = TABLE.replace("[0, 3]", "[0]").split("[variants.again]")[0]
    running.ablate(table.read(written(tmp_path, text), {}), str(tmp_path), 0.5, quietly)
    assert [(one.steps, one.log.trackers) for one in timed] == [
        (running.PACE, ()),
        (60, ("tensorboard",)),
    ]


def test_a_variant_that_diverges_while_it_is_timed_fails_alone(timed, tmp_path, monkeypatch):
    """It ended the ablation before anything was trained."""
    whole = training.train

    def train(config, workdir):
        if config.loss.z_loss and 0 < config.checkpoint.max_skipped <= config.steps:
            raise bad_steps.Diverged("the gradients of 20 steps in a row are not finite")
        return whole(config, workdir)

    monkeypatch.setattr(training, "train", train)
    text = TABLE.replace("[0, 3]", "[0]").replace(
        "[overrides]", "[overrides]\ncheckpoint.max_skipped=20\nfaults.spike_deviations=6.0"
    )
    text = text.replace("[variants.again]", "[variants.worse]\nloss.z_loss = 0.1\n[variants.again]")
    found = running.ablate(table.read(written(tmp_path, text), {}), str(tmp_path), 0.5, quietly)
    assert found["runs"] == 2 and list(found["failed"]) == ["worse, seed 0"]
    assert [one.faults.spike_deviations for one in timed if one.steps == running.PACE] == [0.0] * 6


def test_steps_that_changed_nothing_are_told_below_the_table(timed, tmp_path, monkeypatch):
    """A run that diverges in its last steps is done, with the scores of what was before."""
    whole = training.train
    monkeypatch.setattr(training, "train", lambda *given: whole(*given) | dict(skipped_steps=40))
    text = TABLE.replace("[0, 3]", "[0]").split("[variants.again]")[0]
    running.ablate(table.read(written(tmp_path, text), {}), str(tmp_path), 0.5, quietly)
    line = "- both, seed 0: 40 of 60 steps changed nothing, as their gradients are not finite"
    assert line in (tmp_path / "results.md").read_text()
    runs = json.loads((tmp_path / "results.json").read_text())["variants"]["both"]["runs"]
    assert runs["0"]["skipped_steps"] == 40


def test_a_recipe_s_warm_up_is_not_shortened_for_the_slow_variants_alone(timed, tmp_path):
    """At 90 steps the demo's 100 became 9, beside a variant of 110 that warmed up for 100."""
    text = TABLE.replace('"tiny"', '"demo"').replace("[0, 3]", "[0]").replace("= 8", "= 16")
    line = "variant both: optimizer.warmup_steps=100 is not below the run's 60 steps; shorten it"
    with pytest.raises(ValueError, match=line):
        running.ablate(table.read(written(tmp_path, text), {}), str(tmp_path), 0.5, quietly)
    mended = text.replace("[overrides]", "[overrides]\noptimizer.warmup_steps = 20")
    out = str(tmp_path / "mended")
    running.ablate(table.read(written(tmp_path, mended), {}), out, 0.5, quietly)
    whole = [one.optimizer.warmup_steps for one in timed if one.steps == 60]
    assert whole == [20, 20] and len(timed) == 1 + 4 + 2
