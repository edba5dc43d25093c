import pathlib
import pickle
import zipfile

import numpy as np
import pytest

from coca_jax.interop import torch_file

TINY = pathlib.Path(__file__).parent / "golden/tiny.pt"  # made by make_open_clip_golden.py
BASE = np.arange(24, dtype=np.float32)


def archive(path, pickled, storages=(), compression=zipfile.ZIP_STORED, name="archive/data.pkl"):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(name, pickled)
        for key, data in storages:
            file.writestr(f"archive/data/{key}", data)
    return path


def tensor(shape, stride, offset=0, kind="FloatStorage", key="0"):
    """Pickle opcodes of a tensor as torch.save writes them."""

    def numbers(values):
        return b"(" + b"".join(b"I%d\n" % v for v in values) + b"t"

    storage = b"(Vstorage\nctorch\n%b\nV%b\nVcpu\nI24\ntQ" % (kind.encode(), key.encode())
    arguments = storage + b"I%d\n" % offset + numbers(shape) + numbers(stride)
    hooks = b"I00\nccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + hooks + b"tR"


def state(**tensors):
    return b"(" + b"".join(b"V%b\n%b" % (k.encode(), t) for k, t in tensors.items()) + b"d."


def test_a_training_checkpoint_written_by_torch():
    tensors = torch_file.read(TINY)
    names = torch_file.strip_prefixes(tensors)
    read = {names[name]: value for name, value in tensors.items()}
    assert list(read) == [
        *("plain", "transposed", "tail", "parameter", "half", "bfloat16", "double", "integers"),
        *("scalar", "empty"),
    ]
    np.testing.assert_array_equal(read["plain"], BASE.reshape(4, 6))
    np.testing.assert_array_equal(read["transposed"], BASE.reshape(4, 6).T)
    np.testing.assert_array_equal(read["tail"], BASE[20:])
    np.testing.assert_array_equal(read["parameter"], BASE[:3])
    for name, dtype in (("half", "float16"), ("bfloat16", "bfloat16"), ("double", "float64")):
        assert read[name].dtype.name == dtype
        np.testing.assert_array_equal(read[name].astype(np.float32), BASE[:5])
    np.testing.assert_array_equal(read["integers"], [0, 1, 2, 3, 4])
    assert read["scalar"].shape == () and read["scalar"] == 2.5
    assert read["empty"].shape == (0, 3)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_stored_and_compressed_storages(tmp_path, compression):
    pickled = state(a=tensor((2, 3), (3, 1), offset=1))
    path = archive(tmp_path / "a.pt", pickled, [("0", BASE.tobytes())], compression)
    np.testing.assert_array_equal(torch_file.read(path)["a"], BASE[1:7].reshape(2, 3))


class Attack:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickled_code_is_refused_and_not_run(tmp_path, protocol):
    import os

    victim = tmp_path / "ran"
    pickled = pickle.dumps({"a": Attack(os.mkdir, str(victim))}, protocol=protocol)
    with pytest.raises(ValueError, match=r"asks for (posix|nt|os)\.mkdir.*refused"):
        torch_file.read(archive(tmp_path / "a.pt", pickled))
    assert not victim.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins\neval", "builtins\ngetattr", "torch._utils\n_rebuild_xla_tensor", "os\nsystem"],
)
def test_names_outside_the_list_are_refused(tmp_path, name):
    path = archive(tmp_path / "a.pt", b"(Va\nc" + name.encode() + b"\nd.")
    with pytest.raises(ValueError, match=name.replace("\n", r"\.")):
        torch_file.read(path)


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(shape=(5, 5), stride=(5, 1)), "beyond its storage"),
        (dict(shape=(2,), stride=(1,), offset=23), "beyond its storage"),
        (dict(shape=(2,), stride=(1 << 40,)), "beyond its storage"),
        (dict(shape=(2,), stride=(-1,), offset=5), "impossible sizes"),
        (dict(shape=(-2,), stride=(1,)), "impossible sizes"),
        (dict(shape=(2, 2), stride=(1,)), "strides"),
        (dict(shape=(2,), stride=(1,), key="7"), "storage 7 is missing"),
        (dict(shape=(2,), stride=(1,), kind="ComplexFloatStorage"), "ComplexFloatStorage"),
    ],
)
def test_tensors_outside_their_storage_are_refused(tmp_path, bad, message):
    path = archive(tmp_path / "a.pt", state(a=tensor(**bad)), [("0", BASE.tobytes())])
    with pytest.raises(ValueError, match=message):
        torch_file.read(path)


def test_files_that_are_something_else(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("hello")
    with pytest.raises(ValueError, match="PyTorch 1.6"):
        torch_file.read(text)
    whole = archive(tmp_path / "whole.pt", b"N.").read_bytes()
    text.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut short, as by a download that broke off"):
        torch_file.read(text)
    with pytest.raises(ValueError, match="no data.pkl"):
        torch_file.read(archive(tmp_path / "b.pt", b"", name="archive/other"))
    script = archive(tmp_path / "c.pt", b"N.")
    with zipfile.ZipFile(script, "a") as file:
        file.writestr("archive/code/x.py", "")
    with pytest.raises(ValueError, match="TorchScript"):
        torch_file.read(script)
    with pytest.raises(ValueError, match="damaged pickle"):
        torch_file.read(archive(tmp_path / "d.pt", b"\x80\x02("))
    with pytest.raises(ValueError, match="holds a list"):
        torch_file.read(archive(tmp_path / "e.pt", b"(l."))
    with pytest.raises(ValueError, match="'epoch' of the state dict is not a tensor"):
        torch_file.read(archive(tmp_path / "f.pt", b"(Vepoch\nI1\nd."))
    with pytest.raises(FileNotFoundError):
        torch_file.read(tmp_path / "none.pt")


def test_a_dict_that_holds_itself(tmp_path):
    pickled = b"}p0\nVmodel\ng0\ns."
    with pytest.raises(ValueError, match="a.pt: entry 'model' of the state dict is not a tensor"):
        torch_file.read(archive(tmp_path / "a.pt", pickled))


@pytest.mark.parametrize(
    "pickled, message",
    [
        (b"\x80\x02r\xff\xff\xff\x7f.", "damaged pickle"),  # C's machine reserves 32 GiB here
        (b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.", "holds a bytearray"),  # of 2^63 bytes
        (b"ctorch._utils\n_rebuild_tensor_v2\n}Varray\nVx\nsb.", "sets attributes"),
        (b"ctorch\nFloatStorage\n}Vdtype\nI1\nsb.", "sets attributes"),
        (b"(V%b\nI1\nd." % (b"a" * 5000), r"entry 'aaa.{76}a*' of the state dict"),
        (b"(I5\nI1\nd.", "a int for a name"),
        (state(a=tensor((1,) * 70, (1,) * 70)), "impossible sizes"),
        (state(a=tensor((1 << 80, 1 << 80), (0, 0))), "impossible sizes"),
    ],
)
def test_pickles_that_ask_for_too_much(tmp_path, pickled, message):
    path = archive(tmp_path / "a.pt", pickled, [("0", BASE.tobytes())])
    with pytest.raises(ValueError, match=f"a.pt: .*{message}"):
        torch_file.read(path)


def test_archives_that_unpack_to_too_much_or_are_damaged(tmp_path):
    pickled = state(a=tensor((2,), (1,)))
    deflated = zipfile.ZIP_DEFLATED
    path = archive(tmp_path / "a.pt", bytes(torch_file.MAX_PICKLE + 1), compression=deflated)
    with pytest.raises(ValueError, match="data.pkl has more than"):
        torch_file.read(path)
    zeros = bytes(torch_file.MAX_PICKLE + 1)
    path = archive(tmp_path / "b.pt", pickled, [("0", zeros)], deflated)
    with pytest.raises(ValueError, match="storage 0 unpacks from"):
        torch_file.read(path)
    path = archive(tmp_path / "c.pt", pickled, [("0", np.arange(9.0).tobytes())], deflated)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        for flip in (0xFF, 0x01):
            data = bytearray(whole)
            data[place] ^= flip  # the methods, sizes and flags of all entries among them
            path.write_bytes(data)
            try:
                torch_file.read(path)
            except ValueError as error:
                assert str(error).startswith(str(path)) and "\n" not in str(error)


def test_prefixes_are_stripped_only_when_all_have_them():
    strip = torch_file.strip_prefixes
    assert strip(["module.a", "module.b"]) == {"module.a": "a", "module.b": "b"}
    assert strip(["module._orig_mod.a"]) == {"module._orig_mod.a": "a"}
    assert strip(["module.a", "b"]) == {"module.a": "module.a", "b": "b"}


def test_a_bytearray_reserves_nothing(tmp_path):
    pickled = pickle.BYTEARRAY8 + (1 << 40).to_bytes(8, "little") + b"."
    with pytest.raises(ValueError, match="holds a bytearray, which is no tensor; refused"):
        torch_file.read(archive(tmp_path / "a.pt", pickled))
    key = tensor((2,), (1,), key="0").replace(b"Vstorage", b"(Vstorage")  # unhashable, or so
    with pytest.raises(ValueError) as error:
        torch_file.read(archive(tmp_path / "b.pt", b"(" + key + b"I1\nd.", [("0", BASE.tobytes())]))
    assert " at 0x" not in str(error.value)
