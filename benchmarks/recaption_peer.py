"""open_clip's coca_ViT-B-32 with random weights: its `generate` over a tar, or the weights alone.

    python benchmarks/recaption_peer.py weights FOLDER
    python benchmarks/recaption_peer.py generate TAR --dtype=bfloat16 --count=32

The first writes a folder as open_clip publishes it. The second captions pictures of a webdataset
tar greedily, 29 tokens each, in batches of 32, after two pictures that are not counted, and prints
a line of JSON with pictures a second. Needs the extra 'parity'.
"""

from __future__ import annotations

import argparse
import io
import json
import pathlib
import tarfile
import time
from typing import Any

import open_clip
import torch
from PIL import Image

BATCH, LENGTH = 32, 30


def built(name: str = "coca_ViT-B-32") -> tuple[Any, Any]:
    """(model, its preprocessing), every parameter drawn: some are left as memory was found."""
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02, generator=generator)
    return model.eval(), preprocess


def generate(file: str, dtype: str, count: int) -> dict[str, float]:
    """Pictures a second, preprocessing included."""
    model, preprocess = built()
    model = model.to(getattr(torch, dtype))
    with tarfile.open(file) as archive:
        names = [name for name in archive.getnames() if name.endswith(".jpg")][:count]
        data = [archive.extractfile(name).read() for name in names]

    def batch(some: list[bytes]) -> None:
        pictures = [preprocess(Image.open(io.BytesIO(one))) for one in some]
        images = torch.stack(pictures).to(getattr(torch, dtype))
        model.generate(images, seq_len=LENGTH, generation_type="top_k", top_k=1)

    with torch.inference_mode():
        batch(data[:2])
        start = time.perf_counter()
        for first in range(0, len(data), BATCH):
            batch(data[first : first + BATCH])
    seconds = time.perf_counter() - start
    return dict(rate=len(data) / seconds, seconds=seconds)


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("act", choices=("weights", "generate"))
    parser.add_argument("place")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--count", type=int, default=BATCH)
    given = parser.parse_args()
    if given.act == "weights":
        folder = pathlib.Path(given.place)
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        about = dict(model_cfg=open_clip.get_model_config("coca_ViT-B-32"))
        (folder / "open_clip_config.json").write_text(json.dumps(about))
        torch.save(built()[0].state_dict(), folder / "open_clip_pytorch_model.bin")
        print(json.dumps(dict(folder=given.place)))
    else:
        print(json.dumps(generate(given.place, given.dtype, given.count)))


if __name__ == "__main__":
    main()
