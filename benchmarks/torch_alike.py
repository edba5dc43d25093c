"""The paper's model in PyTorch, layer for layer as `coca_jax.models` has it, and its train step.

For times beside ours (alike.py) of the same work: convolutional stem, encoder, both poolers in
cascade, both halves of the decoder, both losses, Muon. Names are those of our parameters, so that
weights go over (tests/test_alike.py). Written as PyTorch's users write it: images with channels
last, attention by `scaled_dot_product_attention`, a ReLU's factors in the kernel behind it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from coca_jax.config import Config, Model
from coca_jax.models.image_encoder import RESIDUAL_GAIN, unit_activation
from coca_jax.training.optimizer import (
    MUON_ITERATIONS,
    MUON_MOMENTUM,
    MUON_RMS,
    learning_rate,
    make_schedule,
)

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024


class Standardised(nn.Module):
    """3 x 3 convolution with a standardised kernel, see coca_jax.models.image_encoder.Convolution; variance:
    of its input, which goes through a ReLU first; None: as it is."""

    def __init__(
        self, channels: int, features: int, stride: int, variance: float | None, gain: float = 1.0
    ):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(features, channels, 3, 3) * (9 * channels) ** -0.5)
        self.gain = nn.Parameter(torch.full((features,), gain))
        self.bias = nn.Parameter(torch.zeros(features))
        self.stride, self.factor = stride, None if variance is None else rectified(variance)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = self.kernel - self.kernel.mean((1, 2, 3), keepdim=True)
        gain = self.gain * torch.rsqrt(kernel.square().sum((1, 2, 3)) + 1e-6)
        if self.factor is not None:
            x, gain = x.relu(), gain * self.factor
        return F.conv2d(x, kernel * gain[:, None, None, None], self.bias, self.stride, 1)


def rectified(variance: float) -> float:
    """What max(x, 0) of numbers x of a variance is multiplied by to have a variance of 1."""
    before = unit_activation("relu", variance)
    return before.scale * before.gain


class Residual(nn.Module):
    """Two convolutions of `width` channels beside the input, whose variance is given."""

    def __init__(self, width: int, variance: float):
        super().__init__()
        second = Standardised(width, width, 1, 1.0, RESIDUAL_GAIN)
        self.part = nn.ModuleDict({"in": Standardised(width, width, 1, variance), "out": second})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = x + self.part["out"](self.part["in"](x))
        return found


class Stem(nn.Module):
    """[B, 3, S, S] -> [B, C, S / 2^stages, S / 2^stages]."""

    def __init__(self, widths: tuple[int, ...], depths: tuple[int, ...]):
        super().__init__()
        channels, variance = 3, None
        layers: list[nn.Module] = []
        self.names: list[str] = []  # of ours
        for stage, (width, depth) in enumerate(zip(widths, depths)):
            layers.append(Standardised(channels, width, 2, variance))
            self.names.append(f"down{stage}")
            channels, variance = width, 1.0
            for block in range(depth):
                layers.append(Residual(width, variance))
                self.names.append(f"block{stage}_{block}")
                variance += RESIDUAL_GAIN**2
        assert variance is not None
        self.layers, self.factor = nn.Sequential(*layers), rectified(variance)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layers(x).relu() * self.factor
        return found


class Attention(nn.Module):
    """x [B or 1, N, D] attends to context [B, M, W], or to itself."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        context = x if context is None else context
        query, key, value = self.query(x), self.key(context), self.value(context)
        query = query.expand(len(context), -1, -1)  # a pooler's is the same for all images
        query, key, value = (
            a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in (query, key, value)
        )
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        out: torch.Tensor = self.out(found.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Pre-norm block; cross: with attention to the image between its two parts."""

    def __init__(self, width: int, heads: int, hidden: int, cross: bool = False):
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        if cross:
            self.cross_norm, self.cross_attention = nn.LayerNorm(width), Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        both = {"in": nn.Linear(width, hidden), "out": nn.Linear(hidden, width)}
        self.cross, self.mlp = cross, nn.ModuleDict(both)

    def forward(
        self,
        x: torch.Tensor,
        image: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), mask=mask, causal=causal)
        if self.cross:
            x = x + self.cross_attention(self.cross_norm(x), image)
        found: torch.Tensor = x + self.mlp["out"](self.mlp["in"](self.mlp_norm(x)).relu())
        return found


class Pooler(nn.Module):
    """tokens [B, N, D] -> [B, Q, D]."""

    def __init__(self, queries: int, width: int, heads: int):
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.query_norm, self.token_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query = self.query_norm(self.query)[None]
        found: torch.Tensor = self.attention(query, self.token_norm(tokens))
        return found


class Alike(nn.Module):
    """The model of a config. Raises ValueError for one that is not of this kind."""

    def __init__(self, model: Model):
        super().__init__()
        image, text, pooler = model.image, model.text, model.pooler
        if not (model.activation == "relu" and image.conv_widths and pooler.kind == "cascade"):
            raise ValueError(
                "PyTorch's twin has a convolutional stem, ReLU and two poolers in cascade; "
                "choose --config=emoji"
            )
        self.model, tokens = model, (model.image_size // model.patch_size) ** 2
        self.stem = Stem(image.conv_widths, image.conv_depths)
        self.patch_embedding = nn.Linear(image.conv_widths[-1], image.width)
        self.image_positions = nn.Parameter(torch.randn(tokens, image.width) * 0.02)
        sizes = image.width, image.num_heads, image.mlp_dim
        self.image_blocks = nn.ModuleList(Block(*sizes) for _ in range(image.depth))
        self.final_norm = nn.LayerNorm(image.width)
        self.generative_pooler = Pooler(pooler.num_queries, text.width, pooler.num_heads)
        self.contrastive_pooler = Pooler(1, text.width, pooler.num_heads)
        self.image_to_joint = nn.Linear(text.width, model.embed_dim, bias=False)
        self.text_to_joint = nn.Linear(text.width, model.embed_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(1 / model.temperature).log())
        self.token_embedding = nn.Parameter(torch.randn(text.vocab_size, text.width) * 0.02)
        self.text_positions = nn.Parameter(torch.randn(text.max_len + 1, text.width) * 0.02)
        self.cls = nn.Parameter(torch.randn(text.width) * 0.02)
        sizes = text.width, text.num_heads, text.mlp_dim
        self.unimodal = nn.ModuleList(Block(*sizes) for _ in range(text.unimodal_depth))
        self.multimodal = nn.ModuleList(Block(*sizes, True) for _ in range(text.multimodal_depth))
        self.unimodal_norm = nn.LayerNorm(text.width)
        self.multimodal_norm = nn.LayerNorm(text.width)
        self.head = nn.Linear(text.width, text.vocab_size)
        self.to(memory_format=torch.channels_last)

    def forward(
        self, pixels: torch.Tensor, tokens: torch.Tensor, valid: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """pixels float [B, 3, S, S], tokens int64 and valid bool [B, L] -> (embeddings of images
        and of texts [B, E], logits of the token behind each but the last, [B, L - 1, V])."""
        x = self.patch_embedding(self.stem(pixels).flatten(2).transpose(1, 2))
        x = x + self.image_positions
        for block in self.image_blocks:
            x = block(x)
        image = self.generative_pooler(self.final_norm(x))
        pooled = self.image_to_joint(self.contrastive_pooler(image)[:, 0])
        length = tokens.shape[1]
        x = F.embedding(tokens, self.token_embedding) + self.text_positions[:length]
        last = (self.cls + self.text_positions[-1]).expand(len(x), 1, -1)
        x = torch.cat([x, last], 1)
        seen = F.pad(valid, (0, 1), value=True)[:, None, None, :]
        mask = seen & torch.ones(length + 1, length + 1, dtype=torch.bool).tril()
        for block in self.unimodal:
            x = block(x, mask=mask)
        words = self.text_to_joint(self.unimodal_norm(x[:, -1]))
        x = x[:, :-1]
        for block in self.multimodal:
            x = block(x, image, causal=True)
        logits = self.head(self.multimodal_norm(x)[:, :-1])
        return F.normalize(pooled, dim=-1), F.normalize(words, dim=-1), logits


def normalised(pixels: np.ndarray, model: Model) -> torch.Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S], channels last in memory."""
    mean, std = (torch.tensor(x) * 255 for x in (model.image_mean, model.image_std))
    return ((torch.from_numpy(pixels) - mean) / std).permute(0, 3, 1, 2)


def rounded(config: Config) -> torch.autocast:
    """Where the config computes in bfloat16, PyTorch's products do so too, by its autocast."""
    return torch.autocast("cpu", torch.bfloat16, enabled=config.model.dtype == "bfloat16")


def loss_of(twin: Alike, config: Config, batch: dict[str, np.ndarray]) -> torch.Tensor:
    """Both losses of a batch, weighted: equal texts are positives, the captions' is the mean over
    their tokens."""
    tokens, valid = torch.from_numpy(batch["tokens"]).long(), torch.from_numpy(batch["text_valid"])
    pixels = normalised(batch["image"], config.model)
    with rounded(config):
        found = twin(pixels, tokens, valid)
    image, text, logits = (part.float() for part in found)
    ids = torch.from_numpy(batch["text_id"])
    same = (ids[:, None] == ids[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    scores = twin.log_scale.exp() * image @ text.T
    pairs = F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)
    wanted = tokens.where(valid, -1)[:, 1:]
    words = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-1)
    contrastive = config.loss.contrastive_weight * (0.5 if config.loss.reduction == "mean" else 1)
    loss: torch.Tensor = contrastive * pairs + config.loss.captioning_weight * words
    return loss


class Muon:
    """Muon in float32 as training/optimizer.py has it, over matrices and convolutions' kernels."""

    def __init__(self, kernels: list[nn.Parameter], decay: float):
        self.kernels, self.decay = kernels, decay
        self.momenta = [torch.zeros_like(p) for p in kernels]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        gradients = [p.grad for p in self.kernels if p.grad is not None]
        torch._foreach_lerp_(self.momenta, gradients, 1 - MUON_MOMENTUM)
        ahead = torch._foreach_lerp(gradients, self.momenta, MUON_MOMENTUM)
        torch._foreach_mul_(self.kernels, 1 - rate * self.decay)
        for kernel, update in zip(self.kernels, ahead):
            matrix = orthogonal(update.flatten(1)).view_as(update)
            side = max(len(kernel), kernel[0].numel())
            kernel.add_(matrix, alpha=-rate * MUON_RMS * side**0.5)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """[N, M] -> about the nearest matrix with singular values of 1."""
    x = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-8)
    a, b, c = NEWTON_SCHULZ
    for _ in range(MUON_ITERATIONS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if len(matrix) > matrix.shape[1] else x


def stepper(config: Config) -> tuple[Alike, Callable[[dict[str, np.ndarray]], float]]:
    """(the model, a function that takes one step on a batch and gives its loss): Muon for kernels,
    AdamW for the rest, with the config's constants. Raises ValueError for another optimizer."""
    options = config.optimizer
    if options.name != "muon":
        raise ValueError(f"PyTorch's twin trains with Muon but optimizer.name={options.name!r}")
    twin = Alike(config.model).train()
    inner = [m for m in twin.modules() if isinstance(m, nn.Linear) and m is not twin.head]
    kernels = [m.weight for m in inner]
    kernels += [m.kernel for m in twin.modules() if isinstance(m, Standardised)]
    own = {id(p) for p in kernels}
    rest = [p for p in twin.parameters() if id(p) not in own]
    groups = [
        dict(params=[p for p in rest if p.ndim > 1], weight_decay=options.weight_decay),
        dict(params=[p for p in rest if p.ndim < 2], weight_decay=0.0),
    ]
    betas = (options.beta1, options.beta2)
    adam = torch.optim.AdamW(groups, betas=betas, fused=True)
    projections = [twin.image_to_joint.weight, twin.text_to_joint.weight]
    joint = {id(p) for p in projections}
    others = [p for p in kernels if id(p) not in joint]
    muons = [
        (Muon(others, options.weight_decay), 1.0),
        (Muon(projections, options.weight_decay), options.projection_rate),
    ]
    schedule = make_schedule(options, config.steps)
    rates = np.asarray(learning_rate(options.schedule, schedule, jnp.arange(config.steps)))
    taken = 0

    def step(batch: dict[str, np.ndarray]) -> float:
        nonlocal taken
        adam.zero_grad()
        for kernel in kernels:
            kernel.grad = None
        loss = loss_of(twin, config, batch)
        loss.backward()
        if options.clip_norm:
            nn.utils.clip_grad_norm_(twin.parameters(), options.clip_norm)
        rate = float(rates[taken])
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        with rounded(config):
            for muon, share in muons:
                muon.step(rate * share)
        taken += 1
        return loss.item()

    return twin, step
