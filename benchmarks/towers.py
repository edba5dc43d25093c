"""How far image and text towers are from the library that they come from, at published sizes.

    python benchmarks/towers.py ViT-B-32-quickgelu

Every tensor is drawn at random; prints how many tensors and parameters there are, the largest
difference of embeddings of unit length on a CPU in float32 (of two images, of three texts), and how
far the embeddings of two images, and of two texts, are apart. Needs the extra 'parity'.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np

TEXTS = ["a photo of a cat", "two dogs in a park", "it"]
IMAGENET = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
# Not among open_clip's configurations; as its authors publish it.
OPENVISION = {
    "openvision-vit-base-patch16-224": dict(
        embed_dim=512,
        vision_cfg=dict(
            image_size=224,
            layers=12,
            width=768,
            patch_size=16,
            no_ln_pre=True,
            pool_type="avg",
            final_ln_after_pool=True,
            norm_kwargs=dict(eps=1e-6),
        ),
        text_cfg=dict(
            context_length=80,
            vocab_size=32000,
            tokenizer_kwargs=dict(strip_sep_token=True),
            width=512,
            heads=8,
            layers=12,
            pool_type="last",
            no_causal_mask=True,
            act_kwargs=dict(approximate="tanh"),
            norm_kwargs=dict(eps=1e-6),
        ),
    )
}


def configuration(name: str) -> dict[str, Any]:
    """open_clip's `model_cfg` of a model."""
    import open_clip

    if name in OPENVISION:
        return OPENVISION[name]
    folder = pathlib.Path(open_clip.__file__).parent / "model_configs"
    return json.loads((folder / f"{name}.json").read_text())


def drawn(cfg: dict[str, Any]) -> Any:
    """The model of open_clip with every tensor at random: a part left out would show."""
    import open_clip
    import torch

    given = {key: value for key, value in cfg.items() if key != "custom_text"}
    torch.manual_seed(0)
    made = open_clip.CustomTextCLIP if cfg.get("custom_text") else open_clip.CLIP
    model = made(**json.loads(json.dumps(given)))
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "logit" not in name:
                share = x[0].numel() ** -0.5 if x.ndim > 1 else 0.1
                x.add_(share * torch.randn(x.shape))
    return model.eval()


def write_words(folder: pathlib.Path, cfg: dict[str, Any]) -> None:
    """A tokenizer beside the weights, where the model does not have CLIP's own."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<pad>", "</s>", *" ".join(TEXTS).split()]
    if cfg["text_cfg"].get("vocab_size", 49408) != 49408:
        import tokenizers

        ids = {word: number for number, word in enumerate(dict.fromkeys(words))}
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        made.save(str(folder / "tokenizer.json"))


def measure(name: str) -> dict[str, float]:
    """The values of a model."""
    import torch

    import coca_jax
    from coca_jax.cli import convert
    from coca_jax.interop.open_clip_weights import count

    cfg = configuration(name)
    original = drawn(cfg)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        torch.save(original.state_dict(), folder / "open_clip_pytorch_model.bin")
        (folder / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=cfg)))
        write_words(folder, cfg)
        _, layout = convert.from_open_clip(scratch, str(folder / "out"))
        (folder / "open_clip_pytorch_model.bin").unlink()
        model = coca_jax.load(str(folder / "out"), batch_size=2)
        sizes = model.config.model
        shape = (2, sizes.image_size, sizes.image_size, 3)
        images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        pixels = (images / 255 - np.array(sizes.image_mean)) / np.array(sizes.image_std)
        tokens, _ = model._tokenize(TEXTS)
        whole = np.zeros((len(TEXTS), sizes.text.max_len), np.int64)
        whole[:, : tokens.shape[1]] = tokens
        with torch.no_grad():
            found = original.encode_image(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float())
            theirs = [unit(found), unit(original.encode_text(torch.from_numpy(whole)))]
        ours = [model.encode_image(images), model.encode_text(TEXTS)]
    off = [float(np.abs(a - b).max()) for a, b in zip(ours, theirs)]
    apart = [float(np.abs(b[0] - b[1]).max()) for b in theirs]
    named = dict(tensors=len(layout.tensors()), parameters=count(layout.parameters()))
    return named | dict(image=off[0], text=off[1], images_apart=apart[0], texts_apart=apart[1])


def unit(x: Any) -> np.ndarray:
    return (x / x.norm(dim=-1, keepdim=True)).numpy()


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
