"""Folders that are links are not followed, and each command that walks folders names them."""

import errno
import os

import pytest
from conftest import flags_of
from test_index_changes import call, folder  # noqa: F401
from test_inference import images, model, no_compile_cache, words  # noqa: F401

from coca_jax.cli import recaption

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


def test_folders_that_cannot_be_read_are_named_and_their_pictures_stay(
    folder,  # noqa: F811
    call,  # noqa: F811
    capsys,
    monkeypatch,
):
    """As on a disk that does not answer: an index drops what is there no more, and nothing else."""
    (folder / "far").mkdir()
    for number in (1, 2):
        (folder / f"{number}.png").rename(folder / f"far/{number}.png")
    asked: dict = dict(checkpoint="here", out="i")
    assert call("index", "s", **asked)["pictures"] == 6
    (folder / "5.png").unlink()
    scandir, stat = os.scandir, os.stat

    def refusing(really):
        def looked_at(path=".", *more, **how):
            if not isinstance(path, int) and "/far" in f"/{os.fspath(path)}":
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return really(path, *more, **how)

        return looked_at

    capsys.readouterr()
    with monkeypatch.context() as away:
        away.setattr(os, "scandir", refusing(scandir))
        away.setattr(os, "stat", refusing(stat))
        done = call("index", "s", **asked)
    assert (done["gone"], done["pictures"]) == (1, 5)
    line = "s: folders that cannot be read are left out: far (Permission denied)"
    assert line in capsys.readouterr().err.splitlines()
    done = call("index", "s", **asked)
    assert (done["new"], done["gone"], done["pictures"]) == (0, 0, 5)
