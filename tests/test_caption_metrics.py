"""Caption metrics against pycocoevalcap: its figures for a fixed sample, and itself where it is."""

import os
import sys

import numpy as np
import pytest

from coca_jax.evaluation.evaluators import captioning
from coca_jax.evaluation.metrics import captions as cm

SAMPLE = [
    (
        "A man riding a horse on the beach.",
        [
            "A man rides a horse along the beach.",
            "Someone on a brown horse near the sea.",
            "A man riding a horse on the sand",
        ],
    ),
    (
        "two dogs are playing with a ball",
        [
            "Two dogs play with a red ball in the grass.",
            "A pair of dogs is playing with a ball.",
        ],
    ),
    (
        "a red bus",
        ["A red double-decker bus drives down the street.", "The bus is red.", "a red bus"],
    ),
    ("", ["A plate of food.", "Some food on a white plate"]),
    (
        "a cat's tail isn't long",
        ["The cat's tail isn't long.", "a cat with a short tail (black)"],
    ),
    ("a a a a a a a a", ["a small house", "a house, small and white"]),
    (
        "children in front of the school building",
        ["Children in front of the school building."] * 2,
    ),
]
CAPTIONS = [cm.tokenize(caption) for caption, _ in SAMPLE]
REFERENCES = [[cm.tokenize(text) for text in several] for _, several in SAMPLE]

# What pycocoevalcap 1.2 (its Java tokenizer included) says of SAMPLE.
BLEU = [0.7421947890257327, 0.7115467726080522, 0.6582263087956645, 0.6163509182006047]
ROUGE = [0.875, 0.6112224448897796, 1.0, 0.0, 0.8571428571428571, 0.19805194805194803, 1.0]
CIDER = [
    *(3.859945788370951, 2.7709964389785355, 3.6446340480277257, 0.0, 4.813518452128321),
    *(0.012081224155563439, 10.0),
]
METEOR = 0.48225083369813837
METEOR_EACH = [
    *(0.9018531228551819, 0.4178234145790988, 1.0, 0.0, 0.5686095310758887),
    *(0.05594405594405594, 1.0),
]


def test_fixed_sample_has_the_reference_figures():
    np.testing.assert_allclose(cm.bleu(cm.bleu_stats(CAPTIONS, REFERENCES).sum(0)), BLEU, atol=1e-6)
    np.testing.assert_allclose(cm.rouge_l(CAPTIONS, REFERENCES), ROUGE, atol=1e-6)
    np.testing.assert_allclose(cm.cider_d(CAPTIONS, REFERENCES), CIDER, atol=1e-6)


def random_texts(rng, count):
    """Captions and references over few words, so that n-grams repeat and scores tie; some empty."""
    words = np.asarray("a the dog cat runs sits on red mat house".split())

    def text(low):
        return list(rng.choice(words, rng.integers(low, 13)))

    captions = [text(0) for _ in range(count)]
    references = [[text(0) for _ in range(rng.integers(1, 6))] for _ in range(count)]
    for i in range(0, count, 5):  # repeated: the caption is a reference, references repeat
        references[i][0] = list(captions[i])
        references[i].append(list(references[i][-1]))
    captions[1], references[2] = [], [[]]
    captions[3], references[3] = [], [[], ["a"]]
    return captions, references


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [40, 5])
def test_random_texts_score_as_in_pycocoevalcap(seed, count):
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    captions, references = random_texts(np.random.default_rng(seed), count)
    said = {i: [" ".join(c)] for i, c in enumerate(captions)}
    wanted = {i: [" ".join(r) for r in several] for i, several in enumerate(references)}
    stats = cm.bleu_stats(captions, references)
    expected, each = bleu.Bleu(4).compute_score(wanted, said, verbose=0)
    np.testing.assert_allclose(cm.bleu(stats.sum(0)), expected, atol=1e-6)
    np.testing.assert_allclose(cm.bleu(stats).T, each, atol=1e-6)
    mean, each = Rouge().compute_score(wanted, said)
    np.testing.assert_allclose(cm.rouge_l(captions, references), each, atol=1e-6)
    mean, each = Cider().compute_score(wanted, said)
    np.testing.assert_allclose(cm.cider_d(captions, references), each, atol=1e-6)
    assert cm.cider_d(captions, references).mean() == pytest.approx(mean, abs=1e-6)


def test_one_image_and_nothing_right():
    stats = cm.bleu_stats([["x"]], [[["y", "z"]]])
    assert stats.tolist() == [[0, 0, 0, 0, 1, 0, 0, 0, 1, 2]]
    assert cm.bleu(stats)[0, 3] < 1e-6 and cm.rouge_l([["x"]], [[["y"]]])[0] == 0
    assert cm.cider_d([["x", "y"]], [[["x", "y"]]])[0] == 0  # no other image: no idf
    assert cm.bleu(np.zeros((2, 10))).shape == (2, 4)


@pytest.mark.slow
@pytest.mark.skipif(bool(cm.why_not("meteor")), reason=cm.why_not("meteor") or "it runs")
def test_meteor_has_the_reference_figures():
    whole, each = cm.meteor(CAPTIONS, REFERENCES)
    assert whole == pytest.approx(METEOR, abs=1e-6)
    np.testing.assert_allclose(each, METEOR_EACH, atol=1e-6)


def test_what_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(cm.shutil, "which", lambda name: None)
    monkeypatch.setattr(cm.importlib.util, "find_spec", lambda name: None)
    assert "pip install" in cm.why_not("spice")
    with pytest.raises(ValueError, match="METEOR: pycocoevalcap is not installed"):
        cm.meteor([["a"]], [[["a"]]])


JAVA = """#!{python} -S
import sys
for line in sys.stdin:
    kind, *parts = line.rstrip("\\n").split(" ||| ")
    if "fall" in line:
        sys.exit("out of memory")
    if kind == "SCORE":  # numbers of references, and of the caption's words
        print(len(parts) - 1, len(parts[-1].split()), flush=True)
    else:
        for part in (*parts, " ".join(parts)):
            print(sum(map(int, part.split())) / 10, flush=True)
"""
SPICE = """
class Spice:
    def compute_score(self, truth, said):
        if "fall" in said[0]:
            raise OSError("no java")
        scores = [float(said[i][0] in truth[i]) if truth[i] else float("nan") for i in truth]
        return 0.5, [{"All": {"f": score}} for score in scores]
"""


@pytest.fixture
def java_metrics(tmp_path, monkeypatch):
    """In the place of Java and of the package, which are large: what speaks as they do."""
    for name in [name for name in sys.modules if name.split(".")[0] == "pycocoevalcap"]:
        monkeypatch.delitem(sys.modules, name)
    package = tmp_path / "pycocoevalcap"
    for part in ("meteor", "spice/lib"):
        (package / part).mkdir(parents=True)
    (package / "meteor" / "meteor.py").write_text("METEOR_JAR = 'meteor.jar'\n")
    (package / "spice" / "spice.py").write_text(SPICE)
    (package / "__init__.py").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "java").write_text(JAVA.format(python=sys.executable))
    (tmp_path / "bin" / "java").chmod(0o755)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    yield package
    for name in [name for name in sys.modules if name.split(".")[0] == "pycocoevalcap"]:
        del sys.modules[name]


def test_meteor_is_asked_for_each_image_and_then_for_the_set(java_metrics):
    captions = [["a", "dog"], ["a", "|||", "cat", "runs"]]
    references = [[["a", "dog"], ["dog"]], [["cat"]]]
    whole, each = cm.meteor(captions, references)
    assert each.tolist() == [(2 + 2) / 10, (1 + 3) / 10] and whole == 0.8  # a cat runs
    with pytest.raises(ValueError, match="METEOR: .*out of memory$"):
        cm.meteor([["fall"]], [[["a"]]])


@pytest.mark.parametrize("whole, limits", [(0.03, (0.0, 0.53)), (0.98, (0.48, 1.0))])
def test_the_interval_of_meteor_stays_in_its_range(whole, limits, java_metrics, monkeypatch):
    monkeypatch.setattr(cm, "meteor", lambda said, wanted: (whole, np.array([0.0, 1.0])))
    evaluator = captioning.Captioning("m", java_metrics=True)
    references, owners = [["a cat"], ["a cow"]], np.arange(2)
    got = dict(evaluator._corpus_metrics(["a cat", "a dog"], references, owners))
    found = [got[f"captioning/m/meteor{end}"] for end in ("", "_low", "_high")]
    assert found == pytest.approx([whole, *limits])


def test_spice_gives_a_figure_an_image(java_metrics):
    assert "models are missing" in cm.why_not("spice") and not cm.why_not("meteor")
    with pytest.raises(ValueError, match="SPICE: .*models are missing"):
        cm.spice(["a"], [["a"]])
    (java_metrics / "spice" / "lib" / "stanford-corenlp-3.6.0-models.jar").touch()
    assert cm.spice(["a", "b", "c"], [["a"], ["a"], []]).tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="SPICE.*no java"):
        cm.spice(["fall"], [["a"]])
    (java_metrics.parent / "bin" / "java").unlink()
    os.environ["PATH"] = str(java_metrics.parent / "bin")
    assert cm.why_not("meteor") == "java is not installed"


HINDI = "\u090f\u0915 \u092e\u0947\u0902\u0922\u0915"
TOKENS = {  # as the tokenizer of the COCO evaluation gives them
    "A man's dog doesn't run.": "a man 's dog does n't run",
    "a black/white t-shirt (with logo) & 50% off": (
        "a black/white t-shirt -lrb- with logo -rrb- & 50 % off"
    ),
    "It's 3.5 miles, 1,000 people; U.S. flag!": "it 's 3.5 miles 1,000 people u.s. flag",
    "\u201cquoted\u201d \u2018single\u2019 words... and\u2014dash -- two": (
        "quoted single words and dash two"
    ),
    "He said 'hello' to the boys' team": "he said hello to the boys team",
    "can't cannot gonna I'm you're we've he'll": "ca n't can not gon na i 'm you 're we 've he 'll",
    "10:30 a.m. Mr. Smith\u2019s cat": "10:30 a.m. mr. smith 's cat",
    "ice cream: yes?!": "ice cream yes ?!",
    "X-ray 2-3 half-eaten": "x-ray 2-3 half-eaten",
    "": "",
    "...": "",
    "Ein Frosch l\u00e4uft \u00fcber die Stra\u00dfe.": (
        "ein frosch l\u00e4uft \u00fcber die stra\u00dfe"
    ),
    "\u041b\u044f\u0433\u0443\u0448\u043a\u0430.": "\u043b\u044f\u0433\u0443\u0448\u043a\u0430",
    # Marks belong to their letters; the danda ends a sentence.
    f"{HINDI}\u0964": HINDI,
}


def test_tokens():
    for text, expected in TOKENS.items():
        assert " ".join(cm.tokenize(text)) == expected
    # Unlike there, text without spaces is cut into characters.
    assert cm.tokenize("\u30ab\u30a8\u30eb\u3002a") == ["\u30ab", "\u30a8", "\u30eb", "a"]
