"""Weights, tokenizers and their configurations, as `convert` and `load` read a stranger's."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pathlib
import pickle
import random
import struct
import zipfile
from typing import Any

import ml_dtypes
import mutate
import numpy as np

from coca_jax.cli import convert
from coca_jax.config import Model, read
from coca_jax.data import vocabulary
from coca_jax.interop import export_format, open_clip_config, safetensors, torch_file
from coca_jax.interop.open_clip_weights import Layout
from kinds import Kind

TEXTS = ("a photo of a cat", "naïve 東京 🙂", "x" * 3000, "half a word-", "")


def _told(arrays: dict[str, np.ndarray]) -> str:
    """Names, shapes and contents, all of them read; of one that claims gigabytes the beginning."""
    digest = hashlib.blake2b(digest_size=6)
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode("utf-8", "replace"))
        digest.update(np.ascontiguousarray(array.ravel()[: 1 << 16] if array.nbytes < 1 << 24 else
                                           array[:1]).tobytes())  # fmt: skip
    return f"{len(arrays)} arrays: {digest.hexdigest()}"


def safetensors_seeds() -> list[bytes]:
    """Arrays of several types and shapes."""
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((3,), np.float16),
        "c": np.ones((2, 2), ml_dtypes.bfloat16), "d": np.zeros((0, 4), np.float32),
        "e": np.array(7, np.int64), "f": np.array([True, False]),
    }  # fmt: skip
    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "bool": "BOOL"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in arrays.items():
        span = [len(data), len(data) + array.nbytes]
        header[name] = dict(dtype=kinds[array.dtype.name], shape=array.shape, data_offsets=span)
        data += array.tobytes()
    text = json.dumps(header).encode()
    return [struct.pack("<Q", len(text)) + text + data]


def damage_safetensors(rng: random.Random, seed: bytes) -> bytes:
    """Bytes at random, or another header whose length is right."""
    if rng.random() < 0.3:
        return mutate.data(rng, seed)
    size = struct.unpack("<Q", seed[:8])[0]
    header = mutate.tree(rng, json.loads(seed[8 : 8 + size]))
    if isinstance(header, dict) and rng.random() < 0.3:
        header[rng.choice(mutate.TEXTS)] = dict(
            dtype="F32", shape=[1 << 20] * 3, data_offsets=[0, 8]
        )
    text = mutate.text_of(rng, header)
    return struct.pack("<Q", len(text)) + text + seed[8 + size :]


def _tensor(
    key: str, shape: tuple, stride: tuple, kind: str = "FloatStorage", at: int = 0
) -> bytes:
    """The opcodes of a tensor as torch.save writes them."""

    def numbers(values: tuple) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t"

    storage = b"(Vstorage\nctorch\n%b\nV%b\nVcpu\nI24\ntQ" % (kind.encode(), key.encode())
    given = storage + b"I%d\n" % at + numbers(shape) + numbers(stride)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + given + b"I00\nccollections\nOrderedDict\n)RtR"


def _archive(pickled: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    stamp = (2020, 1, 1, 0, 0, 0)
    with zipfile.ZipFile(out, "w", compression) as file:
        for name, data in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n"),
                           ("data/0", np.arange(24, dtype=np.float32).tobytes()),
                           ("data/1", np.arange(8, dtype=np.float16).tobytes())):  # fmt: skip
            info = zipfile.ZipInfo(f"archive/{name}", stamp)
            info.compress_type = compression
            file.writestr(info, data)
    return out.getvalue()


def torch_seeds() -> list[bytes]:
    """State dicts, plain, wrapped and packed."""
    one, two = _tensor("0", (4, 6), (6, 1)), _tensor("1", (2, 2), (1, 2), "HalfStorage", 2)
    parameter = (
        b"ctorch._utils\n_rebuild_parameter\n(" + one + b"I00\nccollections\nOrderedDict\n)RtR"
    )
    state = b"(Va\n" + one + b"Vmodule.b\n" + two + b"Vc\n" + parameter + b"d"
    wrapped = b"(Vstate_dict\n" + state + b"Vepoch\nI3\nd"
    ordered = b"ccollections\nOrderedDict\n)R(Va\n" + one + b"u}(V_metadata\n}ub"
    return [
        _archive(state + b"."),
        _archive(b"\x80\x02" + wrapped + b"."),
        _archive(state + b".", zipfile.ZIP_DEFLATED),
        _archive(ordered + b"."),
    ]


OPCODES = [getattr(pickle, name) for name in pickle.__all__ if name.isupper() and
           isinstance(getattr(pickle, name), bytes)]  # fmt: skip


def damage_torch(rng: random.Random, seed: bytes) -> bytes:
    """Bytes at random, or opcodes at random in the pickle of an archive that is whole."""
    if rng.random() < 0.3:
        return mutate.data(rng, seed)
    with zipfile.ZipFile(io.BytesIO(seed)) as file:
        pickled = bytearray(file.read("archive/data.pkl"))
        packed = file.getinfo("archive/data.pkl").compress_type
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(pickled))
        kind = rng.randrange(5)
        if kind == 0:
            pickled[at:at] = rng.choice(OPCODES) + rng.randbytes(rng.choice((0, 1, 4, 8)))
        elif kind == 1:
            names = ("ccollections\ndeque\n", "cos\nsystem\n", "cbuiltins\neval\n",
                     "cnumpy\nload\n", "ctorch\nDoubleStorage\n",
                     "ctorch._utils\n_rebuild_tensor_v2\n")  # fmt: skip
            pickled[at:at] = rng.choice(names).encode()
        elif kind == 2:
            number = rng.choice((-1, 0, *mutate.NUMBERS))
            pickled[at:at] = b"I%d\n" % number if rng.random() < 0.5 else b"r" + rng.randbytes(4)
        else:
            pickled = bytearray(mutate.data(rng, bytes(pickled), 2)) or pickled
    return _archive(bytes(pickled), packed)


def read_torch(path: pathlib.Path) -> str:
    """All tensors of a file of torch.save."""
    return _told(torch_file.read(path))


def read_safetensors(path: pathlib.Path) -> str:
    """All arrays of a safetensors file."""
    try:
        return _told(safetensors.read(path))
    except (
        ValueError
    ) as error:  # of several arrays at fault its reader names one, now this, now that
        raise ValueError(str(error).split(" for tensor")[0]) from None


def tokenizer_seeds() -> list[bytes]:
    """CLIP's merges, a tokenizer.json and a SentencePiece model, all small."""
    merges = ["#version: 0.2", "a t", "c at</w>", "p h", "ph o", "t o</w>", "pho to</w>", "o f</w>"]
    words = {"<s>": 0, "</s>": 1, "<pad>": 2, "a": 3, "c": 4, "t": 5, "at": 6, "<unk>": 7}
    special = [dict(id=i, content=c, single_word=False, lstrip=False, rstrip=False,
                    normalized=False, special=True)
               for c, i in words.items() if "<" in c]  # fmt: skip
    tokenizer = dict(
        version="1.0", truncation=None, padding=None, added_tokens=special,
        normalizer=dict(type="Lowercase"),
        pre_tokenizer=dict(type="Whitespace"), post_processor=None,
        decoder=dict(type="BPEDecoder", suffix="</w>"),
        model=dict(type="BPE", dropout=None, unk_token="<unk>", continuing_subword_prefix=None,
                   end_of_word_suffix=None, fuse_unk=False, byte_fallback=False,
                   vocab=words, merges=["a t"]),
    )  # fmt: skip
    texts = [f"a photo of the {word} number {i}" for i, word in enumerate(("cat", "dog") * 40)]
    scratch = pathlib.Path("scratch.model").absolute()
    trained = vocabulary.train(texts, 320, str(scratch)).data
    return [
        gzip.compress("\n".join(merges).encode(), mtime=0),
        json.dumps(tokenizer).encode(),
        trained,
    ]


def damage_tokenizer(rng: random.Random, seed: bytes) -> bytes:
    """Each kind damaged inside of what packs it, or from outside."""
    if rng.random() < 0.25:
        return mutate.data(rng, seed)
    if seed[:1] == b"{":
        return mutate.text_of(rng, mutate.tree(rng, json.loads(seed)))
    if seed[:2] == b"\x1f\x8b":
        text = mutate.data(rng, gzip.decompress(seed), 4)
        if rng.random() < 0.1:
            text = text * rng.choice((2, 200, 20_000))
        return gzip.compress(text, mtime=0)
    return mutate.data(rng, seed, 3)


def read_tokenizer(path: pathlib.Path) -> str:
    """A vocabulary, and what it makes of texts and numbers."""
    words = vocabulary.load(path)
    ids = words.encode_many(TEXTS)
    rows, valid = words.encode_batch(TEXTS, 16)
    back = [words.decode(row.tolist()) for row in rows]
    said = f"{words.size} {words.bos_id} {words.eos_id} {words.pad_id} {ids} {rows.tolist()}"
    digest = hashlib.blake2b(
        f"{said} {valid.sum()} {back}".encode("utf-8", "replace"), digest_size=6
    )
    return f"{type(words).__name__}: {digest.hexdigest()}"


def open_clip_seeds() -> list[bytes]:
    """The configurations of released models, and a small one with everything said."""
    found = [dict(model_cfg=config) for config in open_clip_config.RELEASED.values()]
    preprocess = dict(mean=[0.5, 0.5, 0.5], std=[0.2, 0.3, 0.4], interpolation="bicubic",
                      resize_mode="shortest")  # fmt: skip
    found.append(dict(found[0], preprocess_cfg=preprocess))
    return [json.dumps(one).encode() for one in found]


def read_open_clip(path: pathlib.Path) -> str:
    """open_clip_config.json to the configuration of an export and the arrays that it has."""
    tensors: dict[str, np.ndarray] = {}
    config = convert._config(*convert._model_config("weights", str(path), tensors))
    model = read(Model, config["model"], f"{path}: model")
    layout = Layout(model)
    return f"model: {json.dumps(config, sort_keys=True)} {sum(map(len, layout.tensors()))}"


def damage_json(rng: random.Random, seed: bytes) -> bytes:
    """Another JSON value, or bytes that are none."""
    return mutate.text_of(rng, mutate.tree(rng, json.loads(seed)))


def export_seeds() -> list[bytes]:
    """The configuration of an export folder."""
    model = open_clip_config.to_model(next(iter(open_clip_config.RELEASED.values())), {})
    numbers = dict(mean=[0.5] * 3, std=[0.5] * 3)
    return [
        json.dumps(
            dict(
                model=model,
                preprocess=dict(resize="crop", **numbers),
                tokenizer=dict(kind="clip_bpe", file="vocabulary.bpe.gz"),
            )
        ).encode()
    ]


def read_export(path: pathlib.Path) -> str:
    """An export folder whose configuration is the input: its arrays and the tokenizer's place."""
    folder = path.with_name("export")
    folder.mkdir(exist_ok=True)
    (folder / export_format.PARAMS).write_bytes(safetensors_seeds()[0])
    (folder / export_format.CONFIG).write_bytes(path.read_bytes())
    params, config = export_format.read_export(folder)
    words = export_format.vocabulary_path(folder)
    if pathlib.Path(words).parent != folder:
        raise AssertionError(f"a tokenizer outside the folder: {words}")
    return f"export: {sorted(params)} {words} {config}"


KINDS = {
    "safetensors": Kind(safetensors_seeds, damage_safetensors, read_safetensors),
    "torch": Kind(torch_seeds, damage_torch, read_torch),
    "tokenizers": Kind(tokenizer_seeds, damage_tokenizer, read_tokenizer, 700),
    "open_clip": Kind(open_clip_seeds, damage_json, read_open_clip),
    "exports": Kind(export_seeds, damage_json, read_export),
}
