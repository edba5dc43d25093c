"""What is said of files of weights that are none, and of those in the wrong place."""

import io
import pathlib
import shutil

import numpy as np
import pytest
from conftest import flags_of
from conversion_cases import small_weights, write_source
from PIL import Image
from safetensors.numpy import save_file

import coca_jax
from coca_jax.cli import convert
from coca_jax.inference import loading
from coca_jax.interop import weights_files


def picture(kind):
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, kind)
    return out.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1234\n"


@pytest.mark.parametrize("name", ["a.bin", "a.safetensors"])
@pytest.mark.parametrize(
    "data, says",
    [
        (POINTER, "a pointer of git-lfs, not the weights; run `git lfs pull`"),
        (picture("JPEG"), "a JPEG picture, not weights"),
        (picture("PNG"), "a PNG picture, not weights"),
        (b"<!DOCTYPE html><title>Log in</title>", "a page of HTML"),
    ],
)
def test_first_bytes_say_what_a_file_is(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}: {says}"):
        weights_files.read(str(tmp_path / name))


def test_renamed_files_are_read_by_what_they_are(tmp_path):
    golden = pathlib.Path(__file__).parent / "golden/tiny.pt"
    shutil.copy(golden, tmp_path / "a.safetensors")
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_file({"x": numbers}, tmp_path / "b.pt")
    read = weights_files.read(str(tmp_path / "a.safetensors"))
    np.testing.assert_array_equal(read["plain"], np.arange(24).reshape(4, 6))
    np.testing.assert_array_equal(weights_files.read(str(tmp_path / "b.pt"))["x"], numbers)


def test_shards_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    says = "model.safetensors.index.json: its weights are in shards, .* write them as one file"
    for read in (weights_files.find, coca_jax.load):
        with pytest.raises(ValueError, match=says):
            read(str(tmp_path))


def test_what_is_open_clip_s_already_does_not_go_there(tmp_path):
    folder, out = write_source(tmp_path / "hub", small_weights()), tmp_path / "out"
    weights = folder / "open_clip_model.safetensors"
    shutil.copy(weights, tmp_path / "epoch_3.pt")
    for given, says in (
        (folder, r"is open_clip's already \(open_clip_model.safetensors\), not a run or"),
        (weights, r"is open_clip's already"),
        (tmp_path / "epoch_3.pt", r"is another program's \(epoch_3.pt\), not a run or an export"),
    ):
        with pytest.raises(ValueError, match=rf"--input={given} {says}.* --out=weights"):
            convert.to_open_clip(str(given), str(out))
    weights.rename(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"is another program's \(model.safetensors\)"):
        convert.to_open_clip(str(folder), str(out))
    with pytest.raises(FileNotFoundError, match="no checkpoint under"):
        convert.to_open_clip(str(tmp_path / "none"), str(out))
    (tmp_path / "photos/cats").mkdir(parents=True)
    (tmp_path / "photos/cats/a.JPG").touch()
    with pytest.raises(FileNotFoundError, match="no checkpoint .*/photos: it is a folder of image"):
        convert.to_open_clip(str(tmp_path / "photos"), str(out))
    assert not out.exists()


def test_a_tokenizer_that_is_not_there_is_told_by_its_flag(tmp_path):
    source = write_source(tmp_path / "given", small_weights())
    with pytest.raises(FileNotFoundError, match="^--bpe=/nope.gz: no such file; give"):
        convert.from_open_clip(str(source), str(tmp_path / "out"), bpe="/nope.gz")


def test_weights_without_their_tokenizer_are_told_the_command_that_takes_it(tmp_path):
    """--bpe is a flag of that command alone."""
    source = write_source(tmp_path / "given", small_weights())
    (source / "vocabulary.bpe.gz").unlink()
    with pytest.raises(ValueError) as told:
        coca_jax.load(str(source))
    assert str(told.value) == (
        "model.text.vocab_size=530 is less than the 49408 ids of the vocabulary; give the model's "
        f"own as --bpe: coca-jax convert --input={source} --bpe=FILE --out=weights"
    )


def test_flags_of_the_other_direction_are_refused(monkeypatch):
    flags_of("convert", monkeypatch)
    given = ["convert", "--input=in", "--out=out", "--to=open_clip", "--model=", "--bpe="]
    for flag in ("--model=coca_ViT-L-14", "--bpe=vocabulary.bpe.gz"):
        convert.flags.FLAGS([*given, flag])
        with pytest.raises(ValueError, match=f"{flag}: .* says; leave out {flag.split('=')[0]}$"):
            convert.main(["convert"])


def test_a_refused_convert_leaves_no_folder(tmp_path):
    tensors = small_weights()
    bad = tensors["visual.proj"].copy()
    bad[0, 0] = np.nan
    tensors["visual.proj"] = bad
    source = write_source(tmp_path / "given", tensors)
    with pytest.raises(ValueError, match="values that are not finite"):
        convert.from_open_clip(str(source), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()  # the user's own stays
    with pytest.raises(ValueError, match="values that are not finite"):
        convert.from_open_clip(str(source), str(tmp_path / "out"))
    assert (tmp_path / "out").is_dir()


def test_a_conversion_that_the_system_ends_says_so(tmp_path, monkeypatch):
    """As for want of memory: what it said last is that it converts."""
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho converting weights.bin ... >&2\nkill -9 $$\n")
    fake.chmod(0o755)
    (tmp_path / "weights.bin").write_bytes(b"PK")
    monkeypatch.setattr(loading.sys, "executable", str(fake))
    with pytest.raises(OSError, match="weights.bin: its conversion was ended by signal 9, perhaps"):
        coca_jax.load(tmp_path / "weights.bin")
