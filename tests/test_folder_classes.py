"""Folders and columns as classes: what a line says of their names, and names from a file."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare_cases import encode, import_data, reasons_of
from test_picture_folders import beside, brought, in_folders

from coca_jax.data import filters
from coca_jax.data.sources import array_record, fields, image_folder
from coca_jax.evaluation.evaluators import probes


def test_two_folders_of_one_split_are_no_classes(tmp_path):
    """All of them were classes once: the pictures of the test set were trained on."""
    in_folders(tmp_path / "a", ["train/c", "training/c", "Testing/c"])
    assert image_folder.splits(str(tmp_path / "a")) == ["test", "train"]
    says = "the split '{}' is both train and training, which are its folders; give the folder to r"
    for split in ("train", "training"):
        with pytest.raises(ValueError, match=says.format(split)):
            brought("imagefolder", tmp_path / "a", tmp_path / "p", split)
    assert not (tmp_path / "p").exists()
    assert len(brought("imagefolder", tmp_path / "a", tmp_path / "p", "test")) == 3


def test_class_names_of_a_file_apply_to_folders_by_number_and_by_wordnet_id(tmp_path):
    def labels(folder, class_names):
        out = tmp_path / f"p{len(list(tmp_path.iterdir()))}"
        found = brought("imagefolder", folder, out, class_names=class_names)
        listed = array_record.read_manifest(str(out))["class_names"]
        return sorted({labels[0] for _, labels in found.values()}), listed, reasons_of(out)

    numbered = in_folders(tmp_path / "numbered", "012", count=1)
    names = ("cat", "dog", "bird")
    assert labels(numbered, names) == (["bird", "cat", "dog"], list(names), {})
    assert labels(numbered, names[:2]) == (["cat", "dog"], ["cat", "dog"], {"2/0.jpg": "bad_label"})
    (tmp_path / "0").mkdir()
    import_data("imagefolder", numbered, tmp_path / "0/raw")
    import_data("prepared", tmp_path / "0/raw", tmp_path / "0/named", class_names=names)
    assert array_record.read_manifest(str(tmp_path / "0/named"))["class_names"] == list(names)
    renamed = filters.open_source(str(tmp_path / "0/named"))
    assert [record.labels for record in renamed] == [(name,) for name in names]
    (tmp_path / "0/list.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n\n")
    lines = fields.read_class_names(str(tmp_path / "0/list.txt"))
    of_imagenet = in_folders(tmp_path / "imagenet", ("n01443537", "n01440764"))
    listed = ["tench, Tinca tinca", "goldfish"]
    assert labels(of_imagenet, lines) == (sorted(listed), listed, {})


def test_numbers_as_tables_write_them_are_classes(tmp_path, capsys):
    beside(tmp_path / "a", dict.fromkeys("012"))
    (tmp_path / "a/metadata.csv").write_text("file_name,label\n0.jpg,1.0\n1.jpg,0.0\n2.jpg,0.5\n")
    found = brought("imagefolder", tmp_path / "a", tmp_path / "p", class_names=("cat", "dog"))
    assert [labels for _, labels in found.values()] == [("dog",), ("cat",), ("0.5",)]
    (tmp_path / "a/metadata.csv").write_text("file_name,label\n0.jpg,1.0\n1.jpg,0.0\n")
    brought("imagefolder", tmp_path / "a", tmp_path / "q")
    assert "class names are numbers (0.0, 1.0, ...)" in capsys.readouterr().err


def test_minus_one_of_numbered_classes_is_no_label(tmp_path):
    told = dict(info=dict(features=dict(label=dict(_type="ClassLabel", names=["cat", "dog"]))))
    columns = dict(image=[encode(i) for i in range(4)], text=list("abcd"), label=[1, -1, 0, -2])
    table = pa.table(columns).replace_schema_metadata({b"huggingface": json.dumps(told).encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    found = brought("parquet", tmp_path / "a.parquet", tmp_path / "p")
    assert list(found.values()) == [(("a",), ("dog",)), (("b",), ()), (("c",), ("cat",))]
    assert reasons_of(tmp_path / "p") == {"a.parquet#3": "bad_label"}
    assert fields.names([-1, 1], ("cat", "dog")) == ["dog"]
    assert fields.names(-1, ()) == ["-1"]


@pytest.mark.parametrize("maker", [probes.LinearProbe, probes.NearestNeighbours])
def test_a_probe_says_what_has_no_class_before_images_are_encoded(maker, caplog):
    """Once every image to learn from was, which may take hours; drawn scenes, of which some have no
    class, could not be learned from at all."""
    names, encoded = ["red", "blue"], []

    class Mean:
        def features(self, images):
            encoded.extend(images.mean((1, 2, 3)).tolist())
            return images.reshape(len(images), -1, 3).mean(1).astype(np.float32)

    def records(*labels):
        colours = dict(red=(200, 10, 10), blue=(10, 10, 200))
        shown = [np.full((4, 4, 3), colours.get(label, 120), np.uint8) for label in labels]
        pairs = enumerate(zip(shown, labels))
        return [dict(image=image, labels=[label], key=f"k{n}") for n, (image, label) in pairs]

    train, test = ["grey", *["red", "blue"] * 8, "grey"], records("red", "blue")
    found = dict(maker("set", names, records(*train), batch_size=3).run(Mean(), test))
    assert found[f"{maker.kind}/set/top1"] == 1 and found[f"{maker.kind}/set/num_train"] == 16
    assert len(encoded) == 18 and 120 not in encoded
    line = "2 of 18 training examples have none of the 2 classes (such as k0 with labels ['grey'])"
    assert line in caplog.text
    encoded.clear()
    with pytest.raises(ValueError, match="k0: labels .'grey'. are not among the 2 classes"):
        dict(maker("set", names, records(*train)).run(Mean(), records("grey", "red")))
    assert not encoded
    with pytest.raises(ValueError, match="2 of 2 training examples"):
        dict(maker("set", names, records("grey", "grey")).run(Mean(), test))
