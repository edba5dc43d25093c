"""The rows in PyTorch: open_clip's classes, trained and scored on the batches and tasks of ours.

Called by run.py: python benchmarks/torch_row.py train|score ROW DATA FOLDER STEPS SEED WORKDIR
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from settings import DATA, ROWS, Row, config_of
from torch_models import build

from coca_jax.config import Config
from coca_jax.data import images
from coca_jax.data.batches import Batches, DirectStream
from coca_jax.data.pixels import Pixels
from coca_jax.data.vocabulary.clip_bpe import ClipBpe, find_merges
from coca_jax.evaluation.evaluators import base
from coca_jax.evaluation.evaluators.base import Setting
from coca_jax.evaluation.runner import run_task

CAPTIONING, RATE, CLIP_NORM = 2.0, {"adamw": 1e-3, "muon": 1.5e-3}, 1.0
MEAN, STD = (
    torch.tensor(x)[:, None, None]
    for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
)


class OpenClipPixels(Pixels):
    """open_clip's training transform in place of our augmentation: float32 [n, 3, S, S]."""

    def __init__(self, config: Config):
        super().__init__(config)
        self._transform = open_clip.image_transform(config.model.image_size, is_train=True)

    def render(self, records: Any, plan: Any) -> tuple[np.ndarray, dict[int, str]]:
        """As of Pixels."""
        made = [self._transform(Image.open(io.BytesIO(one.image))).numpy() for one in records]
        return np.stack(made), {}


class Words:
    """CLIP's BPE; compact: only the ids that occur in the training texts, 0 padding, 1 others."""

    def __init__(self, compact: bool, texts: Sequence[str] = ()):
        self.bpe = ClipBpe(find_merges(os.path.dirname(os.path.abspath(__file__))))
        self.size, self._new = self.bpe.size, None
        if compact:
            ids = {i for one in self.bpe.encode_many(list(texts)) for i in one} - {0}
            kept = [0, 0, *sorted(ids), self.bpe.bos_id, self.bpe.eos_id]
            self._old = np.array(kept, np.int64)
            self._new = np.ones(self.bpe.size, np.int64)
            self._new[self._old] = np.arange(len(kept))
            self._new[0] = 0
            self.size = len(kept)

    def tensor(self, tokens: np.ndarray, valid: np.ndarray) -> torch.Tensor:
        """Ids of the BPE, int [N, L] -> those of the model, int64 [N, L], 0 where not valid."""
        ids = tokens.astype(np.int64) if self._new is None else self._new[tokens]
        return torch.from_numpy(np.where(valid, ids, 0))

    def text(self, ids: Sequence[int]) -> str:
        """Ids of the model behind the begin symbol -> text up to the end symbol."""
        old = [i if self._new is None else int(self._old[i]) for i in ids]
        end = old.index(self.bpe.eos_id) if self.bpe.eos_id in old else len(old)
        return self.bpe.decode(old[:end])

    @property
    def symbols(self) -> tuple[int, int]:
        """The begin and the end symbol of the model."""
        pair = np.array([[self.bpe.bos_id, self.bpe.eos_id]])
        begin, end = self.tensor(pair, np.ones((1, 2), bool))[0].tolist()
        return begin, end


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [N, S, S, 3], or what the transform made -> float32 [N, 3, S, S]."""
    x = torch.from_numpy(pixels)
    return x if x.dtype == torch.float32 else (x.permute(0, 3, 1, 2) / 255 - MEAN) / STD


def losses(found: dict[str, Any], text_id: np.ndarray, row: Row) -> torch.Tensor:
    """The contrastive loss (mean of both directions), and the captions' CAPTIONING times."""
    logits = found["logit_scale"] * found["image_features"] @ found["text_features"].T
    same = torch.eye(len(logits))
    if row.positives:
        ids = torch.from_numpy(text_id)
        same = (ids[:, None] == ids[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    if row.captions:
        per_token = found["logits"].permute(0, 2, 1)
        loss = loss + CAPTIONING * F.cross_entropy(per_token, found["labels"], ignore_index=0)
    return loss


def optimizers(model: Any, row: Row) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices of the blocks and AdamW for the rest."""
    named = list(model.named_parameters())
    matrices = [
        p
        for n, p in named
        if row.muon and p.ndim == 2 and "embedding" not in n and "text_decoder.text_proj" not in n
    ]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    rate = RATE["muon" if row.muon else "adamw"]
    decay = [
        dict(params=[p for p in rest if p.ndim > 1], weight_decay=0.1),
        dict(params=[p for p in rest if p.ndim < 2], weight_decay=0.0),
    ]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(decay, lr=rate, betas=(0.9, 0.98))]
    if matrices:
        muon = torch.optim.Muon(
            matrices, lr=rate, weight_decay=0.1, ns_steps=4, adjust_lr_fn="match_rms_adamw"
        )
        found.append(muon)
    return found


class Run:
    """A row on a data set: its config, words and model."""

    def __init__(self, row: str, data: str, folder: str, steps: int, seed: int):
        torch.manual_seed(seed)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.row, self.data = ROWS[row], DATA[data]
        config = config_of(data, folder, steps, seed)
        config = config.change({"data.resize": "squash"})  # cut margins are of our recipe
        # One size and all of a text: what open_clip trains with.
        config = config.change({"image_sizes": (), "batch_size": self.data.batch})
        if not self.row.drawing:
            config = config.change({"data.augment": "none"})
        self.config = config
        vocabulary = Words(False).bpe
        self.batches = Batches(config, vocabulary)
        if not self.row.drawing:
            self.batches.pixels = OpenClipPixels(config)
            for examples in self.batches.examples:
                examples.pixels = self.batches.pixels
        sample = self.batches.mixture.sample_texts(20_000) if self.row.compact else ()
        self.words = Words(self.row.compact, list(sample))
        self.model = build(self.row, self.data, config.model, self.words.size)

    def train(self, workdir: str) -> int:
        """All steps, the rate rising over a twentieth and then down as a cosine; the pairs seen."""
        steps, rules = self.config.steps, optimizers(self.model, self.row)
        peaks = [[group["lr"] for group in rule.param_groups] for rule in rules]
        stream = DirectStream(self.batches)
        self.model.train()
        warm = max(1, steps // 20)
        for step in range(steps):
            batch = next(stream)
            share = min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for rule, of in zip(rules, peaks):
                for group, peak in zip(rule.param_groups, of):
                    group["lr"] = peak * share
                rule.zero_grad()
            text = self.words.tensor(batch["tokens"], batch["text_valid"])
            found = self.forward(normalised(batch["image"]), text)
            loss = losses(found, batch["text_id"], self.row)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
            for rule in rules:
                rule.step()
            if step % 50 == 0 or step == steps - 1:
                print(f"step {step + 1}/{steps} loss {loss.item():.3f}", file=sys.stderr)
        stream.close()
        os.makedirs(workdir, exist_ok=True)
        torch.save(self.model.state_dict(), os.path.join(workdir, "model.pt"))
        return steps * self.config.batch_size

    def forward(self, pixels: torch.Tensor, text: torch.Tensor) -> dict[str, Any]:
        """The outputs that `losses` reads, of CoCa or of CLIP."""
        if self.row.captions:
            found: dict[str, Any] = self.model(pixels, text)
            return found
        image, words, scale = self.model(pixels, text)[:3]
        return dict(image_features=image, text_features=words, logit_scale=scale)

    def score(self, workdir: str) -> dict[str, float]:
        """The scores of the recipe's tasks, as our evaluators define them."""
        self.model.load_state_dict(torch.load(os.path.join(workdir, "model.pt")))
        self.model.eval()
        predictor = Predictor(self)
        scores: dict[str, float] = {}
        with torch.no_grad():
            for task in self.config.eval.tasks:
                lacking = [p for p in base.get(task["kind"]).programs if not hasattr(predictor, p)]
                if not lacking:
                    setting = Setting(batch_size=128, workdir=workdir, request={"row": workdir})
                    more = ("rerank", "querybank")  # embeddings are compared
                    task = {key: value for key, value in task.items() if key not in more}
                    scores |= run_task(predictor, task, setting)
        return scores


class Predictor:
    """A model in PyTorch as the evaluators want one; captions by the likeliest token each time."""

    resize, num_frames, head_kind = "squash", 0, None

    def __init__(self, run: Run):
        self._run, self._model, self._words = run, run.model, run.words
        self.max_len = run.config.model.text.max_len
        if run.row.captions:
            self.caption = self._caption
            self.caption_log_likelihood = self._log_likelihood

    def _pixels(self, given: Any) -> torch.Tensor:
        size, resize = self._run.config.model.image_size, self._run.config.data.resize
        made = [images.preprocess_eval(images.decode(one), size, resize) for one in given]
        return normalised(np.stack(made))

    def _texts(self, texts: Sequence[str]) -> torch.Tensor:
        return self._words.tensor(*self._words.bpe.encode_batch(list(texts), self.max_len))

    def encode_image(self, given: Any) -> np.ndarray:
        """As of coca_jax.load."""
        found: np.ndarray = self._model.encode_image(self._pixels(given), normalize=True).numpy()
        return found

    def encode_text(self, texts: Sequence[str], *, labels: bool = False) -> np.ndarray:
        """As of coca_jax.load."""
        found: np.ndarray = self._model.encode_text(self._texts(texts), normalize=True).numpy()
        return found

    def tokenize_with_mask(
        self, texts: Sequence[str], *, labels: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """As of coca_jax.load."""
        return self._words.bpe.encode_batch(list(texts), self.max_len)

    def _log_likelihood(self, given: Any, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = self._texts(texts)
        found = self._model(self._pixels(given), ids)
        right = found["logits"].log_softmax(-1).gather(2, found["labels"][:, :, None])[:, :, 0]
        said = found["labels"] > 0
        return (right * said).sum(1).numpy(), said.sum(1).numpy()

    def _caption(self, given: Any, **how: Any) -> list[str]:
        latent, tokens = self._model._encode_image(self._pixels(given))
        begin, end = self._words.symbols
        ids = torch.full((len(latent), 1), begin)
        for _ in range(self.max_len - 1):
            seen = dict(image_latent=latent, image_embs=tokens, output_labels=False)
            logits = self._model(None, ids, **seen)["logits"][:, -1]
            logits[:, :2] = -math.inf  # padding, and the id of all others
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
            if (ids == end).any(1).all():
                break
        return [self._words.text(one) for one in ids[:, 1:].tolist()]


def main(act: str, row: str, data: str, folder: str, steps: str, seed: str, workdir: str) -> None:
    """train: writes model.pt. score: prints its scores."""
    run = Run(row, data, folder, int(steps), int(seed))
    told: dict[str, Any] = {}
    if act == "train":
        told["pairs"] = run.train(workdir)
    else:
        told["scores"] = run.score(workdir)
    run.batches.close()
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
