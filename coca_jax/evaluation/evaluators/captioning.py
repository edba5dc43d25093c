"""Captioning: perplexity of the references, and the model's captions compared with them."""

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
from coca_jax.evaluation.evaluators.base import Evaluator, Flag, Metric, Scale, Setting, called
from coca_jax.evaluation.evaluators.baselines import most_common_caption
from coca_jax.evaluation.evaluators.caption_match import Scorer, score_references, score_scene
from coca_jax.evaluation.evaluators.results import Outputs, Spread, Worst, encode_png, picture, seen
from coca_jax.evaluation.metrics import captions as caption_metrics
from coca_jax.evaluation.metrics.intervals import (
    bootstrap,
    limits,
    of_owners,
    resampled_sums,
    scored,
    with_interval,
)
from coca_jax.inference.generation.config import GenerationConfig
from coca_jax.runtime import storage


def _item(record: Record, caption: str, exact: bool, f1: float) -> dict[str, Any]:
    """One picture of the report; raw: as the model takes it, for `_with_words` alone."""
    references = record_texts(record, "captioning")[:5]
    raw, image = record["image"], encode_png(picture(record["image"]))
    return dict(image=image, caption=caption, references=references, exact=exact, f1=f1, raw=raw)


def _with_words(predict: Predictor, items: Sequence[dict[str, Any]], wanted: bool) -> None:
    """Gives the pictures of the report, where that is wanted, the words of their captions, with
    probability and the attention over the picture, and takes `raw` away."""
    images = [item.pop("raw") for item in items]
    if not wanted or not items or predict.resize == "native":  # maps are of square images
        return
    reasons = predict.explain(images, [item["caption"] for item in items])
    for item, reason, raw in zip(items, reasons, images):
        if reason.attention.ndim > 2:  # of a clip's frames, of which one is shown
            continue
        item["image"] = encode_png(seen(raw, predict))  # what the map lies over
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
    """A map [R, C] as base64 of uint8, 255 where it is highest."""
    scaled = np.rint(255 * attention / max(float(attention.max()), 1e-12)).astype(np.uint8)
    return base64.b64encode(scaled.tobytes()).decode()


class Captioning(Evaluator):
    """Scores a model's captions.

    Args:
      data_name: of the data set, the second part of the metrics' names.
      scorer: (caption, record) -> (exact, F1); `score_references` or `score_scene`.
      perplexity, captions: which halves to run.
      java_metrics: METEOR and SPICE as well, where they can run; `skipped` says why not.
      attention: words of the report's captions with their attention over the picture.
      how: options of decoding, such as num_beams.
      outputs: where captions are kept while they are made.
      batch_size: images at a time.
      num_examples: pictures kept for the report.
      progress: shows a bar.
    """

    kind, order, title, usual = "captioning", 40, "Captioning", True
    options = dict(decode=Mapping[str, Any], java_metrics=bool, attention=bool)
    needs, programs = "caption", ("caption", "caption_log_likelihood")
    flags = (
        Flag("num_beams", 1, "Beams of the captions.", least=1),
        Flag("java_metrics", True, "METEOR and SPICE, where they can run."),
        Flag("attention", True, "In the report, where the model looked for each word."),
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
        "same_start_references": Metric("References with these first three words"),
        "self_bleu": Metric("Self-BLEU", Scale.HUNDREDFOLD, lower=True),
        "image_gain": Metric("Gain by the right image, nats a token", Scale.PLAIN),
    }
    # Word F1 first: exact match is near 0 for long captions even of a good model, and CIDEr-D and
    # BLEU-4 mean little to people who don't know them.
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
        """Takes --num_beams, --java_metrics and --attention."""
        super().from_flags(task, flags)
        task.update(java_metrics=flags.java_metrics, attention=flags.attention)
        if flags.num_beams > 1:
            task["decode"] = dict(num_beams=flags.num_beams)
        if task["data"].get("builtin"):
            task["data"]["objects"] = (1,)  # what exact match is defined for

    @classmethod
    def check_task(cls, task: Mapping[str, Any]) -> None:
        super().check_task(task)
        try:
            GenerationConfig().updated(task.get("decode") or {})
        except ValueError as error:
            raise ValueError(f"{called(task)}: decode: {error}") from None

    @classmethod
    def from_task(cls, task: Mapping[str, Any], setting: Setting) -> Captioning:
        """task: decode, options of decoding; java_metrics; attention. Captions so far are kept in
        workdir/eval_captions."""
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
        """Yields perplexity (of a token, over all references), exact_match, f1, bleu4, rouge_l,
        cider_d, with java_metrics meteor and spice, and the figures of collapse.py (image_gain
        with perplexity alone), all with intervals; exact_match and word_f1 also of always giving
        the most common reference (`_majority`).

        A record needs `image` and `text`, and what the scorer reads. Perplexity is
        exp(-sum of log likelihoods / number of predicted tokens), the end of text included.
        Afterwards `examples` holds pictures with captions and references.
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
                    sums.append(sum(one["log_likelihood"]))  # an image's: they are no draws apart
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
            raise ValueError(f"{self.name} has no record; check the data set and its split")
        once, owners = np.unique(
            firsts(image_of), return_inverse=True
        )  # a list may name an image twice
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
        skipped = [f"{metric.upper()} skipped: {why}" for metric, why in self.skipped.items()]
        return [line for line in (self.cut, self.warning) if line] + skipped

    def _make(
        self,
        predict: Predictor,
        batch: Sequence[Record],
        first: int,
        recent: Sequence[Record],
        before: int,
    ) -> list[dict[str, Any]]:
        """The model's outputs of a batch's records from the `first`, as `Outputs` keeps them;
        recent: the last records of the batches before; before: how many there were."""
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
        """Of each record's log likelihood and its references' predicted tokens. `cut` says how many
        references have as many as a text of max_len can, with its begin: most were longer."""
        counts = [count for several in tokens for count in several]
        full = sum(count >= max_len - 1 for count in counts)
        if full:
            self.cut = (
                f"{full} of {len(counts)} references fill all model.text.max_len={max_len} tokens, "
                "and what is longer loses its end: perplexity is of what is left"
            )
            warn(self.name, self.cut)
        predicted = of_owners(np.asarray([sum(one) for one in tokens]), owners)
        nats = bootstrap(-of_owners(np.asarray(sums), owners), predicted)
        with np.errstate(over="ignore"):  # above 709 nats a token it is infinite
            found, low, high = np.exp(nats).tolist()
        yield from scored(f"{self.name}/perplexity", found, (low, high), len(sums))

    def _collapse(
        self,
        captions: Sequence[str],
        references: Sequence[Sequence[str]],
        gains: Sequence[tuple[float, float] | None],
        once: Sequence[int],
    ) -> Iterator[tuple[str, float]]:
        """Whether the model says the same of everything; `warning` says so. once: the first record
        of each image, as a list may name it for each of its captions."""
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
        # Of a first record alone: what a later one was compared with may be its own picture.
        own = [one for i in once if (one := gains[i])]
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
        """owners: the image of each caption, which is drawn with all of its records."""
        tokenized = [caption_metrics.tokenize(caption) for caption in captions]
        wanted = [[caption_metrics.tokenize(text) for text in several] for several in references]
        stats = caption_metrics.bleu_stats(tokenized, wanted)
        yield from scored(
            f"{self.name}/bleu4",
            caption_metrics.bleu(stats.sum(0))[3],
            limits(caption_metrics.bleu(resampled_sums(of_owners(stats, owners)))[:, 3]),
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
            whole, each = caption_metrics.meteor(tokenized, wanted)
            # METEOR's own figure is not the mean of the images': its interval is theirs, moved.
            counts = np.bincount(owners)
            mean, low, high = bootstrap(of_owners(each, owners), counts)
            moved = (max(whole + low - mean, 0.0), min(whole + high - mean, 1.0))
            yield from scored(f"{self.name}/meteor", whole, moved, len(tokenized))
        if "spice" not in self.skipped:
            each = caption_metrics.spice(
                [" ".join(tokens) for tokens in tokenized],
                [[" ".join(tokens) for tokens in several] for several in wanted],
            )
            yield from with_interval(f"{self.name}/spice", each, owners=owners)
