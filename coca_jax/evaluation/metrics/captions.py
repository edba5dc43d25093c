"""BLEU, ROUGE-L and CIDEr-D in NumPy; METEOR and SPICE by pycocoevalcap, which need Java.

The figures are those of the COCO caption evaluation (Chen et al. 2015), of which pycocoevalcap is
the maintained package: on equal tokens they agree to 1e-6. Captions and references are lists of
tokens (`tokenize`); N images, each with one caption and one or several references.
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

# Where words of these scripts end is not written: Han, Hiragana, Katakana, Thai, Lao, Khmer.
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
    """Words in lower case without punctuation, as the Penn Treebank tokenizer of COCO gives them.

    Contractions are two words (do n't, man 's), hyphenated words one, brackets become -lrb- and so
    on. Scripts without spaces between words (Chinese, Japanese, Thai) give one token a character.
    """
    text = text.lower().replace("\u2019", "'").replace("\u2018", "'")
    text = _CONTRACTED.sub(r" \1", text)
    text = _JOINED.sub(lambda m: " ".join(part for part in m.groups() if part), text)
    return [_BRACKETS.get(t, t) for t in _TOKEN.findall(text) if t not in _DROPPED]


def _ngrams(tokens: Tokens, n: int) -> collections.Counter:
    return collections.Counter(zip(*(tokens[i:] for i in range(n))))


# ---- BLEU


def bleu_stats(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """What each image adds to corpus BLEU (Papineni et al. 2002): float64 [N, 10].

    Columns: right n-grams for n = 1 to 4 (clipped at the most that one reference has), all n-grams
    of the caption for n = 1 to 4, length of the caption, length of the closest reference (of two
    equally close the shorter).
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
    """BLEU-1 to BLEU-4, [..., 4], of summed statistics [..., 10].

    As in COCO's code, 1e-15 right n-grams are added to each count and 1e-9 to each divisor: with
    no right 4-gram BLEU-4 is tiny and not 0.
    """
    sums = np.asarray(sums, np.float64)
    precision = (sums[..., :4] + 1e-15) / (sums[..., 4:8] + 1e-9)
    mean = np.exp(np.cumsum(np.log(precision), -1) / np.arange(1, 5))
    ratio = (sums[..., 8:9] + 1e-15) / (sums[..., 9:10] + 1e-9)
    return mean * np.exp(np.minimum(1 - 1 / ratio, 0))


# ---- ROUGE-L


def rouge_l(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """ROUGE-L of each image (Lin 2004): float64 [N].

    The F measure, recall weighted 1.2 squared, of the best precision and the best recall that the
    longest common subsequence with a reference gives.
    """
    scores = []
    for caption, several in zip(captions, references):
        # An empty text counts as one empty word, as in COCO's code.
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
    """CIDEr-D of each image (Vedantam et al. 2015): float64 [N], 0 to 10.

    Mean over n = 1 to 4 and over the references of the cosine of tf-idf weighted n-gram counts,
    the caption's clipped at the reference's, times exp(-d^2 / 72), d the difference in length,
    times 10. Document frequencies are those of the references given, so the figure depends on the
    set that is evaluated; of a single image it is 0.
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
            # Lengths are counted in bigrams, as in COCO's code.
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
    """Why 'meteor' or 'spice' cannot be computed here; '' when it can."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        return f"the package pycocoevalcap is missing: {extras.remedy('eval')}"
    if shutil.which("java") is None:
        return "java is not installed"
    if metric == "spice":
        folder = pathlib.Path(next(iter(spec.submodule_search_locations))) / "spice"
        if not (folder / "lib" / "stanford-corenlp-3.6.0-models.jar").exists():
            return (
                "its language models are not there; `python -m pycocoevalcap.spice."
                "get_stanford_models` downloads them (400 MB)"
            )
    return ""


def meteor(
    captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> tuple[float, np.ndarray]:
    """METEOR 1.5 for English (Denkowski and Lavie 2014): (of the set, of each image [N]).

    The first is METEOR's own figure from statistics summed over the set, not the mean of the
    second. Runs Java; raises ValueError saying why it cannot.
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
                raise ValueError(f"METEOR ended too soon: {' '.join(reason)}") from None
    return float(each[-1]), np.asarray([float(score) for score in each[:-1]])


def spice(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """SPICE F of each image (Anderson et al. 2016), from texts: float64 [N].

    Runs Java with 8 GB of memory; raises ValueError saying why it cannot.
    """
    if why_not("spice"):
        raise ValueError(f"SPICE: {why_not('spice')}")
    from pycocoevalcap.spice.spice import Spice

    truth = {i: list(several) for i, several in enumerate(references)}
    candidates = {i: [caption] for i, caption in enumerate(captions)}
    try:
        _, scores = Spice().compute_score(truth, candidates)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"SPICE did not run: {error}") from None
    return np.nan_to_num([score["All"]["f"] for score in scores])
