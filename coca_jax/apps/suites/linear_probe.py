"""CLIP_benchmark's linear probe: a layer over normalised embeddings, trained by AdamW.

The same steps in the same order as its `metrics/linear_probe.py` (1.6), random numbers included, so
that the same features give the same accuracy; that one asks for a GPU, this one runs on the CPU.
Needs torch (the extra 'clip_benchmark'). evaluation/evaluators/probes.py has the probe by L-BFGS.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from coca_jax.runtime import extras

EPOCHS, RATE = 10, 0.1


def check() -> Any:
    """torch. Raises ValueError where it is missing: to be called before hours go into features."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"{error}: {extras.remedy('clip_benchmark')}") from None
    return torch


def guesses(
    train: np.ndarray,
    classes: np.ndarray,
    test: np.ndarray,
    *,
    batch_size: int = 64,
    epochs: int = EPOCHS,
    rate: float = RATE,
    seed: int = 0,
) -> np.ndarray:
    """The class of each test feature, int [M]; features float32 [N, E] and [M, E], unit length,
    classes int [N]. Raises ValueError as `check`."""
    torch = check()
    torch.manual_seed(seed)
    for _ in range(2):  # the loaders of both splits draw a seed each while features are made
        torch.empty((), dtype=torch.int64).random_()
    order = torch.randperm(len(train))
    x, y = torch.from_numpy(train)[order], torch.from_numpy(classes.astype(np.int64))[order]
    data = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(data, batch_size=batch_size, shuffle=True)
    layer = _trained(loader, int(classes.max()) + 1, epochs, rate, seed)
    with torch.no_grad():
        return layer(torch.from_numpy(test)).argmax(1).numpy()


def _trained(loader: Any, num_classes: int, epochs: int, rate: float, seed: int) -> Any:
    """A linear layer after `epochs` epochs, the learning rate along a cosine."""
    import torch

    torch.manual_seed(seed)
    layer = torch.nn.Linear(loader.dataset.tensors[0].shape[1], num_classes)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=rate, weight_decay=0)
    steps = epochs * len(loader)
    for epoch in range(epochs):
        for i, (x, y) in enumerate(loader):
            step = i + epoch * len(loader)
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * (1 + math.cos(math.pi * step / steps)) * rate
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(x), y).backward()
            optimizer.step()
    return layer
