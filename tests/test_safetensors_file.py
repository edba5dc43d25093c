import json
import struct

import ml_dtypes
import numpy as np
import pytest

from coca_jax.interop import safetensors
from coca_jax.interop.safetensors import Blocks
from coca_jax.runtime import progress


def raw(path, header, data=b""):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(count, begin, end, dtype="F32"):
    return dict(dtype=dtype, shape=[count], data_offsets=[begin, end])


def test_round_trip_of_blocks(tmp_path):
    a = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    tensors = {
        "a/b": Blocks(a.shape, lambda: iter(a)),
        "scalar": Blocks((), lambda: [np.float32(2.5)]),
        "transposed": Blocks((5, 4), lambda: [a[0].T]),
        "empty": Blocks((0, 3), lambda: []),
    }
    safetensors.write(tmp_path / "x", tensors)
    read = safetensors.read(tmp_path / "x")
    np.testing.assert_array_equal(read["a/b"], a)
    np.testing.assert_array_equal(read["transposed"], a[0].T)
    assert read["scalar"] == 2.5 and read["scalar"].shape == () and read["empty"].shape == (0, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_blocks_that_do_not_add_up(tmp_path):
    with pytest.raises(ValueError, match=r"a: its blocks do not add up to its shape \(3,\)"):
        safetensors.write(tmp_path / "x", {"a": Blocks((3,), lambda: [np.zeros(2)])})
    assert not list(tmp_path.iterdir())


def test_dtypes(tmp_path):
    values = np.asarray([1, 2.5, -3])
    for name, dtype in (("F16", np.float16), ("BF16", ml_dtypes.bfloat16), ("F64", np.float64)):
        data = values.astype(dtype).tobytes()
        entry = dict(dtype=name, shape=[3], data_offsets=[0, len(data)])
        path = raw(tmp_path / name, {"__metadata__": {"format": "pt"}, "a": entry}, data)
        read = safetensors.read(path)
        assert read["a"].dtype == dtype
        np.testing.assert_array_equal(read["a"].astype(np.float64), values)


@pytest.mark.parametrize(
    "header, message",
    [
        ({"a": entry(3, 0, 12)}, "x: not a safetensors file, .* not fully covered"),
        ({"a": entry(2, 0, 4)}, "x: .*invalid shape"),
        ({"a": entry(1, -4, 0)}, "x: .*invalid value: integer `-4`"),
        ({"a": entry(1, 0, 4), "b": entry(2, 0, 8)}, "x: .*invalid offset"),  # an overlap
        ({"a": entry(1, 4, 8)}, "x: .*invalid offset"),  # a gap
        ({"a": entry(1, 0, 4)}, "x: .*not fully covered"),
        ({"a": entry(8, 0, 8, "F8_E4M3")}, "a has dtype F8_E4M3"),
        ({"a": entry(8, 0, 8, "F99")}, "x: .*unknown variant `F99`"),
        ({"a": entry(1 << 62, 0, 8)}, "x: .*overflow"),
        ({"a": dict(entry(2, 0, 8), shape=[1] * 100 + [2])}, "x: a of 101 axes: "),
        ({"a": 5}, "x: .*invalid type"),
        ([1], "x: .*invalid type"),
        (b"not json", "x: .*invalid JSON in header"),
        (b"[" * 200_000, "x: .*"),
    ],
)
def test_damaged_files_are_refused(tmp_path, header, message):
    with pytest.raises(ValueError, match=message):
        safetensors.read(raw(tmp_path / "x", header, b"12345678"))


def test_files_that_are_cut_short(tmp_path):
    (tmp_path / "x").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    (tmp_path / "y").write_bytes(b"abc")
    (tmp_path / "z").write_bytes(b"")
    for name in "xyz":
        with pytest.raises(ValueError, match=f"{name}: not a safetensors file"):
            safetensors.read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="none"):
        safetensors.read(tmp_path / "none")


def test_a_bar_counts_the_bytes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    blocks = Blocks((4, 250), lambda: [np.ones(250, np.float32)] * 4)
    safetensors.write(tmp_path / "x", {"a": blocks}, progress=True)
    assert "4.00k of 4.00k bytes" in capsys.readouterr().err
    safetensors.write(tmp_path / "x", {"a": blocks})
    assert not capsys.readouterr().err
