"""prepare: what it leaves out and says so, faults, duplicates, data without texts, odd tars."""

import dataclasses
import io
import json
import random
import tarfile

import numpy as np
import pytest
from PIL import Image
from prepare_cases import add_member, draw, encode, import_data, reasons_of, write_tar

from coca_jax.data import dedup, filters, holdout, prepare
from coca_jax.data.batches import open_stream
from coca_jax.data.sources import tars
from coca_jax.data.sources.items import Options
from coca_jax.recipes import base
from coca_jax.training import run_vocabulary


def test_faults_end_in_quarantine_with_reasons(tmp_path):
    good, bomb = encode(1), io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    whole = encode(2, size=(300, 200))
    members = {
        "good": (good, b"a good one"),
        "truncated": (whole[: len(whole) // 2], b"cut"),
        "zero": (b"", b"nothing"),
        "bomb": (bomb.getvalue(), b"400 megapixels"),
        "longtext": (good, b"word " * 100_000),
        "html": (b"<html>not found</html>", b"wrong extension"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n", b"a program, not a picture"),
        "utf8": (good, b"caf\xe9"),
        "notext": (good, None),
        "emptytext": (good, b"  \n"),
        "noimage": (None, b"text only"),
        "tiny": (encode(3, size=(4, 4)), b"too small"),
        "wide": (encode(4, size=(400, 16)), b"a banner"),
    }
    encodings = {4: "utf-8-sig", 5: "utf-16"}  # as editors on Windows write
    for i in range(7):  # among them a PNG with the wrong extension
        text = f"a fine one {i}".encode(encodings.get(i, "utf-8"))
        members[f"fine{i}"] = (encode(i, "PNG" if i == 3 else "JPEG"), text)
    path = tmp_path / "faults.tar"
    with tarfile.open(path, "w") as archive:
        for key, (image, text) in members.items():
            if image is not None:
                add_member(archive, f"{key}.jpg", image)
            if text is not None:
                add_member(archive, f"{key}.txt", text)
        add_member(archive, "good.jpg", good)  # its key once more
        add_member(archive, "good.txt", b"again")
        add_member(archive, "lost.jpg", whole)
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(whole[-200:])])  # the archive is half-written
    result = import_data(
        "webdataset", path, tmp_path / "out", max_pixels=100_000_000, min_side=8, max_aspect=4.0
    )
    reasons = {}
    for line in (tmp_path / "out/train-quarantine.jsonl").read_text().splitlines():
        entry = json.loads(line)
        reasons.setdefault(entry["key"].split("/")[1], []).append(entry["reason"])
    assert reasons == {
        "truncated": ["damaged_image"],
        "zero": ["empty_image"],
        "bomb": ["too_many_pixels"],
        "longtext": ["text_too_long"],
        "html": ["unreadable_image"],
        "postscript": ["unreadable_image"],
        "utf8": ["bad_utf8"],
        "notext": ["missing_text"],
        "emptytext": ["missing_text"],
        "noimage": ["missing_image"],
        "tiny": ["image_too_small"],
        "wide": ["aspect"],
        "good": ["duplicate_key"],
        "lost": ["damaged_archive"],
    }
    assert (result["read"], result["written"]) == (22, 8)
    assert sum(result["quarantined"].values()) == 14
    left = {"a good one", *(f"a fine one {i}" for i in range(7))}
    assert {r.texts[0] for r in filters.open_source(str(tmp_path / "out"))} == left
    config = base.get_config()  # and training on what is left works
    config.batch_size, config.model.image_size, config.model.patch_size = 8, 16, 8
    config.model.text.update(vocab_size=400, max_len=24)
    config.data.max_bad_fraction = 0.0
    config.data.sources = (dict(path=str(tmp_path / "out")),)
    found = run_vocabulary.load_or_train(config, str(tmp_path / "run"))
    batches = open_stream(config, found)
    for _ in range(2):
        batch = next(batches)
        assert {found.decode(tokens) for tokens in batch["tokens"]} == left
        assert len(np.unique(batch["image"], axis=0)) == 8 - 1  # 'good' and 'fine1' look the same
    assert batches.skipped() == [0]


def test_duplicates_by_content_by_look_and_against_evaluation(tmp_path):
    images = [encode(i, size=(96, 72)) for i in range(6)]
    again = io.BytesIO()
    Image.open(io.BytesIO(images[1])).resize((80, 60)).save(again, "JPEG", quality=60)
    images += [images[0], again.getvalue()]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i, image in enumerate(images):
            add_member(archive, f"{i}.jpg", image)
            add_member(archive, f"{i}.txt", b"text")
    (tmp_path / "eval").mkdir()
    Image.open(io.BytesIO(images[3])).save(tmp_path / "eval" / "e.png")
    for mode, excluded, reasons in (
        ("none", (), {}),
        ("content", (), {"a.tar/6": "duplicate_image"}),
        ("perceptual", (), {"a.tar/6": "duplicate_image", "a.tar/7": "near_duplicate"}),
        ("none", (str(tmp_path / "eval"),), {"a.tar/3": "in_evaluation"}),
    ):
        out = tmp_path / f"{mode}{len(excluded)}"
        import_data("webdataset", tmp_path / "a.tar", out, dedup=mode, exclude=excluded)
        assert reasons_of(out) == reasons


def flat_looks(seed, count=400):
    """Looks that share a flat band, as pictures with plain margins, and one of each 6 bits off."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (count, dedup.BITS), dtype=np.uint8)
    bits[:, :64] = 0
    near = bits.copy()
    for row in near:
        row[64 + rng.choice(192, 6, replace=False)] ^= 1
    return [[row.tobytes().hex() for row in np.packbits(b, axis=1)] for b in (bits, near)]


@pytest.mark.parametrize("compared", [8, 1024])
def test_flat_looks_are_all_compared(compared, monkeypatch):
    monkeypatch.setattr(dedup, "_COMPARED", compared)
    looks, near = flat_looks(0)
    held = [(f"e{n}", look) for n, look in enumerate(looks)]
    found = [(0, n, f"k{n}", f"t{n}", look) for n, look in enumerate(near)]
    barred = dedup.decide(found, "none", 6, held)
    assert barred == {(0, n): "in_evaluation: looks the same" for n in range(400)}
    assert not dedup.decide(found, "none", 5, held)
    both = [(0, n, f"k{n}", f"t{n}", look) for n, look in enumerate(looks + near)]
    twice = dedup.decide(both, "perceptual", 6, [])
    assert twice == {(0, 400 + n): f"near_duplicate: k{n}" for n in range(400)}


@pytest.mark.parametrize("distance", [100, 256])
def test_a_distance_beyond_all_bands_compares_each_with_each(distance):
    bits = np.zeros((3, dedup.BITS), np.uint8)
    bits[1, :distance], bits[2, ::2] = 1, 1  # the last is 128 bits off the first two
    looks = [row.tobytes().hex() for row in np.packbits(bits, axis=1)]
    found = [(0, n, f"k{n}", f"t{n}", look) for n, look in enumerate(looks)]
    gone = dedup.decide(found, "perceptual", distance, [])
    assert sorted(gone) == [(0, 1), (0, 2)][: 1 + (distance == 256)]
    assert len(dedup.decide(found, "perceptual", 99, [])) == 0


def test_evaluation_images_of_any_suffix_and_those_that_do_not_decode(tmp_path, caplog):
    (tmp_path / "eval").mkdir()
    write_tar(tmp_path / "a.tar", 4)
    for number, name in enumerate(("0.jpg", "IMG_1.JPG", "2.Jpg")):
        (tmp_path / "eval" / name).write_bytes(encode(number))
    (tmp_path / "eval/cut.jpg").write_bytes(encode(3)[:-105])
    exclude = (str(tmp_path / "eval"),)
    import_data("webdataset", tmp_path / "a.tar", tmp_path / "out", exclude=exclude)
    gone = dict.fromkeys((f"a.tar/{n:05d}" for n in range(3)), "in_evaluation")
    assert reasons_of(tmp_path / "out") == gone
    assert (
        "1 of 4 images cannot be decoded" in caplog.text
        and "cut.jpg (ValueError: damaged" in caplog.text
    )


def test_looks_tell_images_apart():
    found = [dedup.look(np.asarray(draw(i, (64, 64)))) for i in range(200)]
    bits = np.unpackbits(np.stack(found), axis=1)
    apart = [(bits[i] != bits[j]).sum() for i in range(200) for j in range(i)]
    assert min(apart) > 12


def test_what_cannot_be_used_is_listed_with_its_own_split(tmp_path):
    (tmp_path / "a").mkdir()
    rows = [dict(file_name=f"{n}.jpg", text=f"no. {n}", split="train") for n in range(4)]
    rows[1]["split"] = rows[3]["split"] = "test"
    for n in range(3):  # and not the last
        (tmp_path / f"a/{n}.jpg").write_bytes(encode(n))
    lines = [json.dumps(row) for row in rows] + ["{"]
    (tmp_path / "a/metadata.jsonl").write_text("\n".join(lines))
    told = holdout.find_splits("imagefolder", str(tmp_path / "a"), Options())
    listed = {}
    for split in told.values:
        options = dataclasses.asdict(told.options(split, Options()))
        made = import_data("imagefolder", tmp_path / "a", tmp_path / "out", split=split, **options)
        assert made["read"] == 5
        listed[split] = list(reasons_of(tmp_path / "out", split).values())
    # What split a line is of that cannot be read is not known.
    assert listed == dict(train=["bad_json"], test=["missing_image", "bad_json"])


def test_errors_name_the_remedy(tmp_path):
    write_tar(tmp_path / "a.tar", 3)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        import_data("webdataset", tmp_path / "absent", tmp_path / "o1")
    with pytest.raises(FileNotFoundError, match="parquet"):
        import_data("parquet", tmp_path, tmp_path / "o2")
    with pytest.raises(ValueError, match="none of 3 examples"):
        import_data("webdataset", tmp_path / "a.tar", tmp_path / "o3", require="label")
    with pytest.raises(ValueError, match="--format=zip"):
        import_data("zip", tmp_path, tmp_path / "o4")


def _folder(folder, rows, **fields):
    folder.mkdir()
    for i in range(rows):
        (folder / f"{i}.jpg").write_bytes(encode(i))
    lines = [
        json.dumps({"file_name": f"{i}.jpg"} | {k: v(i) for k, v in fields.items()})
        for i in range(rows)
    ]
    if fields:
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_data_without_texts_are_told_apart_with_what_would_give_them(tmp_path, capsys):
    odd = _folder(tmp_path / "odd", 3, notes=lambda i: f"thing {i}", id=lambda i: i)
    message = "fields are id, notes: name one with --text_field or --label_field"
    with pytest.raises(ValueError, match=f"none of 3 .* {message}"):
        import_data("imagefolder", odd, tmp_path / "o1")
    empty = _folder(tmp_path / "empty", 3, text=lambda i: "  ")
    with pytest.raises(ValueError, match="none has a caption or a class name"):
        import_data("imagefolder", empty, tmp_path / "o2")
    assert not (tmp_path / "o1").exists() or not list((tmp_path / "o1").glob("*.array_record"))
    capsys.readouterr()
    numbers = _folder(tmp_path / "numbers", 4, label=lambda i: i % 2)
    import_data("imagefolder", numbers, tmp_path / "o3")
    assert "class names are numbers (0, 1, ...)" in capsys.readouterr().err
    half = _folder(tmp_path / "half", 4, text=lambda i: "a thing" if i % 2 else "")
    import_data("imagefolder", half, tmp_path / "o4")
    said = capsys.readouterr().err
    assert "2 of 4 examples left out (2 missing_text)" in said and "train-quarantine.jsonl" in said


def test_headers_of_tars_are_read_as_tarfile_reads_them():
    """By the short way for plain files, and by tarfile's own for all others."""
    rng, buffers = random.Random(0), []
    for name in ("a.jpg", "ä.txt", "n" * 100, "d/" * 60 + "x", "l" * 300):
        for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.type = 9 << 20, 17, rng.choice((b"0", b"\0", b"5"))
            try:
                data = info.tobuf(format)
            except ValueError:  # a name that USTAR cannot have
                continue
            buffers += [data[i : i + 512] for i in range(0, len(data), 512)]
    for buffer in list(buffers):
        for at in (*rng.sample(range(512), 20), *range(124, 136), *range(148, 157), 345):
            damaged = bytearray(buffer)
            damaged[at] = rng.choice(b"\0 0789\xff\x80a")
            buffers.append(bytes(damaged))
            damaged[148:156] = b"%06o\0 " % (256 + sum(damaged) - sum(damaged[148:156]))
            buffers.append(bytes(damaged))

    def read(buffer):
        try:
            found = tarfile.TarInfo.frombuf(buffer, "utf-8", "surrogateescape")
            return found.name, found.size, found.type
        except tarfile.HeaderError as error:
            return type(error)

    same, lenient, left = 0, 0, 0  # the last to tarfile
    for buffer in [b"", b"\0" * 512, b"x" * 100, *buffers]:
        found, wanted = tars._plain_header(buffer), read(buffer)
        left += found is None
        same += found == wanted
        # A plain file's owner and dates are not looked at.
        lenient += found not in (None, wanted) and wanted is tarfile.InvalidHeaderError
    assert same + lenient + left == len(buffers) + 3
    assert same > 200 and lenient < same


def test_a_tar_whose_members_are_out_of_order_says_so(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for suffix in ("jpg", "txt"):
            for i in range(3):
                add_member(archive, f"{i}.{suffix}", encode(i) if suffix == "jpg" else b"a cat")
    with pytest.raises(ValueError, match="the members of a key must stand together, as `tar --so"):
        import_data("webdataset", tmp_path / "a.tar", tmp_path / "out")


def test_a_selection_that_leaves_nothing_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", 12)
    given = Options(where=(("widht", ("3",)),))
    where = ("webdataset", str(tmp_path / "a.tar"), str(tmp_path / "out"))
    says = "filtered {'where': .*}"
    with pytest.raises(ValueError, match=f"none of 12 .*{says}"):
        prepare.prepare(*where, options=given, processes=1, progress=False)
    with pytest.raises(ValueError, match=says):  # and not the share is what is wrong
        prepare.prepare_with_holdout(*where, 0.3, options=given, processes=1, progress=False)
    assert not list((tmp_path / "out").iterdir())


def test_an_unfinished_import_is_replaced_where_that_is_asked_for(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", 4)
    out = tmp_path / "out"

    def cut_short(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write", cut_short)
        with pytest.raises(KeyboardInterrupt):
            import_data("webdataset", tmp_path / "a.tar", out)
    line = "out/.unfinished-train is an unfinished import with other options; give --overwrite, or"
    with pytest.raises(ValueError, match=line):
        import_data("webdataset", tmp_path / "a.tar", out, max_side=20)
    # What would fail is told before anything is begun.
    for bad in ("none", str(out)):
        with pytest.raises(FileNotFoundError, match=f"--exclude={bad}: there are no images; give"):
            import_data("webdataset", tmp_path / "a.tar", tmp_path / "p", exclude=(bad,))
    assert not (tmp_path / "p").exists()
    done = import_data("webdataset", tmp_path / "a.tar", out, max_side=20, overwrite=True)
    assert done["written"] == 4 and not list(out.glob(".unfinished*"))
    assert max(decoded.size for decoded in opened(out)) == (20, 15)


def opened(out):
    return [Image.open(io.BytesIO(record.image)) for record in filters.open_source(str(out))]


def test_a_place_that_takes_nothing_is_one_line(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", 3)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file/out/.unfinished-train/plan.json cannot be written"):
        import_data("webdataset", tmp_path / "a.tar", tmp_path / "file/out")

    class Full(prepare.array_record_module.ArrayRecordWriter):
        def close(self):
            super().close()
            raise RuntimeError("write() failed: No space left on device; at byte 671744")

    monkeypatch.setattr(prepare.array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(OSError, match="part-00000.array_record cannot be written: .*No space left"):
        import_data("webdataset", tmp_path / "a.tar", tmp_path / "out", processes=1)
    monkeypatch.undo()
    assert import_data("webdataset", tmp_path / "a.tar", tmp_path / "out")["written"] == 3


def test_one_picture_is_no_folder_of_them(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encode(1))
    line = r"a\.jpg is one file; --format=imagefolder reads a folder of pictures"
    with pytest.raises(ValueError, match=line):
        import_data("imagefolder", tmp_path / "a.jpg", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_looks_that_share_a_ground_are_compared_with_few_others():
    rng = np.random.default_rng(0)
    bits = np.zeros((3000, dedup.BITS), np.uint8)
    bits[:, 160:] = rng.integers(0, 2, (3000, 96))
    bits[-1] = bits[5] ^ (np.arange(dedup.BITS) % 50 == 7)  # some of them of the ground
    apart = int((bits[-1] != bits[5]).sum())
    assert dedup._near(np.packbits(bits, axis=1), 0, apart, True) == {2999: 5}
    groups = list(dedup._groups(bits, np.arange(3000), 6, 0, True))
    assert max(map(len, groups)) < 100 and sum(map(len, groups)) < 4 * 3000
    few = rng.random((3000, dedup.BITS)) < 0.02  # nearly blank: parts would be more to compare
    rows = np.arange(3000)
    assert sum(len(g) ** 2 for g in dedup._groups(few, rows, 6, 0, True)) <= 3000**2
