"""open_clip (PyTorch) at the same work and sizes, in the same session: `benchmark --peer`.

Needs `pip install '.[parity]'`. Models have random weights; their sizes come from the config, which
must be one that open_clip can express. The input pipeline reads the same records.
"""

from __future__ import annotations

import io
import itertools
import tarfile
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from coca_jax.config import Config, Model
from coca_jax.data.records import Record
from coca_jax.image_shape import Size
from coca_jax.interop import open_clip_config

END = 1  # the token that would end a caption; kept away by min_seq_len


def import_torch(flag: str = "--peer") -> Any:
    """torch. Raises ValueError, naming the flag that asks, where open_clip is not installed."""
    try:
        import open_clip  # noqa: F401
        import torch
    except ImportError as error:
        raise ValueError(f"{flag} needs open_clip: pip install '.[parity]'") from error
    return torch


def tokens(texts: Sequence[str], length: int) -> np.ndarray:
    """Texts as open_clip's tokenizer gives them, int [B, length], 0 where there is nothing."""
    import_torch("--texts")
    import open_clip

    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=length)
    found: np.ndarray = tokenizer(list(texts)).numpy()
    return found


def trainer(config: Config) -> Callable[[np.ndarray, np.ndarray], float]:
    """A function that takes one step of open_clip's CoCa: (pixels uint8 [B, S, S, 3], tokens int
    [B, L], 0 where there is nothing) -> loss.

    Both losses with the config's weights, AdamW with its constants, its gradient clipping; in
    bfloat16 under autocast. Raises ValueError for another optimizer than AdamW, and for image
    tokens that are hidden from the decoder.
    """
    torch = import_torch()
    from open_clip.loss import CoCaLoss

    options = config.optimizer
    if options.name != "adamw":
        raise ValueError(
            f"--peer trains with AdamW but optimizer.name={options.name!r}; "
            "add --config.optimizer.name=adamw"
        )
    if hidden := config.model.pooler.token_dropout:
        raise ValueError(
            f"--peer: model.pooler.token_dropout={hidden} hides image tokens from the decoder; "
            "open_clip has no such option; add --config.model.pooler.token_dropout=0"
        )
    peer = build(config.model, training=True).train()
    rule = torch.optim.AdamW(
        peer.parameters(),
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        weight_decay=options.weight_decay,
    )
    loss = CoCaLoss(config.loss.captioning_weight, config.loss.contrastive_weight)
    narrow = config.model.dtype == "bfloat16"

    def step(pixels: np.ndarray, tokens: np.ndarray) -> float:
        rule.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            found = peer(_images(pixels), torch.from_numpy(tokens).long())
            values = {k: v for k, v in found.items() if k != "logit_bias"}
            total: Any = sum(loss(**values))
        total.backward()
        if options.clip_norm:
            torch.nn.utils.clip_grad_norm_(peer.parameters(), options.clip_norm)
        rule.step()
        return float(total.detach())

    return step


def build(model: Model, training: bool = False) -> Any:
    """open_clip's CoCa of these sizes, float32, in evaluation mode.

    Every parameter is drawn again: open_clip leaves some as the memory was found, NaN included.

    It computes on the CPU. Raises ValueError where JAX does not, when open_clip is not installed or
    has no such model, and for a model in bfloat16, which would be no like for like but in
    `training`, where autocast is theirs.
    """
    if jax.default_backend() != "cpu":
        raise ValueError(
            f"--peer runs open_clip on the CPU and JAX computes on a {jax.default_backend()}: give "
            "the command with JAX_PLATFORMS=cpu"
        )
    if model.dtype != "float32" and not training:
        raise ValueError(
            f"--peer runs in float32 but model.dtype={model.dtype!r}; "
            "add --config.model.dtype=float32"
        )
    torch = import_torch()
    from open_clip.coca_model import CoCa

    config = open_clip_config.from_model(model)
    try:
        peer = CoCa(**{k: v for k, v in config.items() if k != "custom_text"})
    except TypeError as error:  # a key that only other releases know, as correct_cls_mask
        raise ValueError(
            f"--peer: the installed open_clip has no such model ({error}); of correct_cls_mask: "
            "add --config.model.text.cls_mask=shifted"
        ) from error
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(std=0.02, generator=generator)
    return peer.eval()


def encode(peer: Any, pixels: np.ndarray) -> np.ndarray:
    """Pixels uint8 [B, S, S, 3] -> image embeddings float32 [B, E]."""
    import torch

    with torch.no_grad():
        return peer.encode_image(_images(pixels)).numpy()


def caption(peer: Any, pixels: np.ndarray, tokens: int, beams: int) -> np.ndarray:
    """Pixels uint8 [B, S, S, 3] -> ids int [B, 1 + tokens], greedy or by one group of beams."""
    import torch

    length = tokens + 1
    options: dict[str, Any] = dict(
        seq_len=length,
        min_seq_len=length - 1,
        eos_token_id=END,
        pad_token_id=0,
        sot_token_id=2,
        fixed_output_length=True,
    )
    if beams > 1:
        options |= dict(generation_type="beam_search", num_beams=beams, num_beam_groups=1)
    else:
        options |= dict(generation_type="top_k", top_k=1)
    with torch.no_grad():
        return peer.generate(_images(pixels), **options).numpy()


def _images(pixels: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)


def write_tar(records: Sequence[Record], path: str) -> None:
    """Writes records as the webdataset tar that `input_batches` reads, the first text of each."""
    with tarfile.open(path, "w") as archive:
        for number, record in enumerate(records):
            suffix = "png" if record.image.startswith(b"\x89PNG") else "jpg"
            text = (record.texts or record.labels or ("",))[0]
            for name, data in ((suffix, record.image), ("txt", text.encode())):
                info = tarfile.TarInfo(f"{number:06d}.{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def input_batches(tars: str, examples: int, batch_size: int, size: Size) -> Iterator[Any]:
    """open_clip's own training pipeline over webdataset tars, epoch after epoch, in this thread.

    Its shuffle buffers, its default augmentation (a bicubic crop of 90 to 100% of the area) and
    its CLIP tokenizer; images float32 [B, 3, S, S], as its model wants them.

    Raises ValueError when open_clip or webdataset is not installed, and for fewer examples than a
    batch, of which its pipeline, which leaves out rests, would never give one.
    """
    if examples < batch_size:
        raise ValueError(
            f"--peer reads {examples:,} records again and again, of which open_clip's pipeline "
            f"gives no batch of {batch_size:,}; add --config.batch_size={examples} or less"
        )
    try:
        import open_clip
        import torch
        from open_clip.transform import image_transform
        from open_clip_train.data import get_wds_dataset
    except ImportError as error:
        raise ValueError(f"--peer needs open_clip ({error}): pip install '.[parity]'") from error
    torch.set_num_threads(1)
    args = types.SimpleNamespace(
        train_data=tars,
        train_num_samples=examples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        workers=0,
        world_size=1,
        batch_size=batch_size,
        seed=0,
    )
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    found = get_wds_dataset(args, image_transform(size, True), True, tokenizer=tokenizer)
    for epoch in itertools.count():
        found.set_epoch(epoch)
        for images, texts in found.dataloader:
            yield images.numpy(), texts.numpy()
