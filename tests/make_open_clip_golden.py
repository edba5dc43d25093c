"""Writes tests/golden/open_clip.npz, what open_clip 3.3.0 and torchvision compute, and tiny.pt,
a training checkpoint as torch.save writes it.

    pip install -e '.[parity]' && python tests/make_open_clip_golden.py

The inputs are drawn from seeds (open_clip_cases.py), so only outputs are kept.
"""

from __future__ import annotations

import pathlib
import tempfile

import numpy as np
import open_clip_cases as cases
import open_clip_oracle as oracle
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import image_transform
from PIL import Image

from coca_jax.data import images

IMAGE_SIZE, IMAGES, TEXT_LENGTH = 24, 32, 20
PATH = pathlib.Path(__file__).parent / "golden/open_clip.npz"


def model_outputs() -> dict[str, np.ndarray]:
    config = cases.SMALL
    model = oracle.build(config)
    length, vocab = (config["text_cfg"][key] for key in ("context_length", "vocab_size"))
    tokens = cases.captions(vocab, length)
    pixels = cases.pixels(len(tokens), config["vision_cfg"]["image_size"])
    outputs = oracle.run(model, pixels, tokens)
    exact = oracle.build(config, torch.float64)
    losses, gradients = zip(*oracle.losses(exact, pixels, tokens))
    keys = sorted(gradients[0])
    digests = [[cases.digest(key, by_loss[key]) for key in keys] for by_loss in gradients]
    return dict(
        image_embedding=outputs["image_features"],
        text_embedding=outputs["text_features"],
        logits=outputs["logits"][tokens[:, 1:] != 0],
        losses=np.asarray(losses),  # these and the gradients in float64
        gradient_keys=np.asarray(keys),
        gradients=np.asarray(digests),  # [loss, tensor, (norm, product)]
        greedy=oracle.greedy(model, pixels, length, [vocab - 2], vocab - 1),
    )


def tokenizer_outputs() -> np.ndarray:
    with tempfile.NamedTemporaryFile(suffix=".gz") as file:
        file.write(cases.small_merges())
        file.flush()
        return SimpleTokenizer(file.name)(cases.TEXTS, TEXT_LENGTH).numpy()


def preprocessing_outputs() -> np.ndarray:
    resize = image_transform(IMAGE_SIZE, is_train=False)
    resize.transforms = resize.transforms[:2]
    decoded = [Image.fromarray(images.decode(image)) for image in cases.odd_images(IMAGES)]
    return np.stack([np.asarray(resize(image)) for image in decoded])


def save_tiny_checkpoint(path: pathlib.Path) -> None:
    """Every dtype and storage layout that a state dict may have; see test_torch_file.py."""
    base = torch.arange(24, dtype=torch.float32)
    state = {
        "module.plain": base.reshape(4, 6),
        "module.transposed": base.reshape(4, 6).T,
        "module.tail": base[20:],
        "module.parameter": torch.nn.Parameter(base[:3].clone()),
        "module.half": base[:5].half(),
        "module.bfloat16": base[:5].bfloat16(),
        "module.double": base[:5].double(),
        "module.integers": base[:5].long(),
        "module.scalar": torch.tensor(2.5),
        "module.empty": torch.zeros(0, 3),
    }
    optimizer = {"state": {0: {"exp_avg": base}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": optimizer}, path)


if __name__ == "__main__":
    np.savez_compressed(
        PATH, **model_outputs(), tokens=tokenizer_outputs(), pixels=preprocessing_outputs()
    )
    save_tiny_checkpoint(PATH.parent / "tiny.pt")
    print(f"wrote {PATH}: {PATH.stat().st_size} bytes")
