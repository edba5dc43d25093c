"""An index of pictures keeps those of a folder that cannot be read for now."""

import errno
import os

from test_index_changes import call, folder  # noqa: F401
from test_inference import images, model, no_compile_cache, words  # noqa: F401


def test_folders_that_cannot_be_read_keep_their_pictures(
    folder,  # noqa: F811
    call,  # noqa: F811
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

    with monkeypatch.context() as away:
        away.setattr(os, "scandir", refusing(scandir))
        away.setattr(os, "stat", refusing(stat))
        done = call("index", "s", **asked)
    assert (done["gone"], done["pictures"]) == (1, 5)
    done = call("index", "s", **asked)
    assert (done["new"], done["gone"], done["pictures"]) == (0, 0, 5)
