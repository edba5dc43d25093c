"""Ablations: what a variant is, that one that has begun stays it, its steps, and what is shown."""

import pytest
from test_ablate import TABLE, written

from coca_jax import recipes, sealed_json
from coca_jax.ablating import running, table


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
