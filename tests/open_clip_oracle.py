"""open_clip as the oracle: its outputs, losses, gradients and captions. Needs torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import open_clip_cases as cases
import torch
from open_clip.coca_model import CoCa
from open_clip.loss import CoCaLoss


def build(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> CoCa:
    """The model with every tensor drawn again."""
    parts = {k: v for k, v in config.items() if k not in ("custom_text", "init_logit_bias")}
    model = CoCa(**parts)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(torch.from_numpy(cases.redraw(name, tuple(tensor.shape))))
    return model.to(dtype).eval()


def run(model: CoCa, pixels: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Embeddings [B, E], image tokens [B, Q, D] and logits [B, L - 1, V], in the model's dtype."""
    dtype = next(model.parameters()).dtype
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).to(dtype)
    with torch.no_grad():
        outputs = model(images, torch.from_numpy(tokens))
        outputs["image_tokens"] = model._encode_image(images)[1]
    return {
        name: outputs[name].numpy()
        for name in ("image_features", "text_features", "logits", "image_tokens")
    }


def losses(
    model: CoCa, pixels: np.ndarray, tokens: np.ndarray
) -> Iterator[tuple[float, dict[str, np.ndarray]]]:
    """The contrastive, then the captioning loss, unweighted, each with its gradients, in the
    model's dtype; one after the other, for they are as large as the model.

    A tensor that a loss does not reach has a gradient of zeros.
    """
    dtype = next(model.parameters()).dtype
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).to(dtype)
    outputs = model(images, torch.from_numpy(tokens))
    values = CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=1.0)(
        outputs["image_features"],
        outputs["text_features"],
        outputs["logits"],
        outputs["labels"],
        outputs["logit_scale"],
    )
    names, tensors = zip(*model.named_parameters())
    for value in values:
        found = torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True)
        zeros = (torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors))
        yield value.item(), {name: g.numpy() for name, g in zip(names, zeros)}


def greedy(model: CoCa, pixels: np.ndarray, length: int, prompt: list[int], eos: int) -> np.ndarray:
    """Greedy captions int [B, length], prompt included, by running the whole model on each prefix;
    zeros after the end symbol."""
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        latent, embeddings = model._encode_image(images)
        text = torch.tensor([prompt] * len(pixels))
        ended = torch.zeros(len(pixels), dtype=torch.bool)
        while text.shape[1] < length:
            outputs = model(images, text, latent, embeddings, output_labels=False)
            chosen = torch.where(ended, 0, outputs["logits"][:, -1].argmax(-1))
            ended |= chosen == eos
            text = torch.cat([text, chosen[:, None]], dim=1)
    return text.numpy()


def generate(model: CoCa, pixels: np.ndarray, length: int, bos: int, eos: int) -> np.ndarray:
    """What the model's own `generate` writes when it takes the most probable token, int [B, T]."""
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    return model.generate(
        images,
        seq_len=length,
        min_seq_len=1,
        generation_type="top_k",
        top_k=1,
        sot_token_id=bos,
        eos_token_id=eos,
    ).numpy()
