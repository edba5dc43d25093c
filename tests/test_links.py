"""Folders that are links are not followed, and each command that walks folders names them."""

import os

import pytest
from test_index_changes import call, folder  # noqa: F401
from test_inference import images, model, no_compile_cache, words  # noqa: F401
from test_version_0_1 import flags_of

from coca_jax import recaption

SAID = "s: folders that are links are not read: link; put the folders in their place"


@pytest.fixture
def link(folder):  # noqa: F811
    (folder.parent / "other").mkdir()
    os.symlink(folder.parent / "other", "s/link")


def test_by_the_index_of_pictures(link, call, capsys):  # noqa: F811
    assert call("index", "s", checkpoint="here", out="i")["pictures"] == 6
    assert capsys.readouterr().err.splitlines()[:2] == ["s: read as imagefolder", SAID]


def test_by_the_captioner_of_data_sets(link, monkeypatch, capsys):
    flags_of("recaption", monkeypatch)
    for given in ((), ("--format=imagefolder",)):
        recaption.flags.FLAGS.unparse_flags()
        recaption.flags.FLAGS(["recaption", "--checkpoint=none", "--input=s", "--out=o", *given])
        with pytest.raises((FileNotFoundError, ValueError), match="none"):
            recaption.main(["recaption"])
        assert SAID in capsys.readouterr().err.splitlines()
