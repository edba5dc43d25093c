"""open_clip (PyTorch) at the same work and sizes, in the same session: `benchmark --peer`.

Needs `pip install '.[parity]'`. Random weights; the model's sizes come from the config, which
must be one that open_clip can express.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from coca_jax.interop import open_clip_config

END = 1  # the token that would end a caption; kept away by min_seq_len


def build(model: ConfigDict) -> Any:
    """open_clip's CoCa of these sizes, float32, in evaluation mode.

    Every parameter is drawn again: open_clip leaves some as the memory was found, NaN included.

    Raises ValueError when open_clip is not installed or has no such model, and for a model in
    bfloat16, which would be no like for like.
    """
    if model.dtype != "float32":
        raise ValueError(
            f"--peer runs in float32 but model.dtype={model.dtype!r}; "
            "add --config.model.dtype=float32"
        )
    try:
        import torch
        from open_clip.coca_model import CoCa
    except ImportError as error:
        raise ValueError("--peer needs open_clip: pip install '.[parity]'") from error
    config = open_clip_config.from_model(model)
    peer = CoCa(**{k: v for k, v in config.items() if k != "custom_text"})
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
