"""What fit says of a workdir that holds what it did not write, or what it cannot read."""

import os

import pytest
from test_own_data import captioned

from coca_jax.apps import fit
from coca_jax.training import data_flag


def test_a_recipe_that_fit_did_not_write_is_a_line_and_stays(tmp_path):
    """It was taken for the choice that had been made, whose data nothing told."""
    (tmp_path / "recipe.py").write_text("mine = 1")
    line = "holds a recipe.py that fit did not write there; give another, or coca-jax train"
    with pytest.raises(ValueError, match=line):
        fit.fit(fit.Request(str(tmp_path / "pictures")), str(tmp_path))
    assert os.listdir(tmp_path) == ["recipe.py"]
    assert (tmp_path / "recipe.py").read_text() == "mine = 1"


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"request": {"folder": 3', '{"request": []}', "[" * 100_000, "\xff"]
)
def test_a_damaged_fit_json_is_named(text, tmp_path):
    (tmp_path / "fit.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="fit.json is damaged, or no fit wrote it; restore it, or"):
        fit.Kept(str(tmp_path), fit.Request("pictures"))


def test_changed_data_name_the_command_that_goes_on_without_the_change(tmp_path):
    folder, workdir = captioned(tmp_path / "mine", 40), tmp_path / "run"
    request = fit.Request(str(folder))
    state = fit.Kept(str(workdir), request)
    place = data_flag.prepared(str(folder), f"{workdir}/data/mine")
    state.put("data", dict(path=place, train="train", held="test", name="mine_test"))
    (workdir / "recipe.py").write_text("# kept\n")
    (folder / "000.png").write_bytes(b"another")
    told = f"restore it, or `coca-jax train --config={workdir}/recipe.py --workdir={workdir}` to go"
    with pytest.raises(ValueError) as found:
        fit.fit(request, str(workdir))
    assert "has changed since its index was made" in str(found.value) and told in str(found.value)
