"""The plan of an ablation: a variant that has begun stays what it was; what its runs read."""

import pathlib

import pytest
from PIL import Image
from test_ablate import TABLE, quietly, written

from coca_jax import metrics, sealed_json
from coca_jax.ablating import running, table
from coca_jax.data import sources
from coca_jax.training import run as training


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
    with pytest.raises(ValueError, match="holds runs of --minutes=0, not 2"):
        running.Plan(tmp_path / "plan.json", 2)


def test_an_edited_recipe_is_another_variant(tmp_path):
    """By its values, not by its name, which is the same; a plan of before has no values."""
    recipe = tmp_path / "mine.py"
    source = "from coca_jax.configs import tiny\n\n\ndef get_config():\n"
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
    plan = sealed_json.read(tmp_path / "plan.json")
    for variant in plan["variants"].values():
        del variant["config"]
    sealed_json.write(tmp_path / "plan.json", plan)
    running.Plan(tmp_path / "plan.json", 0).check(found.variants)
    recipe.write_text(source)  # from here on it is known
    with pytest.raises(ValueError, match="batch_size is 16 there, 8 here"):
        running.Plan(tmp_path / "plan.json", 0).check(found.variants)


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
        saw[workdir.removeprefix(f"{out}/")] = sources.open_whole(source).labels(), source.path
        pathlib.Path(workdir).mkdir(parents=True)
        return dict(steps=config.steps)

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(metrics, "read_metrics", lambda place: [dict(loss=1.0)])
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
