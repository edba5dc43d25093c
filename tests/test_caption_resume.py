"""The caption command's file: what it was begun with, which images it has, how it is called."""

import errno
import json
import os
import pathlib
import re
import shutil

import numpy as np
import pytest
from conftest import flags_of
from PIL import Image
from test_inference import images, model, no_compile_cache, words  # noqa: F401
from test_model_checksum import changed
from test_search import encoded

import coca_jax
from coca_jax.cli import caption
from coca_jax.inference import caption_files
from coca_jax.runtime import growing_file, lease


@pytest.fixture
def call(model, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The command in this process, in a folder with two pictures; `loaded` has what it loaded."""
    (tmp_path / "s").mkdir()
    for number in range(2):
        (tmp_path / f"s/{number}.png").write_bytes(encoded(number))
    monkeypatch.chdir(tmp_path)
    flags_of("caption", monkeypatch)
    there = dict(here=model, moved=model, other=changed(model, model__activation="relu"))
    there["clips"] = changed(model, data__num_frames=2)
    loaded: list[str] = []

    def load(place, **how):
        loaded.append(place)
        return there[place]

    monkeypatch.setattr(coca_jax, "load", load)

    def run(*paths, **given):
        caption.flags.FLAGS.unparse_flags()
        given = dict(checkpoint="here", max_new_tokens=4, out="x.jsonl") | given
        caption.flags.FLAGS(["caption", *(f"--{name}={value}" for name, value in given.items())])
        del loaded[:]
        caption.main(["caption", *paths])
        said = capsys.readouterr()
        run.said = said.err
        return json.loads(said.out.splitlines()[-1])

    run.loaded = loaded
    return run


def test_captions_go_on_with_the_same_model_and_settings_alone(call):
    assert call("s/0.png")["captioned"] == 1
    before = pathlib.Path("x.jsonl").read_bytes()
    for given, says in (
        (dict(num_beams=2), "begun with num_beams=1, not 2; give the same, or another --out"),
        (dict(prompt="a red"), "begun with prompt='', not 'a red'"),
        (dict(max_new_tokens=5), "begun with max_new_tokens=4, not 5"),
    ):
        for paths in (["s/0.png"], ["s"]):
            with pytest.raises(ValueError, match=f"--out=x.jsonl was {says}"):
                call(*paths, **given)
            assert not call.loaded
    with pytest.raises(ValueError, match="begun with min_p=0.0, not 0.5"):
        how = dict(prompt="")  # of a version that had no min_p
        caption_files.check_settings("x.jsonl", dict(how=how), dict(prompt="", min_p=0.5))
    for paths in (["s/0.png"], ["s"]):
        with pytest.raises(ValueError, match="begun with --checkpoint=here, whose weights or"):
            call(*paths, checkpoint="other")
    assert pathlib.Path("x.jsonl").read_bytes() == before
    done = call("s", checkpoint="moved")
    assert (done["captioned"], done["already_done"], call.loaded) == (1, 1, ["moved"])
    done = call("s", batch_size=1)
    assert (done["captioned"], done["already_done"], call.loaded) == (0, 2, [])


def test_a_file_without_the_account_goes_on(call):
    call("s/0.png")
    os.remove("x.jsonl.how.json")
    done = call("s", max_new_tokens=5)
    assert (done["captioned"], done["already_done"]) == (1, 1)
    assert not os.path.exists("x.jsonl.how.json")
    pathlib.Path("x.jsonl").write_bytes(b"")
    call("s", max_new_tokens=5)
    told = json.loads(pathlib.Path("x.jsonl.how.json").read_text())
    assert told["how"]["max_new_tokens"] == 5 and told["checkpoint"] == "here"


def test_an_image_is_one_however_it_is_spelled(call, tmp_path):
    done = call("s/0.png", "./s", str(tmp_path / "s"))
    assert (done["captioned"], done["already_done"]) == (2, 0)
    done = call(str(tmp_path / "s"), "s/../s")
    assert (done["captioned"], done["already_done"]) == (0, 2)
    lines = [json.loads(line)["image"] for line in open("x.jsonl")]
    assert lines == ["s/0.png", "./s/1.png"]


def test_a_file_goes_on_in_another_folder(call, tmp_path, monkeypatch):
    out = str(tmp_path / "x.jsonl")
    (tmp_path / "t/s").mkdir(parents=True)
    shutil.copy("s/0.png", "t/s/0.png")
    assert call("s/0.png", out=out)["captioned"] == 1
    monkeypatch.chdir("t")
    done = call("s", "../s", out=out)  # s/0.png is another one here
    assert (done["captioned"], done["already_done"]) == (2, 1)
    assert call(".", "../s", out="../x.jsonl")["already_done"] == 3
    monkeypatch.chdir("..")
    assert call("s", "t")["already_done"] == 3
    lines = [json.loads(line)["image"] for line in open("x.jsonl")]
    assert lines == ["s/0.png", str(tmp_path / "t/s/0.png"), str(tmp_path / "s/1.png")]
    told = json.loads(pathlib.Path("x.jsonl.how.json").read_text())
    assert told["made_in"] == str(tmp_path)
    shutil.copytree("s", "a/s")
    monkeypatch.chdir("a")
    assert call("s")["captioned"] == 2
    os.rename("../a", "../b")  # the file with its pictures
    monkeypatch.chdir("../b")
    assert call("s")["already_done"] == 2


def test_folders_that_are_links_are_not_followed(call, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/2.png").write_bytes(encoded(2))
    os.symlink(tmp_path / "other", "s/link")
    assert call("s", "other/2.png")["captioned"] == 3
    (tmp_path / "t").mkdir()
    os.symlink(tmp_path / "other", "t/link")
    with pytest.raises(ValueError, match="no image in t"):
        call("t", out="")


def test_more_tokens_than_the_model_writes_are_said(call, model):  # noqa: F811
    assert model.max_len == 24
    for prompt, room in (("", 23), ("a", 22)):
        call_of = dict(out="", prompt=prompt)
        call("s", max_new_tokens=room, **call_of)
        assert "max_new_tokens" not in call.said
        call("s", max_new_tokens=1000, **call_of)
        assert f"--max_new_tokens=1000: captions of this model end after {room} tokens" in call.said
        assert f"its texts being of {model.max_len} (model.text.max_len)" in call.said


def test_two_runs_into_one_file_are_not_at_once(call, tmp_path):
    how = dict(use="writes to it", flag="--out", beside=True)
    with lease.alone("x.jsonl", **how):
        said = rf"x.jsonl is in use: process {os.getpid()} .* writes to it since .* a new --out"
        with pytest.raises(lease.Held, match=said):
            call("s")
        assert not call.loaded
        assert call("s", out="y.jsonl")["captioned"] == 2  # of the same folder
    assert call("s")["captioned"] == 2 and call("s")["already_done"] == 2
    beside = {f"{name}.jsonl{more}" for name in "xy" for more in ("", ".how.json")}
    assert {*os.listdir()} == {"s", *beside}
    with pytest.raises(KeyError):
        call("s", checkpoint="none", out="new/x.jsonl")
    assert not os.path.exists("new")


def test_a_file_of_another_format_is_refused(call):
    for suffix in ("csv", "json", "txt", "parquet"):
        with pytest.raises(ValueError, match=rf"--out=r.{suffix}: .* with .jsonl, r.jsonl$"):
            call("s", out=f"r.{suffix}")
    assert call("s", out="r")["captioned"] == 2
    assert sorted(os.listdir()) == ["r", "r.how.json", "s"]


def test_a_folder_s_videos_are_captioned_by_a_model_of_clips_and_left_out_by_one_of_images(call):
    frames = [Image.fromarray(np.full((16, 16, 3), 90 * i, np.uint8)) for i in range(3)]
    os.mkdir("clips")
    for name in ("a", "b"):  # content decides what a file is
        frames[0].save(f"clips/{name}.mp4", "GIF", save_all=True, append_images=frames[1:])
    for given in ({}, dict(num_frames=0)):
        with pytest.raises(ValueError, match="no image in clips"):
            call("clips", **given)
    done = call("clips", checkpoint="clips")
    assert (done["captioned"], done["already_done"], done["failed"]) == (2, 0, 0)
    shutil.copy("s/0.png", "clips/c.png")
    assert call("clips", checkpoint="clips")["captioned"] == 1
    done = call("clips", out="y.jsonl")
    assert (done["captioned"], done["failed"]) == (1, 0)
    assert call("clips", out="y.jsonl")["already_done"] == 1


@pytest.mark.parametrize("name", ["a.tar", "a-{0..9}.TAR", "gs://a/b.parquet", "list.txt", "a.csv"])
def test_what_holds_pictures_is_for_another_command(call, name):
    with pytest.raises(ValueError, match=f"^{re.escape(name)}: .*recaption --input={name[0]}"):
        call("s", name)
    assert not call.loaded
    os.makedirs("folder.tar")
    shutil.copy("s/0.png", "folder.tar")
    assert call("folder.tar")["captioned"] == 1


def test_a_file_that_takes_no_more_ends_the_command(call, tmp_path, monkeypatch):
    """What it holds stays, and the same command goes on behind that."""
    for number in range(2, 6):
        (tmp_path / f"s/{number}.png").write_bytes(encoded(number))
    call("s/0.png")
    first = pathlib.Path("x.jsonl").read_bytes()

    def drain(growing):
        if growing._parts:
            growing._file.write(growing._parts[0][:9])  # as of a disk with so much room
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(growing_file.Growing, "_drain", drain)
        with pytest.raises(OSError, match="--out=x.jsonl cannot be written .*; what it holds stay"):
            call("s", batch_size=1)
    there = pathlib.Path("x.jsonl").read_bytes()
    assert there.startswith(first) and len(there) == len(first) + 9  # half a line
    done = call("s")
    assert (done["captioned"], done["already_done"]) == (5, 1)
    rows = [json.loads(line) for line in pathlib.Path("x.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [f"s/{number}.png" for number in range(6)]
