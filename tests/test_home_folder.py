"""Paths that begin with '~/', which a shell leaves as they are behind a flag's '='."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_inference import images, model, no_compile_cache, words  # noqa: F401

import coca_jax
from coca_jax.cli import main
from coca_jax.inference import export_folder
from coca_jax.runtime import storage


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder, beside the current one."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_a_flag_s_folder_is_in_the_home_folder(home, monkeypatch):
    """It was written to a folder of the name '~' in the current one, without a word."""
    seen = []

    def stop():
        seen.extend(sys.argv[1:])
        raise ValueError("seen")

    monkeypatch.setattr(sys, "argv", ["coca-jax"])
    monkeypatch.setattr(main, "quiet_libraries", lambda: None)
    monkeypatch.setattr(
        main.importlib, "import_module", lambda name: SimpleNamespace(define_flags=stop)
    )
    given = ["--out=~/a", "--config.init_from=~/b", "--text=~", "--about=x~/y", "~/c", "--flag"]
    with pytest.raises(SystemExit):
        main.command("compile", given)
    assert seen == [f"--out={home}/a", f"--config.init_from={home}/b", *given[2:]]


def test_a_folder_of_that_very_name_stays(home, tmp_path):
    (tmp_path / "here/~/run").mkdir(parents=True)
    assert storage.from_home("~/run") == "~/run"  # a run of before goes on
    assert storage.from_home("~/other") == f"{home}/other"
    assert storage.from_home("~other/a") == "~other/a"


def test_models_and_pictures_are_found_in_the_home_folder(home, model, images):  # noqa: F811
    export_folder.write(model, str(home / "exported"))
    Image.fromarray(images[0]).save(home / "a.png")
    found = coca_jax.load("~/exported")
    wanted = model.encode_image(images[:1])
    for given in ("~/a.png", ["~/a.png"]):
        np.testing.assert_allclose(found.encode_image(given), wanted, atol=1e-6)
