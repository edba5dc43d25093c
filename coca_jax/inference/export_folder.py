"""A model as a folder: for `coca_jax.load`, and in the layout of the hub, with a card."""

from __future__ import annotations

import json
import os
import pathlib
import string
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from coca_jax.config import heads, shapes
from coca_jax.evaluation.metrics.intervals import COMPANIONS
from coca_jax.inference.model import CoCaModel
from coca_jax.interop import export_format, onnx_encoder
from coca_jax.interop.export_format import CARD, PREPROCESSOR
from coca_jax.interop.hub import push
from coca_jax.runtime import out_folder, storage

# How a card begins; behind it stands the CRC-32 of all but that line.
_WRITTEN = f"{out_folder.CARD}# CRC-32 as coca_jax wrote it: "
_SHOWN_CLASSES = 20  # of a task head, on a card
_SUFFIXES = {b"\x1f": ".bpe.gz", b"{": ".json"}  # by the first byte; else SentencePiece


def check(model: CoCaModel) -> None:
    """Raises ValueError for a model whose images are not square: exports are of squares."""
    if model.resize == "native":
        raise ValueError(
            "exports take square images, and this model was trained with data.resize='native'; "
            "use the run itself (coca_jax.load, caption, search), or train with 'squash'"
        )


def image_shape_of(model: CoCaModel) -> tuple[int, ...]:
    """Of one image as programs take it, (h, w, 3); of a model of clips (T, h, w, 3)."""
    frames = (model.num_frames,) if model.num_frames else ()
    return (*frames, *shapes.pair(model.image_size), 3)


def write(
    model: CoCaModel,
    folder: str,
    *,
    hub: bool = False,
    dtype: str = "",
    programs: Iterable[str] = (),
) -> None:
    """Writes an export folder, see export_format.py; hub: in the layout of the hub; dtype: that it
    will compute in, default: what the model does; programs: of this model, that are there already.

    Raises ValueError as `check`, and naming a parameter with values that are NaN or infinite; warns
    of weights that were rounded when they were loaded.
    """
    check(model)
    if any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(model.params)):
        logging.warning(
            "%s: the model's matrices were rounded to bfloat16 when it was loaded; "
            "load(..., narrow=False) keeps them as they were stored",
            folder,
        )
    sizes, words = model.config.model, model.vocabulary
    config: dict[str, Any] = dict(
        model=sizes.to_dict() | dict(dtype=dtype or sizes.dtype),
        preprocess=dict(
            resize=model.resize,
            mean=list(sizes.image_mean),
            std=list(sizes.image_std),
            num_frames=model.num_frames,
            label_token=model.config.data.label_token,
        ),
        tokenizer=dict(begin_id=words.bos_id, end_id=words.eos_id),  # for who runs the programs
    )
    if model.class_names:  # the task head's weights are there too; the programs leave it out
        config |= dict(head=model.config.head.to_dict(), class_names=model.class_names)
    if hub:
        # Not the family's own name: to other libraries 'clip' means weights in their layout.
        kind = ("coca", "CoCa") if model.writes_captions else ("two_towers", "TwoTowers")
        config |= dict(model_type=kind[0], architectures=[kind[1]])
    programs = [*programs, *onnx_encoder.add_file(folder, config["model"])]
    with tempfile.TemporaryDirectory() as scratch:
        suffix = _SUFFIXES.get(words.data[:1], ".model")
        path = os.path.join(scratch, f"vocabulary{suffix}")
        words.save(path)
        export_format.write_export(folder, model.params, config, path, hub=hub, programs=programs)
    if model.writes_captions:
        model.generation_config.save_pretrained(folder)


def write_hub(
    model: CoCaModel, out: str, name: str, scores: Mapping[str, float | None] | None = None
) -> dict[str, int]:
    """Writes the folder that `push_to_hub` uploads and `coca_jax.load` reads: config.json,
    model.safetensors, the tokenizer, preprocessor_config.json and the card README.md.

    name: 'org/name' on the hub, for the card. scores: of eval.json. Returns the files' sizes. A
    card that was edited stays, and a warning says so.
    Raises ValueError for a README.md there that is of something else.
    """
    there = storage.place(out) / CARD
    before = there.read_text() if there.exists() else None
    if before is not None and not before.startswith(out_folder.CARD):
        raise ValueError(
            f"{there} is of something else, and a model's card goes there; give a new folder, or "
            "move it away"
        )
    preprocessor = json.dumps(_preprocessor(model), indent=2)  # or it refuses, before it writes
    with storage.local_folder(out) as folder:
        if before is not None and before != _sealed(before):
            logging.warning("%s was edited and stays as it is; move it away for a new card", there)
        else:
            text = _sealed(card(model, name, scores or {}))
            storage.write_text(os.path.join(folder, CARD), text)
        storage.write_text(os.path.join(folder, PREPROCESSOR), preprocessor)
        write(model, folder, hub=True)
        return sizes(folder)


def _sealed(card: str) -> str:
    """A card with the checksum of what else it says; one that has it already, and was not edited,
    stays the same."""
    rest = card.removeprefix(out_folder.CARD)
    if card.startswith(_WRITTEN):
        rest = rest.partition("\n")[2]
    found = zlib.crc32(f"{out_folder.CARD}{rest}".encode())
    return f"{_WRITTEN}{found:08x}\n{rest}"


def push_to_hub(
    model: CoCaModel,
    name: str,
    *,
    scores: Mapping[str, float | None] | None = None,
    private: bool = False,
) -> str:
    """Writes the folder of `write_hub` to a temporary place and uploads it as 'org/name'.

    Returns the repository's URL. Raises as `interop.hub.push` does.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_hub(model, folder, name, scores)
        return push(folder, name, private=private)


def sizes(folder: str) -> dict[str, int]:
    """Bytes of every file of an export, by its path in it, sorted."""
    return {
        name: os.path.getsize(os.path.join(folder, name)) for name in export_format.files(folder)
    }


def card(model: CoCaModel, name: str, scores: Mapping[str, float | None]) -> str:
    """The model card, filled from the configuration and the scores of eval.json."""
    sizes, text = model.config.model, model.config.model.text
    high, wide = shapes.pair(sizes.image_size)
    count = sum(x.size for x in jax.tree.leaves(model.params))
    kind = type(model.vocabulary).__name__
    rows = "\n".join(_score_rows(scores))
    template = string.Template(pathlib.Path(__file__).with_name("model_card.md").read_text())
    return template.substitute(
        _words(model),
        name=name,
        title=name.rpartition("/")[2],
        parameters=f"{count:,}",
        image=f"{high} x {wide} pixels, patches of {shapes.words(sizes.patch_size)}",
        image_encoder=f"{sizes.image.depth} layers of width {sizes.image.width}",
        embed_dim=sizes.embed_dim,
        vocabulary=f"{kind}, {model.vocabulary.size:,} ids; texts of up to {text.max_len} tokens",
        head=_head(model),
        head_example=f"\nprint({model.head_kind.example})" if model.class_names else "",
        scores=f"| measure | value | 95% interval | examples |\n|---|---|---|---|\n{rows}"
        if rows
        else "None were stored with these weights.",
    )


def _words(model: CoCaModel) -> dict[str, str]:
    """What a card says of captioners and of towers each in its own words."""
    text = model.config.model.text
    if model.writes_captions:
        return dict(
            pipeline="image-to-text",
            tags="- coca\n- image-captioning\n- zero-shot-image-classification",
            about="A contrastive captioner (CoCa, [Yu et al. 2022](https://arxiv.org/abs/2205.01917"
            ")): it embeds images\nand texts in one space and writes captions.",
            example='print(model.caption(["cat.jpg"]))',
            text_part="text decoder",
            text_layers=f"{text.unimodal_depth} unimodal and {text.multimodal_depth} multimodal "
            f"layers of width {text.width}",
            use="What the model writes follows the texts that it was trained on, their mistakes "
            "and their slant\nincluded. Look at its captions of your own pictures before you rely "
            "on it.",
        )
    family = heads.tower_kind(model.config.model.family)
    return dict(
        pipeline="zero-shot-image-classification",
        tags=f"- {family.name}\n- feature-extraction",
        about=f"An image and a text tower, of the family {family.name} ({family.about}): they "
        "embed images and\ntexts in one space. There is no decoder, so they write no captions.",
        example='print(model.similarity(["cat.jpg"], ["a photo of a cat", "a photo of a dog"]))',
        text_part="text encoder",
        text_layers=f"{text.unimodal_depth} layers of width {text.width}",
        use="What the model finds follows the pictures and texts that it was trained on, their "
        "mistakes and their\nslant included. Look at what it finds among your own pictures before "
        "you rely on it.",
    )


def _head(model: CoCaModel) -> str:
    if not model.class_names:
        return "none"
    count, shown = len(model.class_names), model.class_names[:_SHOWN_CLASSES]
    names = ", ".join(" ".join(name.split()).replace("|", r"\|") for name in shown)
    more = f" and {count - len(shown)} more" if count > len(shown) else ""
    return f"of kind {model.head_kind.name!r}, {count} classes: {names}{more}"


def _score_rows(scores: Mapping[str, float | None]) -> list[str]:
    """A row a measure of eval.json, with its interval and count where it has them."""
    rows = []
    for key, value in sorted(scores.items()):
        if "/" not in key:  # the step of a run
            continue
        if value is None or key.endswith(COMPANIONS):
            continue
        low, high, count = (scores.get(f"{key}_{end}") for end in ("low", "high", "count"))
        interval = "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
        examples = "" if count is None else f"{count:,.0f}"
        form = ",.0f" if key.rpartition("/")[2].startswith("num_") else ".4f"  # of how many things
        rows.append(f"| {key} | {value:{form}} | {interval} | {examples} |")
    return rows


def _preprocessor(model: CoCaModel) -> dict[str, Any]:
    """How images are prepared, in the words of transformers' image processors."""
    if model.resize == "trim":
        raise ValueError(
            "data.resize='trim': transformers' image processors have no words for that; export "
            "without the hub's layout (coca-jax export)"
        )
    (high, wide), crop = shapes.pair(model.image_size), model.resize == "crop"
    size = dict(height=high, width=wide)
    if crop and high != wide:
        raise ValueError(
            f"model.image_size={model.image_size} with data.resize='crop': transformers' image "
            "processors have no words for that; export without the hub's layout (coca-jax export)"
        )
    return dict(
        do_convert_rgb=True,
        do_resize=True,
        size=dict(shortest_edge=high) if crop else size,
        resample=3 if crop else 2,  # bicubic, bilinear
        do_center_crop=crop,
        crop_size=size,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(model.config.model.image_mean),
        image_std=list(model.config.model.image_std),
    )
