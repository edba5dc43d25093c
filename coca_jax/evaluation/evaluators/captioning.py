"""Captioning evaluator: perplexity of the references, and metrics of the generated captions."""

from __future__ import annotations

import base64
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from coca_jax.config import shapes
from coca_jax.data.dedup import content_digest, firsts
from coca_jax.evaluation.evaluators import (
    Predictor,
    Record,
    check_finite,
    collapse,
    in_batches,
    record_texts,
    stack_images,
    warn,
)
from coca_jax.evaluation.evaluators.base import Evaluator, Flag, Metric, Scale, Setting, task_label
from coca_jax.evaluation.evaluators.baselines import most_common_caption
from coca_jax.evaluation.evaluators.caption_match import Scorer, score_references, score_scene
from coca_jax.evaluation.evaluators.results import Outputs, Spread, Worst, encode_png, picture, seen
from coca_jax.evaluation.metrics import captions as caption_metrics
from coca_jax.evaluation.metrics.intervals import (
    bootstrap,
    limits,
    resampled_sums,
    scored,
    sum_by_owner,
    with_interval,
)
from coca_jax.inference.generation.config import GenerationConfig
from coca_jax.runtime import storage


def _item(record: Record, caption: str, exact: bool, f1: float) -> dict[str, Any]:
    """An example image for the report. `raw` is the model's input; `_with_words` removes it."""
    references = record_texts(record, "captioning")[:5]
    raw, image = record["image"], encode_png(picture(record["image"]))
    return dict(image=image, caption=caption, references=references, exact=exact, f1=f1, raw=raw)


def _with_words(predict: Predictor, items: Sequence[dict[str, Any]], wanted: bool) -> None:
    """Removes `raw` from the items; if `wanted`, adds the words of each caption with their
    probability and attention map."""
    images = [item.pop("raw") for item in items]
    if not wanted or not items or predict.resize == "native":  # the report needs fixed-size maps
        return
    reasons = predict.explain(images, [item["caption"] for item in items])
    for item, reason, raw in zip(items, reasons, images):
        if reason.attention.ndim > 2:  # video: the report shows only one frame
            continue
        item["image"] = encode_png(seen(raw, predict))  # background of the map
        item["fit"], item["aspect"] = predict.resize, shapes.aspect(predict.image_size)
        item["words"] = [
            dict(
                text=word.text or "end",
                probability=math.exp(min(word.log_prob, 0.0)),
                map=_encoded(word.attention),
                columns=word.attention.shape[1],
            )
            for word in reason.words
        ]


def _encoded(attention: np.ndarray) -> str:
    """Encodes a map [R, C] as base64 uint8, with the maximum scaled to 255."""
    scaled = np.rint(255 * attention / max(float(attention.max()), 1e-12)).astype(np.uint8)
    return base64.b64encode(scaled.tobytes()).decode()


class Captioning(Evaluator):
    """Scores the captions of a model.

    Args:
      data_name: name of the dataset, the second part of the metric names.
      scorer: (caption, record) -> (exact, F1); `score_references` or `score_scene`.
      perplexity: compute the perplexity of the references.
      captions: generate captions and score them.
      java_metrics: also compute METEOR and SPICE; `skipped` gives the reason if they cannot run.
      attention: add an attention map per caption word to the report.
      how: decoding options, such as num_beams.
      outputs: file for captions during the evaluation.
      batch_size: images per call of the model.
      num_examples: number of example images for the report.
      progress: show a progress bar.
    """

    kind, order, title, usual = "captioning", 40, "Captioning", True
    options = dict(decode=Mapping[str, Any], java_metrics=bool, attention=bool)
    needs, programs = "caption", ("caption", "caption_log_likelihood")
    flags = (
        Flag("num_beams", 1, "Number of beams for captions.", least=1),
        Flag("java_metrics", True, "Compute METEOR and SPICE if Java is available."),
        Flag("attention", True, "Show the attention map of each caption word in the report."),
    )
    metrics = {
        "exact_match": Metric("Exact match"),
        "attribute_f1": Metric("Attribute F1"),
        "word_f1": Metric("Word F1"),
        "cider_d": Metric("CIDEr-D", Scale.HUNDREDFOLD),
        "bleu4": Metric("BLEU-4", Scale.HUNDREDFOLD),
        "meteor": Metric("METEOR", Scale.HUNDREDFOLD),
        "rouge_l": Metric("ROUGE-L", Scale.HUNDREDFOLD),
        "spice": Metric("SPICE", Scale.HUNDREDFOLD),
        "perplexity": Metric("Perplexity", Scale.PLAIN, lower=True),
        "distinct": Metric("Distinct captions"),
        "same_start": Metric("Captions with the most common first three words", lower=True),
        "same_start_references": Metric("References with the same first three words"),
        "self_bleu": Metric("Self-BLEU", Scale.HUNDREDFOLD, lower=True),
        "image_gain": Metric("Gain from the correct image, nats per token", Scale.PLAIN),
    }
    # Word F1 first: for long captions even a good model's exact match is near 0, and CIDEr-D and
    # BLEU-4 are hard to interpret.
    headlines = ("word_f1", "attribute_f1", "exact_match", "cider_d")

    def __init__(
        self,
        data_name: str,
        *,
        scorer: Scorer = score_references,
        perplexity: bool = True,
        captions: bool = True,
        java_metrics: bool = False,
        attention: bool = False,
        how: Mapping[str, Any] | None = None,
        outputs: Outputs | None = None,
        batch_size: int = 128,
        num_examples: int = 24,
        progress: bool = False,
    ):
        super().__init__(data_name)
        self.scorer, self.java_metrics, self.attention = scorer, java_metrics, attention
        self.perplexity, self.captions = perplexity, captions
        self.how, self.outputs = dict(how or {}), outputs
        self.batch_size, self.num_examples = batch_size, num_examples
        self.progress = progress
        self.cut = self.warning = ""

    @classmethod
    def from_flags(cls, task: dict[str, Any], flags: Any) -> None:
        """Reads --num_beams, --java_metrics and --attention."""
        super().from_flags(task, flags)
        task.update(java_metrics=flags.java_metrics, attention=flags.attention)
        if flags.num_beams > 1:
            task["decode"] = dict(num_beams=flags.num_beams)
        if task["data"].get("builtin"):
            task["data"]["objects"] = (1,)  # exact match is defined for single objects

    @classmethod
    def check_task(cls, task: Mapping[str, Any]) -> None:
        super().check_task(task)
        try:
            GenerationConfig().updated(task.get("decode") or {})
        except ValueError as error:
            raise ValueError(f"{task_label(task)}: decode: {error}") from None

    @classmethod
    def from_task(cls, task: Mapping[str, Any], setting: Setting) -> Captioning:
        """Options of a task: decode (decoding options), java_metrics, attention. Captions are
        stored in workdir/eval_captions during the evaluation."""
        outputs = None
        if setting.workdir:
            name = f"{task['name'].replace('/', '_')}.jsonl"
            path = storage.place(setting.workdir) / "eval_captions" / name
            fields = {key: value for key, value in task.items() if key != "attention"}
            made_for = dict(setting.request, task=fields)
            outputs = Outputs(path, made_for, write=setting.write)
        drawn = getattr(setting.records, "scenes", False)
        return cls(
            task["name"],
            scorer=score_scene if drawn else score_references,
            java_metrics=task.get("java_metrics", False),
            attention=task.get("attention", False),
            how=task.get("decode"),
            outputs=outputs,
            **setting.common(several=False),
        )

    def run(self, predict: Predictor, records: Iterable[Record]) -> Iterator[tuple[str, float]]:
        """Yields perplexity, exact_match, word_f1 or attribute_f1, bleu4, rouge_l, cider_d, meteor
        and spice (with java_metrics), and the metrics of collapse.py (image_gain only with
        perplexity), all with intervals; exact_match and word_f1 also have a `_majority` baseline.

        Perplexity is exp(-sum of log likelihoods / number of predicted tokens) over all references,
        including the end tokens. A record needs `image` and `text`. Sets `examples`.
        """
        sums, tokens, f1 = list[float](), list[list[int]](), list[float]()
        exact, captions, image_of = list[bool](), list[str](), list[bytes]()  # digests
        gains: list[tuple[float, float] | None] = []
        recent: list[Record] = []
        references: list[list[str]] = []
        shown, worst = Spread(self.num_examples), Worst(self.num_examples // 2)
        show = f"{self.name} images" if self.progress else ""
        for batch in in_batches(records, self.batch_size, show=show):
            found = self.outputs.take(batch) if self.outputs else []
            if len(found) < len(batch):
                made = self._make(predict, batch, len(found), recent, len(references))
                if self.outputs:
                    self.outputs.add(made)
                found = found + made
            recent = [*recent, *batch][-collapse.APART :]
            for record, one in zip(batch, found):
                image_of.append(content_digest(record["image"]))
                references.append(record_texts(record, self.name))
                if self.perplexity:
                    # Sum per image: its references are not independent samples.
                    sums.append(sum(one["log_likelihood"]))
                    tokens.append(one["tokens"])
                if not self.captions:
                    continue
                caption = one["caption"]
                captions.append(caption)
                gains.append(one.get("gain"))
                right, score = self.scorer(caption, record)
                exact.append(right)
                f1.append(score)
                item = functools.partial(_item, record, caption, bool(right), float(score))
                shown.offer(item)
                if not right:
                    worst.offer(-float(score), item)
        if self.outputs:
            self.outputs.close()
        if not references:
            raise ValueError(f"{self.name}: no records. Check the dataset and its split.")
        # Several records may have the same image: intervals resample images.
        once, owners = np.unique(firsts(image_of), return_inverse=True)
        if self.perplexity:
            yield from self._perplexity(sums, tokens, owners, predict.max_len)
        if self.captions:
            yield from with_interval(f"{self.name}/exact_match", np.asarray(exact), owners=owners)
            f1_name = "attribute_f1" if self.scorer is score_scene else "word_f1"
            yield from with_interval(f"{self.name}/{f1_name}", np.asarray(f1), owners=owners)
            if self.scorer is score_references:
                common = most_common_caption(references)
                for metric, share in zip(("exact_match", "word_f1"), common):
                    yield f"{self.name}/{metric}_majority", share
            yield from self._corpus_metrics(captions, references, owners)
            yield from self._collapse(captions, references, gains, once.tolist())
        items, worse = shown.items(), worst.items()
        _with_words(predict, items + worse, self.attention)
        self.examples = dict(kind="captioning", items=items, worst=worse, notes=self._notes())

    def _notes(self) -> list[str]:
        skipped = [f"Skipped {metric.upper()}: {why}" for metric, why in self.skipped.items()]
        return [line for line in (self.cut, self.warning) if line] + skipped

    def _make(
        self,
        predict: Predictor,
        batch: Sequence[Record],
        first: int,
        recent: Sequence[Record],
        before: int,
    ) -> list[dict[str, Any]]:
        """Model outputs for the records of a batch from index `first`, in the format of `Outputs`.
        recent: the last records of earlier batches; before: number of earlier records."""
        records = batch[first:]
        images = stack_images(records)
        made: list[dict[str, Any]] = [dict(key=str(r.get("key", ""))) for r in records]
        if self.perplexity:
            rows = [(i, t) for i, r in enumerate(records) for t in record_texts(r, self.name)]
            for one in made:
                one.update(log_likelihood=[], tokens=[])
            for part in in_batches(rows, self.batch_size):
                picked = [i for i, _ in part]
                chosen = (
                    images[picked]
                    if isinstance(images, np.ndarray)
                    else [images[i] for i in picked]
                )
                found = predict.caption_log_likelihood(chosen, [text for _, text in part])
                nats, counts = map(np.asarray, found)
                check_finite(nats, f"caption likelihoods of {self.name}")
                for i, one, count in zip(picked, nats.tolist(), counts.tolist()):
                    made[i]["log_likelihood"].append(one)
                    made[i]["tokens"].append(count)
        if self.captions:
            captions = predict.caption(images, **self.how)
            if len(captions) != len(made):
                raise ValueError(f"{len(captions)} captions for {len(made)} images in {self.name}")
            for one, caption in zip(made, captions):
                one["caption"] = caption
            if self.perplexity:
                gains = collapse.first_gains(predict, recent, batch, captions, before + first)
                made = [dict(one, gain=gain) for one, gain in zip(made, gains)]
        return made

    def _perplexity(
        self,
        sums: Sequence[float],
        tokens: Sequence[Sequence[int]],
        owners: np.ndarray,
        max_len: int,
    ) -> Iterator[tuple[str, float]]:
        """Perplexity from the log likelihood of each record and the token counts of its references.
        Sets `cut` to a warning if references reach the maximum length."""
        counts = [count for several in tokens for count in several]
        # The start token is not predicted; most references of the full length were cut.
        full = sum(count >= max_len - 1 for count in counts)
        if full:
            self.cut = (
                f"{full} of {len(counts)} references fill model.text.max_len={max_len} tokens; "
                "longer ones are truncated, and perplexity covers only the remaining tokens"
            )
            warn(self.name, self.cut)
        predicted = sum_by_owner(np.asarray([sum(one) for one in tokens]), owners)
        nats = bootstrap(-sum_by_owner(np.asarray(sums), owners), predicted)
        with np.errstate(over="ignore"):  # infinite above 709 nats per token
            found, low, high = np.exp(nats).tolist()
        yield from scored(f"{self.name}/perplexity", found, (low, high), len(sums))

    def _collapse(
        self,
        captions: Sequence[str],
        references: Sequence[Sequence[str]],
        gains: Sequence[tuple[float, float] | None],
        once: Sequence[int],
    ) -> Iterator[tuple[str, float]]:
        """Metrics of collapse.py; sets `warning` for a collapsed captioner. once: index of the
        first record of each image."""
        captions, references = [captions[i] for i in once], [references[i] for i in once]
        start, same_start = collapse.same_start(captions)
        found = dict(
            distinct=collapse.distinct(captions),
            same_start=same_start,
            self_bleu=collapse.self_bleu(captions),
        )
        figures = {name: float(values.mean()) for name, values in found.items()}
        for name, values in found.items():
            yield from with_interval(f"{self.name}/{name}", values)
        # Only the first record of an image: a later one may have been compared with its own image.
        own = [pair for i in once if (pair := gains[i])]
        gain, count = np.asarray(own, np.float64).reshape(-1, 2).T
        if count.sum() > 0:
            figures["image_gain"], low, high = bootstrap(gain, count)
            name = f"{self.name}/image_gain"
            yield from scored(name, figures["image_gain"], (low, high), len(gain))
        first = [several[0] for several in references]
        of_start = float(np.mean([bool(start) and collapse.start_of(t) == start for t in first]))
        yield f"{self.name}/same_start_references", of_start
        of_references = float(collapse.distinct(first).mean())
        self.warning = collapse.warning(
            figures, len(captions), of_references, start=start, start_of_references=of_start
        )
        if self.warning:
            warn(self.name, self.warning)

    def _corpus_metrics(
        self, captions: Sequence[str], references: Sequence[Sequence[str]], owners: np.ndarray
    ) -> Iterator[tuple[str, float]]:
        """Metrics of tokenized captions. owners: image of each caption; intervals resample images."""
        tokenized = [caption_metrics.tokenize(caption) for caption in captions]
        wanted = [[caption_metrics.tokenize(text) for text in several] for several in references]
        stats = caption_metrics.bleu_stats(tokenized, wanted)
        yield from scored(
            f"{self.name}/bleu4",
            caption_metrics.bleu(stats.sum(0))[3],
            limits(caption_metrics.bleu(resampled_sums(sum_by_owner(stats, owners)))[:, 3]),
            len(tokenized),
        )
        for name, metric, most in (
            ("rouge_l", caption_metrics.rouge_l, 1.0),
            ("cider_d", caption_metrics.cider_d, 10.0),
        ):
            each = metric(tokenized, wanted)
            yield from with_interval(f"{self.name}/{name}", each, owners=owners, most=most)
        if not self.java_metrics:
            return
        self.skipped = {m: w for m in ("meteor", "spice") if (w := caption_metrics.why_not(m))}
        if "meteor" not in self.skipped:
            corpus, each = caption_metrics.meteor(tokenized, wanted)
            # Corpus METEOR is not the mean over images: shift the interval of the mean to it.
            counts = np.bincount(owners)
            mean, low, high = bootstrap(sum_by_owner(each, owners), counts)
            moved = (max(corpus + low - mean, 0.0), min(corpus + high - mean, 1.0))
            yield from scored(f"{self.name}/meteor", corpus, moved, len(tokenized))
        if "spice" not in self.skipped:
            each = caption_metrics.spice(
                [" ".join(tokens) for tokens in tokenized],
                [[" ".join(tokens) for tokens in several] for several in wanted],
            )
            yield from with_interval(f"{self.name}/spice", each, owners=owners)
