"""CLIP_benchmark runs our models: its commands, with `--model_type=coca_jax` besides its own.

  python -m coca_jax.evaluation.clip_benchmark eval --model_type=coca_jax --model=runs/mine \\
    --pretrained=captions --dataset=wds/pets --dataset_root=sets/pets --no_amp --num_workers=0

`--model` is what `coca_jax.load` takes. `--pretrained=labels` marks every text as the text of a
label, for zero-shot classification by a model trained with data.label_token; `captions` does not.
From Python: `register()`, then `clip_benchmark.models.load_clip("coca_jax", ...)`.
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
    """A model as CLIP_benchmark calls one: tensors in, tensors of embeddings out.

    model: what `coca_jax.load` returns. labels: whether texts are those of labels.
    """

    def __init__(self, model: Any, labels: bool = False):
        self.model, self.labels = model, labels

    def eval(self) -> Adapter:
        """Itself: there is nothing to switch."""
        return self

    to = cuda = lambda self, *_, **__: self

    def transform(self, image: Any) -> Any:
        """A PIL image -> uint8 [S, S, 3], the model's own preprocessing."""
        import torch

        return torch.from_numpy(np.array(self.model.fit_image(image)))

    def tokenizer(self, texts: str | Sequence[str]) -> Any:
        """Texts -> int64 [N, 2, L]: ids, and which of them are valid."""
        import torch

        texts = [texts] if isinstance(texts, str) else list(texts)
        found = self.model.tokenize_with_mask(texts, labels=self.labels)
        return torch.from_numpy(np.stack(found, 1).astype("i8"))

    def encode_image(self, images: Any) -> Any:
        """uint8 [N, S, S, 3] -> float32 [N, E], on the device of `images`."""
        return self._tensor(self.model.encode_image(images.cpu().numpy()), images)

    def encode_text(self, tokens: Any) -> Any:
        """What `tokenizer` gave -> float32 [N, E]."""
        ids, valid = np.moveaxis(tokens.cpu().numpy(), 1, 0)
        found = self.model.encode_tokens(ids.astype(np.int32), valid.astype(bool))
        return self._tensor(found, tokens)

    def _tensor(self, found: np.ndarray, like: Any) -> Any:
        import torch

        return torch.from_numpy(np.array(found, np.float32)).to(like.device)


def load(
    model_name: str, pretrained: str = "captions", cache_dir: str = "", device: Any = "cpu"
) -> tuple[Adapter, Callable, Callable]:
    """(model, transform, tokenizer), as CLIP_benchmark wants them. Raises ValueError for
    `pretrained` that is neither 'captions' nor 'labels'."""
    if pretrained not in TEXTS:
        raise ValueError(f"--pretrained={pretrained}: choose from {', '.join(TEXTS)}")
    from coca_jax import inference

    adapter = Adapter(inference.load(model_name), pretrained == "labels")
    return adapter, adapter.transform, adapter.tokenizer


def accuracy(output: Any, target: Any, topk: tuple[int, ...] = (1,)) -> list[float]:
    """CLIP_benchmark's function of this name: version 1.6.2 makes a number of an array of one
    element, which NumPy refuses from 2.4 on."""
    best = output.topk(max(topk), 1, True, True)[1]
    right = best == target.view(-1, 1)
    return [right[:, :k].any(1).sum().item() / len(target) for k in topk]


def register() -> None:
    """Makes 'coca_jax' a model type of CLIP_benchmark. Raises ValueError where that is missing."""
    try:
        models: Any = importlib.import_module("clip_benchmark.models")
    except ImportError as error:
        why = f"CLIP_benchmark cannot be imported ({error})"
        raise ValueError(f"{why}: {extras.remedy('clip-benchmark')}") from None
    for name in ("zeroshot_classification", "linear_probe"):
        module: Any = importlib.import_module(f"clip_benchmark.metrics.{name}")
        module.accuracy = accuracy
    models.TYPE2FUNC[MODEL_TYPE] = load
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)


def evaluate(
    model: Any, datasets: Sequence[str], root: str, out: str, *, split: str, batch_size: int
) -> dict[str, float]:
    """Scores a model on datasets by CLIP_benchmark's own code, {suite/DATASET/METRIC: value}.

    Args:
        model: what `coca_jax.load` returns.
        datasets: names of datasets or collections, as its flag --dataset takes them ('wds/' names
            are folders of webdataset tars).
        root: its --dataset_root: a folder or URL, in which {dataset} stands for the name.
        out: local folder for its JSON file of each dataset, out/suite/DATASET.json.

    Raises:
        ValueError: CLIP_benchmark is not installed, or cannot read a dataset.
    """
    register()
    benchmark: Any = importlib.import_module("clip_benchmark.cli")
    builder: Any = importlib.import_module("clip_benchmark.datasets.builder")
    models: Any = importlib.import_module("clip_benchmark.models")
    os.makedirs(os.path.join(out, "suite"), exist_ok=True)
    names = [one for name in datasets for one in builder.dataset_collection.get(name, [name])]
    scores: dict[str, float] = {}
    for name in names:
        plain = name.removeprefix("wds/")
        file = os.path.join(out, "suite", plain.replace("/", "_") + ".json")
        # A text of a label has a token of its own where the model was trained so.
        task = _task(builder, name, root, plain)
        adapter = Adapter(model, labels=task == "zeroshot_classification")
        models.TYPE2FUNC[MODEL_TYPE] = lambda *_, **__: (
            adapter,  # noqa: B023
            adapter.transform,  # noqa: B023
            adapter.tokenizer,  # noqa: B023
        )
        # Its defaults are those of its command line.
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
        except Exception as error:  # each dataset's reader has types of its own
            why = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"--suite={name}: CLIP_benchmark cannot score it: {why}") from error
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
    """What CLIP_benchmark measures on a dataset: a folder of tars may say it itself, in
    dataset_type.txt."""
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
