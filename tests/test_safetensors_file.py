import json
import struct

import ml_dtypes
import numpy as np
import pytest

from coca_jax.interop import safetensors_file
from coca_jax.interop.safetensors_file import Blocks


def raw(path, header, data=b""):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_round_trip_of_blocks(tmp_path):
    a = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    tensors = {
        "a/b": Blocks(a.shape, lambda: iter(a)),
        "scalar": Blocks((), lambda: [np.float32(2.5)]),
        "transposed": Blocks((5, 4), lambda: [a[0].T]),
        "empty": Blocks((0, 3), lambda: []),
    }
    safetensors_file.write(tmp_path / "x", tensors)
    read = safetensors_file.read(tmp_path / "x")
    np.testing.assert_array_equal(read["a/b"], a)
    np.testing.assert_array_equal(read["transposed"], a[0].T)
    assert read["scalar"] == 2.5 and read["scalar"].shape == () and read["empty"].shape == (0, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_blocks_that_do_not_add_up(tmp_path):
    with pytest.raises(ValueError, match=r"a: its blocks do not add up to its shape \(3,\)"):
        safetensors_file.write(tmp_path / "x", {"a": Blocks((3,), lambda: [np.zeros(2)])})
    assert not (tmp_path / "x").exists()


def test_dtypes(tmp_path):
    values = np.asarray([1, 2.5, -3])
    for name, dtype in (("F16", np.float16), ("BF16", ml_dtypes.bfloat16), ("F64", np.float64)):
        data = values.astype(dtype).tobytes()
        entry = dict(dtype=name, shape=[3], data_offsets=[0, len(data)])
        path = raw(tmp_path / name, {"__metadata__": {"format": "pt"}, "a": entry}, data)
        read = safetensors_file.read(path)
        assert read["a"].dtype == dtype
        np.testing.assert_array_equal(read["a"].astype(np.float64), values)


@pytest.mark.parametrize(
    "header, message",
    [
        ({"a": dict(dtype="F32", shape=[3], data_offsets=[0, 12])}, "a of shape .* no such bytes"),
        ({"a": dict(dtype="F32", shape=[2], data_offsets=[0, 4])}, "a of shape .* no such bytes"),
        ({"a": dict(dtype="F32", shape=[1], data_offsets=[-4, 0])}, "a of shape .* no such bytes"),
        ({"a": dict(dtype="F8_E4M3", shape=[1], data_offsets=[0, 1])}, "a has dtype F8_E4M3"),
        (b"not json", "no JSON header"),
    ],
)
def test_damaged_files_are_refused(tmp_path, header, message):
    with pytest.raises(ValueError, match=message):
        safetensors_file.read(raw(tmp_path / "x", header, b"12345678"))


def test_files_that_are_cut_short(tmp_path):
    (tmp_path / "x").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    (tmp_path / "y").write_bytes(b"abc")
    (tmp_path / "z").write_bytes(b"")
    for name in "xyz":
        with pytest.raises(ValueError, match="cut short"):
            safetensors_file.read(tmp_path / name)
