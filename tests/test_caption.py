"""The caption command: folders, resuming, broken files."""

import functools
import http.server
import json
import os
import pathlib
import shutil
import threading

import fsspec
import numpy as np
import pytest
from PIL import Image
from test_inference import images, model, no_compile_cache, words  # noqa: F401

from coca_jax.cli import main
from coca_jax.data import image_files
from coca_jax.inference import caption_files, export_programs
from coca_jax.runtime import growing_file


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory):  # noqa: F811
    root = tmp_path_factory.mktemp("pictures")
    (root / "deep/er").mkdir(parents=True)
    for number, place in enumerate(["b.png", "a.jpg", "deep/c.png", "deep/er/d.webp"]):
        Image.fromarray(images[number]).save(root / place)
    (root / "deep/broken.png").write_bytes(b"not an image")
    (root / "notes.txt").write_text("not an image either")
    return root


def test_find_images_is_recursive_and_sorted(folder):
    found = [path[len(str(folder)) + 1 :] for path in image_files.find([str(folder)])]
    assert found == ["a.jpg", "b.png", "deep/broken.png", "deep/c.png", "deep/er/d.webp"]
    with pytest.raises(FileNotFoundError, match="does not exist"):
        image_files.find([str(folder / "none")])


def test_caption_files(model, folder):  # noqa: F811
    paths = image_files.find([str(folder)])
    found = list(caption_files.caption_files(model, paths, batch_size=2, max_new_tokens=4))
    assert [item["image"] for item in found] == paths
    assert [path for path, item in zip(paths, found) if "error" in item] == [paths[2]]
    expected = model.captions([paths[0], paths[1]], max_new_tokens=4)
    assert [item["caption"] for item in found[:2]] == [c[0].text for c in expected]
    assert found[0]["score"] == pytest.approx(expected[0][0].log_prob, abs=1e-3)


def test_samples_depend_on_the_path_alone(model, folder):  # noqa: F811
    paths = image_files.find([str(folder)])
    how = dict(do_sample=True, num_return_sequences=2, max_new_tokens=4)
    whole = {r["image"]: r for r in caption_files.caption_files(model, paths, batch_size=4, **how)}
    part = list(caption_files.caption_files(model, paths[3:], batch_size=4, **how))
    assert part == [whole[path] for path in paths[3:]]


def test_a_folder_and_a_url_are_images_too(model, folder, images, tmp_path):  # noqa: F811
    pair = [str(folder / "deep/c.png"), str(folder / "deep/er/d.webp")]
    (tmp_path / "below").mkdir()
    shutil.copy(pair[0], tmp_path / "a.png")
    shutil.copy(pair[1], tmp_path / "below/b.webp")
    (tmp_path / "notes.txt").write_text("no image")
    wanted = model.encode_image(pair)
    np.testing.assert_array_equal(model.encode_image(str(tmp_path)), wanted)
    quiet = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("localhost", 0), quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://localhost:{server.server_address[1]}"
        np.testing.assert_array_equal(model.encode_image(f"{url}/a.png"), wanted[:1])
        with pytest.raises(FileNotFoundError, match="none.png"):
            model.encode_image(f"{url}/none.png")
        server.shutdown()
    fsspec.filesystem("memory").pipe_file("/pictures/c.png", pathlib.Path(pair[0]).read_bytes())
    np.testing.assert_array_equal(model.encode_image("memory://pictures"), wanted[:1])


def test_what_is_no_image_is_named_once(model, folder):  # noqa: F811
    empty, page = folder.parent / "empty.jpg", folder.parent / "page.jpg"
    empty.write_bytes(b"")
    page.write_text("<!DOCTYPE html>")
    for found in caption_files.caption_files(model, [str(empty), str(page)]):
        assert found["error"].count(found["image"]) == 1 and " at 0x" not in found["error"]
    with pytest.raises(ValueError, match="is a folder; give it alone"):
        model.caption([str(folder)])
    with pytest.raises(FileNotFoundError, match="none.jpg: no such file; give an image"):
        model.caption([str(folder / "none.jpg")])


def test_read_done_drops_a_line_cut_short(tmp_path):
    path = tmp_path / "out.jsonl"
    whole = "".join(f'{{"image": "{name}", "caption": "x", "score": -1.5}}\n' for name in "ab")
    path.write_text(whole + '{"ima')
    assert caption_files.read_done(str(path)) == ({"a", "b"}, len(whole))
    growing = growing_file.Growing(path, keep=len(whole))
    growing.write(b"{}\n")
    assert path.read_text() == whole + "{}\n"


@pytest.mark.parametrize(
    "line",
    [
        "hello",
        '["image", "caption", "score"]',
        '{"image": "a.png"}',
        '{"image": "a.png", "captions": ["a cat"], "label": "cat"}',  # lists of pictures
        '{"image": "a.png", "caption": "a cat"}',
    ],
)
def test_a_file_of_other_lines_is_no_file_of_captions(line, tmp_path):
    (path := tmp_path / "list.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="line 1 is not a caption; give another file"):
        caption_files.read_done(str(path))


def test_command_resumes_and_reports(model, folder, commands, tmp_path):  # noqa: F811
    export_programs.export(model, str(tmp_path / "model"))
    out = tmp_path / "out.jsonl"
    command = ["caption", f"--checkpoint={tmp_path}/model", "--max_new_tokens=4", f"--out={out}"]

    def run(*arguments):
        env = {"PATH": "", "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
        env["PYTHONIOENCODING"] = "ascii"  # what the terminal cannot show, the file holds
        done = commands.run([*command, *arguments], tmp_path, env)
        lines = done.stdout.strip().splitlines()
        return done.returncode, lines, done.stderr

    shutil.copy(folder / "a.jpg", tmp_path / "caf\u00e9.jpg")
    status, lines, errors = run(str(tmp_path / "caf\u00e9.jpg"))
    assert "caf\\u00e9.jpg" in lines[0] and "caf\u00e9.jpg" in out.read_text("utf-8")
    assert errors.splitlines()[:2] == [
        f"loading {tmp_path}/model",
        "compiling, and writing the first captions ...",
    ]
    summary = json.loads(lines[-1])
    assert status == 0 and (summary["captioned"], summary["failed"]) == (1, 0)
    assert json.loads(lines[0]).keys() == {"image", "caption", "score"}
    status, lines, errors = run(str(tmp_path / "caf\u00e9.jpg"), str(folder))
    summary = json.loads(lines[-1])
    counts = (summary["captioned"], summary["already_done"], summary["failed"])
    assert status == 1 and counts == (4, 1, 1) and "broken.png" in errors
    assert len(out.read_text("utf-8").splitlines()) == 5
    status, lines, errors = run("--num_return_sequences=2", str(folder))
    assert status == 2 and not lines and errors.startswith("error: num_return_sequences=2")


def test_what_is_refused_leaves_nothing_and_comes_before_the_model(commands, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "file").write_text("")
    for out, says, lines in (
        ("new/folder/x.jsonl", "none does not exist; give a run", 2),
        ("file/x.jsonl", "file cannot be written (", 1),
    ):
        done = commands.run(["caption", "--checkpoint=none", "a.png", f"--out={out}"], tmp_path)
        assert done.returncode == 2 and says in done.stderr
        assert len(done.stderr.splitlines()) == lines  # the first one says that it is loaded
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "file"]
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 pictures")
    done = commands.run(["caption", "--checkpoint=none", "a.zip", "file"], tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: a.zip: not an image that can be read (13 bytes")
    shutil.copy(tmp_path / "a.png", tmp_path / "picture")  # whatever it is called
    done = commands.run(["caption", "--checkpoint=none", "a.zip", "picture"], tmp_path)
    assert "none does not exist" in done.stderr


def test_a_file_name_that_is_not_utf_8_is_a_line_like_others(tmp_path):
    names = ["caf\u00e9.png", os.fsdecode(b"caf\xe9.png")]
    lines = [main.json_line(dict(image=name, caption="x", score=-1.0)) for name in names]
    (tmp_path / "out.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    assert "\u00e9" in lines[0]
    assert caption_files.read_done(str(tmp_path / "out.jsonl"))[0] == set(names)
