"""The paper's CoCa in PyTorch, for weights that coca_jax trained: inference, one file, no JAX.

    coca-jax export --checkpoint=runs/mine --out=exported

    model = CoCa.load("exported")
    image, tokens = model.encode_image(pixels)      # pixels float32 [B, S, S, 3] in 0 to 255
    text = model.encode_text(ids, valid)            # ids int64 [B, L], valid bool [B, L]
    logits = model.caption_logits(ids, tokens)      # float32 [B, L, V]; position t predicts t + 1

It knows the paper's layout: plain patches, one MLP a block, cascade or parallel poolers. Anything
else is refused by name. Needs torch and safetensors.
"""

import json
import os

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

PLAIN = {  # what this file computes
    "image": dict(
        conv_widths=[], class_token=False, pre_norm=False, final_norm=True, registers=0, block={}
    ),
    "text": dict(cls_mask="exact", cross="paper", kv_heads=0, block={}, multimodal_block={}),
    "pooler": dict(block={}),
}
BLOCK = dict(
    norm="layer", norm_eps=1e-5, bias=True, gated_mlp=False, layer_scale=0.0, positions="learned"
)
ACTIVATIONS = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_exact": F.gelu,
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
}


class CoCa:
    """config: config.json of an export; weights: its flat dict of float32 arrays."""

    def __init__(self, config: dict, weights: dict[str, torch.Tensor]):
        self.model, self.weights = config["model"], weights
        for part, wanted in PLAIN.items():
            for name, value in wanted.items():
                if self.model[part].get(name, value) != value:
                    raise ValueError(f"model.{part}.{name}={self.model[part][name]!r}: not here")
        for name, value in BLOCK.items():
            if self.model.get(name, value) != value:
                raise ValueError(f"model.{name}={self.model[name]!r}: not here")
        if self.model["pooler"]["kind"] == "open_clip" or self.model.get("qk_norm"):
            raise ValueError("this is open_clip's layout, or has QK-norm: not here")
        if not isinstance(self.model["patch_size"], int):
            raise ValueError(f"model.patch_size={self.model['patch_size']}: no square: not here")
        if frames := config.get("preprocess", {}).get("num_frames"):
            raise ValueError(f"preprocess.num_frames={frames}, a model of clips: not here")
        self.activation = ACTIVATIONS[self.model["activation"]]

    @classmethod
    def load(cls, folder: str) -> "CoCa":
        with open(os.path.join(folder, "config.json")) as file:
            return cls(json.load(file), load_file(os.path.join(folder, "params.safetensors")))

    def norm(self, x: torch.Tensor, name: str, layer: int | None = None) -> torch.Tensor:
        scale, bias = self.get(f"{name}/scale", layer), self.get(f"{name}/bias", layer)
        return F.layer_norm(x, x.shape[-1:], scale, bias, 1e-5)

    def get(self, name: str, layer: int | None = None) -> torch.Tensor:
        """A parameter; of the layer of a stack, whose first axis runs over layers."""
        return self.weights[name] if layer is None else self.weights[name][layer]

    def linear(self, x: torch.Tensor, name: str, layer: int | None = None) -> torch.Tensor:
        """x [..., W] by the kernel [W, ...] and its bias, if any, flat: [..., D]."""
        kernel = self.get(f"{name}/kernel", layer).reshape(x.shape[-1], -1)
        bias = self.weights.get(f"{name}/bias")
        bias = bias if bias is None or layer is None else bias[layer]
        return F.linear(x, kernel.T, None if bias is None else bias.reshape(-1))

    def attention(self, x, context, name, heads, layer=None, mask=None) -> torch.Tensor:
        """x [B, N, D] attends to context [B, M, W]; mask: bool, True where it may look."""
        split = lambda y: y.unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731
        query = split(self.linear(x, f"{name}/query", layer))
        key, value = (split(self.linear(context, f"{name}/{n}", layer)) for n in ("key", "value"))
        found = F.scaled_dot_product_attention(query, key, value, mask)
        return self.linear(found.transpose(1, 2).flatten(2), f"{name}/out", layer)

    def stack(self, x, name, heads, mask=None, context=None, cross_heads=None) -> torch.Tensor:
        """The blocks of a tower; with `context` also cross-attention to it."""
        name += "/layers"
        for i in range(len(self.weights[f"{name}/attention_norm/scale"])):
            normal = self.norm(x, f"{name}/attention_norm", i)
            x = x + self.attention(normal, normal, f"{name}/attention", heads, i, mask)
            if context is not None:
                normal = self.norm(x, f"{name}/cross_norm", i)
                x = x + self.attention(normal, context, f"{name}/cross_attention", heads, i)
            hidden = self.linear(self.norm(x, f"{name}/mlp_norm", i), f"{name}/mlp/in", i)
            x = x + self.linear(self.activation(hidden), f"{name}/mlp/out", i)
        return x

    def pooler(self, tokens: torch.Tensor, name: str) -> torch.Tensor:
        """tokens [B, N, W] -> [B, Q, D]."""
        query = self.norm(self.get(f"{name}/query/value"), f"{name}/query_norm")
        query = query.expand(len(tokens), -1, -1)
        tokens = self.norm(tokens, f"{name}/token_norm")
        return self.attention(query, tokens, f"{name}/attention", self.model["pooler"]["num_heads"])

    def encode_image(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """pixels float32 [B, S, S, 3] in 0 to 255 -> (embedding [B, E], image tokens [B, Q, D])."""
        size, image = self.model["patch_size"], self.model["image"]
        mean, std = (torch.tensor(self.model[f"image_{n}"]) * 255 for n in ("mean", "std"))
        x = (
            ((pixels - mean) / std).unfold(1, size, size).unfold(2, size, size)
        )  # [B, G, G, 3, P, P]
        x = x.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)
        x = self.linear(x, "image_encoder/patch_embedding") + self.get(
            "image_encoder/positions/value"
        )
        x = self.stack(x, "image_encoder/blocks", image["num_heads"])
        x = self.norm(x, "image_encoder/final_norm")
        tokens = self.pooler(x, "generative_pooler")
        source = tokens if self.model["pooler"]["kind"] == "cascade" else x
        pooled = self.pooler(source, "contrastive_pooler")[:, 0]
        if self.model["pooler"].get("project", True):
            pooled = self.linear(pooled, "image_to_joint")
        return F.normalize(pooled, dim=-1), tokens

    def text_states(self, ids: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """The unimodal half: [B, L + 1, D], [CLS] last; it sees valid tokens, no token sees it."""
        length = ids.shape[1]
        positions = self.get("text_decoder/positions/value")
        x = self.get("text_decoder/token_embedding/value")[ids] + positions[:length]
        cls = self.get("text_decoder/cls/value") + positions[-1]
        x = torch.cat([x, cls.expand(len(x), 1, -1)], 1)
        keys = F.pad(valid, (0, 1), value=True)[:, None, None]
        mask = keys & torch.ones(length + 1, length + 1, dtype=torch.bool).tril()
        return self.stack(x, "text_decoder/unimodal", self.model["text"]["num_heads"], mask)

    def encode_text(self, ids: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """ids int64 [B, L] from the begin symbol on, valid bool [B, L] -> embedding [B, E]."""
        cls = self.norm(self.text_states(ids, valid)[:, -1], "text_decoder/unimodal_norm")
        return F.normalize(self.linear(cls, "text_to_joint"), dim=-1)

    def caption_logits(self, ids: torch.Tensor, image_tokens: torch.Tensor) -> torch.Tensor:
        """ids int64 [B, L], image tokens [B, Q, D] -> logits float32 [B, L, V]."""
        text = self.model["text"]
        x = self.text_states(ids, torch.ones_like(ids, dtype=torch.bool))[:, :-1]
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        heads = text.get("multimodal_heads") or text["num_heads"]
        x = self.stack(x, "text_decoder/multimodal", heads, mask, image_tokens)
        x = self.norm(x, "text_decoder/multimodal_norm")
        if text["tie_embeddings"]:
            return x @ self.get("text_decoder/token_embedding/value").T
        logits = x @ self.get("text_decoder/head/kernel/value")
        return logits + self.weights.get("text_decoder/head/bias/value", 0.0)
