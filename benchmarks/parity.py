"""How far a CoCa of open_clip's, converted, is from open_clip, every tensor drawn at random.

    python benchmarks/parity.py small
    python benchmarks/parity.py coca_ViT-B-32 --gradients
    python benchmarks/parity.py coca_ViT-L-14            # 12 GiB

Prints a line of JSON: the largest difference over the largest value of image embeddings, text
embeddings and logits at labels, in float32 and bfloat16 on a CPU; seconds of a core and memory
beside mapped files that `convert` takes. --gradients: of every tensor's gradient of the captioning
loss, over the tensor's largest value, against open_clip's in float64: ours in float32 and in
float64. Needs the extra 'parity'; the cases are those of tests/test_open_clip_parity.py.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import collections
import copy
import gc
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

import jax
import numpy as np
import open_clip_cases as cases
import open_clip_oracle as oracle
import torch
from conversion_cases import as_tensors, each_loss, forward, relative

from coca_jax.cli import convert
from coca_jax.config import Model
from coca_jax.interop import export_format, open_clip_config
from coca_jax.models import coca

CONFIGS = {"small": cases.SMALL} | open_clip_config.RELEASED
NAMES = ("image", "text", "logits")


def child_seconds() -> float:
    """Processor seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def converted(file: pathlib.Path, out: pathlib.Path) -> dict[str, float]:
    """Converts by the command, watched: seconds of a core, and the most memory of its own, MiB."""
    command = [sys.executable, "-m", "coca_jax", "convert", f"--input={file}", f"--out={out}"]
    before, most = child_seconds(), 0.0
    running = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, env={"JAX_PLATFORMS": "cpu"} | os.environ
    )
    while running.poll() is None:
        try:
            status = pathlib.Path(f"/proc/{running.pid}/status").read_text()
        except OSError:
            break
        own = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
        most = max(most, *(int(kib) / 1024 for kib in own), 0.0)
        time.sleep(0.05)
    if running.wait():
        raise SystemExit(f"convert ended with status {running.returncode}")
    return dict(convert_core_seconds=child_seconds() - before, convert_mib=most)


def outputs(model: Any, params: Any, pixels: np.ndarray, tokens: np.ndarray) -> list[np.ndarray]:
    """Image embeddings, text embeddings, logits at labels."""
    labels = tokens[:, 1:] != 0
    out = forward(model, params, pixels, tokens)
    logits = np.asarray(out.logits[:, :-1])[labels]
    return [np.asarray(out.image_embedding), np.asarray(out.text_embedding), logits]


def worst(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """Of all tensors, the largest difference over the tensor's largest value."""
    return max(
        float(np.abs(found[key] - tensor).max() / max(np.abs(tensor).max(), 1e-12))
        for key, tensor in wanted.items()
    )


def last(losses: Iterable[tuple[float, Any]]) -> Any:
    """The gradients of the last of several losses; as large as the model, so no other is kept."""
    return collections.deque(losses, maxlen=1)[0][1]


def gradients(
    theirs: Any, config: Model, params: Any, pixels: Any, tokens: Any
) -> dict[str, float]:
    """Of the captioning loss, the second of the two."""
    exact = copy.deepcopy(theirs).double()
    exact.set_grad_checkpointing(True)
    wanted = last(oracle.losses(exact, pixels, tokens))
    del exact
    ours = last(each_loss(coca.build(config), params, pixels, tokens))
    found = dict(gradient_float32=worst(as_tensors(config, ours), wanted))
    double = config.change(dict(dtype="float64"))
    with jax.enable_x64(True):
        model = coca.build(double, remat="full")
        ours = last(each_loss(model, params, pixels, tokens))
        return found | dict(gradient_float64=worst(as_tensors(double, ours), wanted))


def measure(name: str, with_gradients: bool) -> dict[str, float]:
    """The values of a model."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        theirs = oracle.build(CONFIGS[name])
        torch.save(theirs.state_dict(), folder / "open_clip_pytorch_model.bin")
        (folder / convert.CONFIG_NAME).write_text(json.dumps(CONFIGS[name]))
        (folder / "vocabulary.bpe.gz").write_bytes(cases.small_merges())
        found = converted(folder / "open_clip_pytorch_model.bin", folder / "out")
        (folder / "open_clip_pytorch_model.bin").unlink()
        params, config = export_format.read_export(folder / "out")
        text = config.model.text
        tokens = cases.captions(text.vocab_size, text.max_len)
        pixels = cases.pixels(len(tokens), config.model.image_size)
        answer = oracle.run(theirs, pixels, tokens)
        labels = tokens[:, 1:] != 0
        wanted = [answer["image_features"], answer["text_features"], answer["logits"][labels]]
        if with_gradients:
            found |= gradients(theirs, config.model, params, pixels, tokens)
        del theirs, answer
        gc.collect()
        for suffix, dtype in (("", "float32"), ("_bfloat16", "bfloat16")):
            model = coca.build(config.model.change(dict(dtype=dtype)))
            ours = outputs(model, params, pixels, tokens)
            for key, value, reference in zip(NAMES, ours, wanted, strict=True):
                found[f"{key}{suffix}"] = float(relative(value, reference))
    return found


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=tuple(CONFIGS))
    parser.add_argument("--gradients", action="store_true")
    given = parser.parse_args()
    print(json.dumps(measure(given.name, given.gradients)))


if __name__ == "__main__":
    main()
