"""Caption metrics: BLEU, ROUGE-L and CIDEr-D in NumPy; METEOR and SPICE through pycocoevalcap (Java).

The NumPy metrics agree with the COCO caption evaluation (Chen et al. 2015; maintained as
pycocoevalcap) to 1e-6 on equal tokens. Inputs are token lists (`tokenize`) for N images, each with
one caption and one or more references.
"""

from __future__ import annotations

import collections
import importlib.util
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

import numpy as np

from coca_jax.runtime import extras

Tokens = Sequence[str]

# Scripts without spaces between words: Han, Hiragana, Katakana, Thai, Lao, Khmer.
_UNSPACED = "\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1780-\u17ff"
_WORD = f"[^\\s!-/:-@\\[-^`{{-~\u00a1-\u00bf\u2000-\u206f\u2190-\u2bff\u3000-\u3004{_UNSPACED}"
_WORD += "\uff01-\uff0f\uff1a-\uff20\u0964\u0965]"
_TOKEN = re.compile(
    "|".join(
        (
            r"https?://\S+|[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
            r"(?:mr|mrs|ms|dr|st|jr|sr|vs|etc|prof|fig|al)\.|(?:[a-z]\.){2,}",
            r"n't\b|'(?:s|m|re|ve|ll|d)\b",
            r"\d+(?:[.,:/]\d+)+(?!\w)",
            f"{_WORD}+(?:['./+-]{_WORD}+)*",
            f"[{_UNSPACED}]",
            r"[?!]{2,}",
            r"\S",
        )
    )
)
_DROPPED = set(
    "'`.?!,:;-\u2013\u2014\u2026\"\u201c\u201d\u3001\u3002\u0964\u0965\uff01\uff0c\uff1f"
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_CONTRACTED = re.compile(r"(?<=\w)(n't|'(?:s|m|re|ve|ll|d))\b")
_JOINED = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(gim|lem)(me)\b")


def tokenize(text: str) -> list[str]:
    """Splits a text into lowercase words without punctuation, like COCO's Penn Treebank tokenizer.

    Contractions become two tokens (do n't, man 's), hyphenated words one, and brackets -lrb- etc.
    Scripts without spaces between words (Chinese, Japanese, Thai) give one token per character.
    """
    text = text.lower().replace("\u2019", "'").replace("\u2018", "'")
    text = _CONTRACTED.sub(r" \1", text)
    text = _JOINED.sub(lambda m: " ".join(part for part in m.groups() if part), text)
    return [_BRACKETS.get(t, t) for t in _TOKEN.findall(text) if t not in _DROPPED]


def _ngrams(tokens: Tokens, n: int) -> collections.Counter:
    return collections.Counter(zip(*(tokens[i:] for i in range(n))))


# ---- BLEU


def bleu_stats(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """Returns the statistics of each image for corpus BLEU (Papineni et al. 2002): float64 [N, 10].

    Columns: matching n-grams for n = 1 to 4 (clipped at their maximum count in one reference), all
    n-grams of the caption for n = 1 to 4, length of the caption, length of the closest reference
    (the shorter of two equally close ones).
    """
    rows = []
    for caption, several in zip(captions, references):
        right, made = [], []
        for n in range(1, 5):
            most: collections.Counter = collections.Counter()
            for reference in several:
                most |= _ngrams(reference, n)
            right.append((_ngrams(caption, n) & most).total())
            made.append(max(len(caption) - n + 1, 0))
        closest = min((abs(len(r) - len(caption)), len(r)) for r in several)[1]
        rows.append([*right, *made, len(caption), closest])
    return np.asarray(rows, np.float64)


def bleu(sums: np.ndarray) -> np.ndarray:
    """Computes BLEU-1 to BLEU-4, [..., 4], from summed statistics [..., 10]."""
    sums = np.asarray(sums, np.float64)
    # COCO's smoothing constants: without a matching 4-gram, BLEU-4 is tiny but not 0.
    precision = (sums[..., :4] + 1e-15) / (sums[..., 4:8] + 1e-9)
    mean = np.exp(np.cumsum(np.log(precision), -1) / np.arange(1, 5))
    ratio = (sums[..., 8:9] + 1e-15) / (sums[..., 9:10] + 1e-9)
    return mean * np.exp(np.minimum(1 - 1 / ratio, 0))


# ---- ROUGE-L


def rouge_l(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """Returns ROUGE-L per image (Lin 2004): float64 [N].

    ROUGE-L is the F measure (beta = 1.2) of the best precision and the best recall over the
    references, based on the longest common subsequence.
    """
    scores = []
    for caption, several in zip(captions, references):
        # COCO's code treats an empty text as one empty word.
        words = list(caption) or [""]
        wanted = [list(reference) or [""] for reference in several]
        common = [_common_length(words, reference) for reference in wanted]
        precision = max(common) / len(words)
        recall = max(c / len(reference) for c, reference in zip(common, wanted))
        scores.append(
            2.44 * precision * recall / (recall + 1.44 * precision) if max(common) else 0.0
        )
    return np.asarray(scores, np.float64)


def _common_length(a: Tokens, b: Tokens) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = (
                row[j],
                diagonal + 1 if word == other else max(row[j], row[j - 1]),
            )
    return row[-1]


# ---- CIDEr-D


def cider_d(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """Returns CIDEr-D per image (Vedantam et al. 2015): float64 [N], 0 to 10.

    CIDEr-D is 10 times the mean, over n = 1 to 4 and the references, of the cosine similarity of
    tf-idf weighted n-gram counts (clipped at the reference's counts) times exp(-d^2 / 72), where d
    is the difference in length. Document frequencies come from the given references, so the value
    depends on the evaluation set; it is 0 for a single image.
    """
    frequency: collections.Counter = collections.Counter()
    for several in references:
        frequency.update({g for r in several for n in range(1, 5) for g in _ngrams(r, n)})
    log_images = np.log(float(len(references))) if len(references) else 0.0
    idf = {gram: log_images - np.log(count) for gram, count in frequency.items()}

    def weigh(tokens: Tokens) -> list[tuple[dict, float]]:
        vectors = []
        for n in range(1, 5):
            vector = {g: c * idf.get(g, log_images) for g, c in _ngrams(tokens, n).items()}
            vectors.append((vector, float(np.sqrt(sum(w * w for w in vector.values())))))
        return vectors

    scores = []
    for caption, several in zip(captions, references):
        weights, total = weigh(caption), 0.0
        for reference in several:
            # COCO's code measures lengths in bigrams.
            gap = max(len(caption) - 1, 0) - max(len(reference) - 1, 0)
            cosine = 0.0
            for (a, norm_a), (b, norm_b) in zip(weights, weigh(reference)):
                if norm_a and norm_b:
                    inner = sum(min(w, b[g]) * b[g] for g, w in a.items() if g in b)
                    cosine += inner / (norm_a * norm_b)
            total += cosine / 4 * np.exp(-(gap**2) / 72.0)
        scores.append(10.0 * total / len(several))
    return np.asarray(scores, np.float64)


# ---- Metrics that need Java


def why_not(metric: str) -> str:
    """Returns why 'meteor' or 'spice' cannot be computed; '' if it can."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        return f"pycocoevalcap is not installed: {extras.remedy('eval')}"
    if shutil.which("java") is None:
        return "java is not installed"
    if metric == "spice":
        folder = pathlib.Path(next(iter(spec.submodule_search_locations))) / "spice"
        if not (folder / "lib" / "stanford-corenlp-3.6.0-models.jar").exists():
            return (
                "the Stanford CoreNLP models are missing. Run `python -m pycocoevalcap.spice."
                "get_stanford_models` (400 MB)"
            )
    return ""


def meteor(
    captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> tuple[float, np.ndarray]:
    """Returns METEOR 1.5 for English (Denkowski and Lavie 2014): (corpus score, image scores [N]).

    The corpus score is computed from summed statistics and is not the mean of the image scores.
    Runs Java. Raises ValueError if METEOR cannot run.
    """
    if why_not("meteor"):
        raise ValueError(f"METEOR: {why_not('meteor')}")
    from pycocoevalcap.meteor import meteor as package

    jar = pathlib.Path(package.__file__).parent / package.METEOR_JAR
    command = ["java", "-jar", "-Xmx2G", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        ) as process:

            def ask(line: str) -> str:
                process.stdin.write(f"{line}\n".encode())
                process.stdin.flush()
                return answer()

            def answer() -> str:
                line = process.stdout.readline().decode()
                if not line.endswith("\n"):
                    raise BrokenPipeError
                return line.strip()

            try:
                stats = []
                for caption, several in zip(captions, references):
                    texts = [" ".join(text) for text in (*several, caption)]
                    parts = ["SCORE", *(text.replace("|||", "") for text in texts)]
                    stats.append(ask(" ||| ".join(parts)))
                each = [ask(" ||| ".join(["EVAL", *stats]))]
                each += [answer() for _ in stats]
            except BrokenPipeError:
                process.kill()
                process.wait()
                errors.seek(0)
                reason = errors.read().decode(errors="replace").strip().splitlines()[-1:]
                raise ValueError(f"METEOR: java exited early: {' '.join(reason)}") from None
    return float(each[-1]), np.asarray([float(score) for score in each[:-1]])


def spice(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Returns the SPICE F score per image (Anderson et al. 2016), from raw texts: float64 [N].

    Runs Java with 8 GB of memory. Raises ValueError if SPICE cannot run.
    """
    if why_not("spice"):
        raise ValueError(f"SPICE: {why_not('spice')}")
    from pycocoevalcap.spice.spice import Spice

    truth = {i: list(several) for i, several in enumerate(references)}
    candidates = {i: [caption] for i, caption in enumerate(captions)}
    try:
        _, scores = Spice().compute_score(truth, candidates)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"SPICE: {error}") from None
    return np.nan_to_num([score["All"]["f"] for score in scores])
