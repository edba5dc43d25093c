"""Runs CLIP_benchmark on our models: its command line, with the model type coca_jax added.

  python -m coca_jax.evaluation.clip_benchmark eval --model_type=coca_jax --model=runs/mine \\
    --pretrained=captions --dataset=wds/pets --dataset_root=sets/pets --no_amp --num_workers=0

`--model` is an argument of `coca_jax.load`. `--pretrained=labels` encodes every text as a label,
for zero-shot classification with a model that was trained with data.label_token;
`--pretrained=captions` encodes it as a caption. In Python, call `register()` and then
`clip_benchmark.models.load_clip("coca_jax", ...)`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from coca_jax.runtime import extras

MODEL_TYPE = "coca_jax"
TEXTS = ("captions", "labels")


class Adapter:
    """Gives our model the PyTorch interface that CLIP_benchmark expects.

    model: a result of `coca_jax.load`. labels: encode texts as labels.
    """

    def __init__(self, model: Any, labels: bool = False):
        self.model, self.labels = model, labels

    def eval(self) -> Adapter:
        """Returns itself: there is no training mode."""
        return self

    to = cuda = lambda self, *_, **__: self

    def transform(self, image: Any) -> Any:
        """Preprocesses a PIL image to uint8 [S, S, 3]."""
        import torch

        return torch.from_numpy(np.array(self.model.fit_image(image)))

    def tokenizer(self, texts: str | Sequence[str]) -> Any:
        """Tokenizes texts to int64 [N, 2, L]: token ids and the padding mask."""
        import torch

        texts = [texts] if isinstance(texts, str) else list(texts)
        found = self.model.tokenize_with_mask(texts, labels=self.labels)
        return torch.from_numpy(np.stack(found, 1).astype("i8"))

    def encode_image(self, images: Any) -> Any:
        """Encodes uint8 [N, S, S, 3] to float32 [N, E] on the device of `images`."""
        return self._tensor(self.model.encode_image(images.cpu().numpy()), images)

    def encode_text(self, tokens: Any) -> Any:
        """Encodes the output of `tokenizer` to float32 [N, E]."""
        ids, valid = np.moveaxis(tokens.cpu().numpy(), 1, 0)
        found = self.model.encode_tokens(ids.astype(np.int32), valid.astype(bool))
        return self._tensor(found, tokens)

    def _tensor(self, found: np.ndarray, like: Any) -> Any:
        import torch

        return torch.from_numpy(np.array(found, np.float32)).to(like.device)


def load(
    model_name: str, pretrained: str = "captions", cache_dir: str = "", device: Any = "cpu"
) -> tuple[Adapter, Callable, Callable]:
    """Returns (model, transform, tokenizer), the loader interface of CLIP_benchmark. Raises
    ValueError if `pretrained` is neither 'captions' nor 'labels'."""
    if pretrained not in TEXTS:
        raise ValueError(f"--pretrained={pretrained}: unknown value. Use {' or '.join(TEXTS)}.")
    from coca_jax import inference

    adapter = Adapter(inference.load(model_name), pretrained == "labels")
    return adapter, adapter.transform, adapter.tokenizer


def accuracy(output: Any, target: Any, topk: tuple[int, ...] = (1,)) -> list[float]:
    """Replaces the function of CLIP_benchmark 1.6.2, which fails with NumPy 2.4 and later."""
    best = output.topk(max(topk), 1, True, True)[1]
    right = best == target.view(-1, 1)
    return [right[:, :k].any(1).sum().item() / len(target) for k in topk]


def register() -> None:
    """Adds the model type 'coca_jax' to CLIP_benchmark. Raises ValueError if CLIP_benchmark is not
    installed."""
    try:
        models: Any = importlib.import_module("clip_benchmark.models")
    except ImportError as error:
        why = f"CLIP_benchmark: import failed: {error}"
        raise ValueError(f"{why}. {extras.remedy('clip-benchmark')}") from None
    for name in ("zeroshot_classification", "linear_probe"):
        module: Any = importlib.import_module(f"clip_benchmark.metrics.{name}")
        module.accuracy = accuracy
    models.TYPE2FUNC[MODEL_TYPE] = load
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)


def evaluate(
    model: Any, datasets: Sequence[str], root: str, out: str, *, split: str, batch_size: int
) -> dict[str, float]:
    """Scores a model with CLIP_benchmark; returns {'suite/DATASET/METRIC': value}.

    Args:
        model: a result of `coca_jax.load`.
        datasets: names of datasets or collections, as for CLIP_benchmark's --dataset. A name that
            starts with 'wds/' is a folder of webdataset tars.
        root: CLIP_benchmark's --dataset_root: a folder or URL, where {dataset} stands for the name.
        out: local folder; CLIP_benchmark writes its results to out/suite/DATASET.json.
        split: name of the split.
        batch_size: images per batch.

    Raises:
        ValueError: CLIP_benchmark is not installed or cannot read a dataset.
    """
    register()
    benchmark: Any = importlib.import_module("clip_benchmark.cli")
    builder: Any = importlib.import_module("clip_benchmark.datasets.builder")
    models: Any = importlib.import_module("clip_benchmark.models")
    os.makedirs(os.path.join(out, "suite"), exist_ok=True)
    names = [found for name in datasets for found in builder.dataset_collection.get(name, [name])]
    scores: dict[str, float] = {}
    for name in names:
        plain = name.removeprefix("wds/")
        file = os.path.join(out, "suite", plain.replace("/", "_") + ".json")
        # A model trained with data.label_token encodes class names as labels, not as captions.
        task = _task(builder, name, root, plain)
        adapter = Adapter(model, labels=task == "zeroshot_classification")
        models.TYPE2FUNC[MODEL_TYPE] = lambda *_, **__: (
            adapter,  # noqa: B023
            adapter.transform,  # noqa: B023
            adapter.tokenizer,  # noqa: B023
        )
        # Going through its command line applies CLIP_benchmark's own defaults.
        flags = [
            *("eval", f"--dataset={name}", f"--dataset_root={root}", f"--split={split}"),
            *(f"--model_type={MODEL_TYPE}", "--model=coca_jax", "--pretrained=weights"),
            *(f"--batch_size={batch_size}", f"--output={file}", f"--task={task}"),
            *("--no_amp", "--num_workers=0", "--quiet", "--recall_k", "1", "5", "10"),
        ]
        given, sys.argv = sys.argv, ["clip_benchmark", *flags]
        try:
            args = benchmark.get_parser_args()[1]
            args.dataset, args.model, args.pretrained, args.language = name, "coca_jax", "", "en"
            benchmark.run(args)
        except Exception as error:  # each dataset reader raises its own types
            why = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"--suite={name}: CLIP_benchmark failed: {why}") from error
        finally:
            sys.argv = given
            models.TYPE2FUNC[MODEL_TYPE] = load
        with open(file) as found:
            metrics = json.load(found)["metrics"]
        scores |= {
            f"suite/{plain.replace('/', '_')}/{metric}": float(value)
            for metric, value in metrics.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
    return scores


def _task(builder: Any, name: str, root: str, plain: str) -> str:
    """CLIP_benchmark's task for a dataset; a folder of tars can declare it in dataset_type.txt."""
    folder = root.format(dataset=plain, dataset_cleaned=plain.replace("/", "-"))
    kind = os.path.join(folder, "dataset_type.txt")
    if name.startswith("wds/") and os.path.exists(kind):
        with open(kind) as file:
            if file.read().strip() == "retrieval":
                return "zeroshot_retrieval"
    return builder.get_dataset_default_task(plain)


def main() -> None:
    """CLIP_benchmark's command line."""
    try:
        register()
        importlib.import_module("clip_benchmark.cli").main()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
