"""What fit says of a workdir that holds what it did not write, or what it cannot read."""

import os

import pytest

from coca_jax.fitting import kept, run


def test_a_recipe_that_fit_did_not_write_is_a_line_and_stays(tmp_path):
    """It was taken for the choice that had been made, whose data nothing told."""
    (tmp_path / "recipe.py").write_text("mine = 1")
    line = "holds a recipe.py that fit did not write there; give another, or coca-jax train"
    with pytest.raises(ValueError, match=line):
        run.fit(kept.Request(str(tmp_path / "pictures")), str(tmp_path))
    assert os.listdir(tmp_path) == ["recipe.py"]
    assert (tmp_path / "recipe.py").read_text() == "mine = 1"


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"request": {"folder": 3', '{"request": []}', "[" * 100_000, "\xff"]
)
def test_a_damaged_fit_json_is_named(text, tmp_path):
    (tmp_path / "fit.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="fit.json is damaged, or no fit wrote it; restore it, or"):
        kept.Kept(str(tmp_path), kept.Request("pictures"))
