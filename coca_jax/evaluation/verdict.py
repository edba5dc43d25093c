"""The verdict on a model: one sentence for people who don't know the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from coca_jax.evaluation.evaluators import collapse
from coca_jax.evaluation.report_data import RunFiles

# A skill is (score - baseline) / (1 - baseline): 0 is what a model reaches without looking at the
# images, 1 is perfect.
USABLE, WEAK = 0.5, 0.2
# Long captions with this CIDEr-D are usable even at a low word F1: good captions of the same image
# use different words.
GOOD_CIDER = 0.8
FEW_IMAGES = 20_000  # below this, pretrained weights help most
FEW_PASSES, FEW_PASSES_TUNING = 10, 3  # epochs; below this, longer training helps
PRETRAINED = "coca_ViT-B-32:laion2b_s13b_b90k"  # the smallest captioner with public weights


class Use(NamedTuple):
    """How well a model serves a use. evidence: the scores, in words."""

    name: str
    skill: float
    evidence: str


def verdict(
    scores: Mapping[str, Any], *, images: int = 0, passes: float = 0.0, pretrained: bool = False
) -> str:
    """Says in one sentence whether the model is usable for captioning, search and classification,
    and what would help most; '' if none of these was scored.

    Args:
        scores: contents of eval.json. Of several datasets, the one with the worst scores counts.
        images: number of training images; 0 if unknown.
        passes: number of training epochs; 0 if unknown.
        pretrained: whether training started from pretrained weights.
    """
    uses = [use for use in (_search(scores), _classes(scores), _captions(scores)) if use]
    if not uses:
        return ""
    groups = [
        ("usable for", [use for use in uses if use.skill >= USABLE]),
        ("weak at", [use for use in uses if WEAK <= use.skill < USABLE]),
        ("not usable for", [use for use in uses if use.skill < WEAK]),
    ]
    sentences = [
        f"{how} " + " and ".join(f"{use.name} ({use.evidence})" for use in found)
        for how, found in groups
        if found
    ]
    sentence = f"The model is {', '.join(sentences)}"
    if groups[0][1] == uses:
        return f"{sentence}."
    return f"{sentence}; {_remedy(images, passes, pretrained)} would help most."


def of_run(run: RunFiles) -> str:
    """The verdict on a run, by its last scores."""
    config = run.config
    images = _training_images(config)
    seen = run.last_step * config.get("batch_size", 0)
    return verdict(
        run.scores,
        images=images,
        passes=seen / images if images else 0.0,
        pretrained=bool(config.get("init_from")),
    )


def _training_images(config: Mapping[str, Any]) -> int:
    """Number of training examples, with repeated sources counted once; 0 if any is unknown."""
    digests = config.get("data_digests", ())
    return sum({d["sha256"]: d["examples"] for d in digests}.values()) if all(digests) else 0


def _remedy(images: int, passes: float, pretrained: bool) -> str:
    if not pretrained and images < FEW_IMAGES:
        few = f", since {images:,} images are few to train from scratch," if images else ""
        return f"starting from pretrained weights (such as {PRETRAINED}){few}"
    if 0 < passes < (FEW_PASSES_TUNING if pretrained else FEW_PASSES):
        return f"longer training ({passes:.2g} passes over the images so far)"
    return f"more images than {images:,}" if images else "more images or longer training"


def _by_dataset(scores: Mapping[str, Any], evaluator: str, metric: str) -> dict[str, float]:
    """{dataset: value} of a metric, without values that are not finite."""
    prefix, suffix = f"{evaluator}/", f"/{metric}"
    return {
        name[len(prefix) : -len(suffix)]: value
        for name, value in scores.items()
        if name.startswith(prefix) and name.endswith(suffix) and value is not None
    }


def _skill(value: float, baseline: float) -> float:
    return (value - baseline) / max(1 - baseline, 1e-9)


def _search(scores: Mapping[str, Any]) -> Use | None:
    found = []
    # R@5, the mean of both directions: people look at more than the first result.
    to_image = _by_dataset(scores, "retrieval", "text_to_image_r5")
    for data, to_text in _by_dataset(scores, "retrieval", "image_to_text_r5").items():
        if data not in to_image:
            continue
        name = f"retrieval/{data}"
        value = (to_text + to_image[data]) / 2
        chances = [
            scores.get(f"{name}/{to}_r5_chance") for to in ("image_to_text", "text_to_image")
        ]
        chance = sum(value or 0.0 for value in chances) / 2
        images = scores.get(f"{name}/num_images")
        among = f" of {images:,.0f} images" if images else ""
        evidence = f"R@5 {value:.0%}{among}, chance {chance:.0%}"
        found.append(Use("search", _skill(value, chance), evidence))
    return min(found, key=lambda use: use.skill, default=None)


def _classes(scores: Mapping[str, Any]) -> Use | None:
    """Rates top-1 accuracy, of the task head if the model has one."""
    found = []
    evaluator = next(
        (e for e in ("classification", "zero_shot") if _by_dataset(scores, e, "top1")), ""
    )
    for data, value in _by_dataset(scores, evaluator, "top1").items():
        name = f"{evaluator}/{data}/top1"
        chance = scores.get(f"{name}_chance") or 0.0
        majority = scores.get(f"{name}_majority") or chance
        evidence = f"top-1 {value:.0%}, majority class {majority:.0%}"
        found.append(Use("classification", _skill(value, max(chance, majority)), evidence))
    return min(found, key=lambda use: use.skill, default=None)


def _captions(scores: Mapping[str, Any]) -> Use | None:
    """Rates word F1, or CIDEr-D for long captions. A collapsed captioner has skill 0."""
    found = []
    metric = next(
        (m for m in ("word_f1", "attribute_f1") if _by_dataset(scores, "captioning", m)), ""
    )
    for data, value in _by_dataset(scores, "captioning", metric).items():
        name = f"captioning/{data}"
        exact = scores.get(f"{name}/exact_match") or 0.0
        skill = _skill(value, scores.get(f"{name}/{metric}_majority") or 0.0)
        if (scores.get(f"{name}/cider_d") or 0.0) >= GOOD_CIDER and skill >= WEAK:
            skill = max(skill, USABLE)
        evidence = f"{exact:.1%} exact matches, word F1 {value:.0%}"
        alike = scores.get(f"{name}/same_start") or 0.0
        if collapse.begin_alike(alike, scores.get(f"{name}/same_start_references") or 0.0):
            skill, evidence = 0.0, f"{evidence}, {alike:.0%} start with the same three words"
        gain = scores.get(f"{name}/image_gain")
        if gain is not None and gain < collapse.LEAST_GAIN:
            skill, evidence = 0.0, f"{evidence}, nearly independent of the image"
        found.append(Use("captioning", skill, evidence))
    return min(found, key=lambda use: use.skill, default=None)
