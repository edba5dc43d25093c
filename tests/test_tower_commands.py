"""Commands on towers, from files of the original library to scores, finds and answers: what they
say is what the original's own embeddings say."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image
from test_openvision import OPENVISION, SQUASHED, in_open_clip, write_bert
from test_pe_core import in_open_clip as pe_core
from test_tower_texts import metaclip_2, siglip, siglip_2
from test_towers import in_transformers, unit

from coca_jax.cli import convert

torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")
open_clip = pytest.importorskip("open_clip", reason="needs the extra 'parity'")
pytestmark = pytest.mark.torch

CLASSES = ["cat", "dogs", "park"]
THREE = "--batch_size=3"
CAPTIONS = ["a photo of a cat", "two dogs in a park", "it is a park", "two photos", "a dog", "cats"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Six square pictures with captions and labels."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(1)
    with open(folder / "metadata.jsonl", "w") as file:
        for number, text in enumerate(CAPTIONS):
            pixels = rng.integers(0, 256, (32, 32, 3), np.uint8) // (1 + number % 3)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            one = dict(file_name=f"{number}.png", text=text, label=CLASSES[number % 3])
            print(json.dumps(one), file=file)
    return folder


def openvision(folder, monkeypatch):
    original, words = in_open_clip(folder, OPENVISION, write_bert, SQUASHED)
    return original.encode_image, lambda texts: original.encode_text(words(texts)), SQUASHED


def pe(folder, monkeypatch):
    original = pe_core(folder, "base", monkeypatch)

    def texts(given):
        return original.encode_text(open_clip.tokenize(given, context_length=32))

    return original.encode_image, texts, dict(mean=[0.5] * 3, std=[0.5] * 3)


def clip(folder, monkeypatch):
    folder.mkdir()
    original = in_transformers("clip", folder)
    return (
        original.get_image_features,
        lambda texts: original.get_text_features(open_clip.tokenize(texts)),
        CLIPS,
    )


def of_transformers(make, numbers):
    def made(folder, monkeypatch):
        folder.mkdir()
        how = make(folder)
        words = transformers.AutoTokenizer.from_pretrained(folder)
        original = transformers.AutoModel.from_pretrained(folder).eval()

        def texts(given):
            given = [text.lower() for text in given] if make is siglip_2 else given
            ids = words(given, truncation=True, return_tensors="pt", **how).input_ids
            return original.get_text_features(ids)

        return original.get_image_features, texts, numbers

    made.__name__ = make.__name__
    return made


CLIPS = dict(mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD)
# Of the others, whose embeddings are asserted in test_towers.py and test_tower_texts.py as well,
# commands that ask for no more than these are not run.
EVERY_COMMAND = ("openvision", "pe", "siglip_2")
FAMILIES = [
    *(openvision, pe, clip),
    of_transformers(siglip, dict(mean=[0.5] * 3, std=[0.5] * 3)),
    of_transformers(siglip_2, dict(mean=[0.5] * 3, std=[0.5] * 3)),
    of_transformers(metaclip_2, CLIPS),
]


def test_pictures_alone_are_nothing_to_score(commands, photos, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/0.png").write_bytes((photos / "0.png").read_bytes())
    done = commands.run(["evaluate", "--checkpoint=none", "--data=bare"], tmp_path)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert "none of 1 examples can be used" in last


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
@pytest.mark.long
def test_scores_and_finds_are_those_of_the_originals_embeddings(
    make, commands, photos, tmp_path, monkeypatch
):
    image, text, numbers = make(tmp_path / "files", monkeypatch)
    pixels = np.stack([np.asarray(Image.open(photos / f"{n}.png")) for n in range(6)])
    pixels = (pixels / 255 - np.array(numbers["mean"])) / np.array(numbers["std"])
    with torch.no_grad():
        images = unit(image(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float()))
        texts = unit(text(CAPTIONS))
        classes = unit(text([f"a photo of {name}" for name in CLASSES]))
        wanted = unit(text(["two dogs"]))
    if make is pe:  # of sizes that no public trunk has
        convert.from_open_clip(str(tmp_path / "files"), str(tmp_path / "weights"))
    else:
        done = commands.run(["convert", "--input=files", "--out=weights"], tmp_path)
        assert done.returncode == 0, done.stderr
    weights = "files" if make is openvision else "weights"  # both are taken; one is faster
    (tmp_path / "prompts.txt").write_text("a photo of {}\n")

    # Without --tasks, captions are left out, and said to be. Three at a time of three and of six:
    # every command has the same two programs.
    command = ["evaluate", f"--checkpoint={weights}", f"--data={photos}", "--name=six", THREE]
    done = commands.run([*command, "--prompts=prompts.txt", "--out=scores"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "captioning left out: this model has no decoder" in done.stderr
    scores = json.loads((tmp_path / "scores/eval.json").read_text())
    other = ["evaluate", f"--checkpoint={tmp_path}", f"--data={photos}", "--out=scores"]
    done = commands.run(other, tmp_path)
    told = f"--out=scores: contains the scores of {tmp_path / weights}."
    assert done.returncode == 2 and told in done.stderr
    right = (images @ classes.T).argmax(1) == np.arange(6) % 3
    assert scores["zero_shot/six/top1"] == pytest.approx(right.mean())
    similarity = images @ texts.T
    first = similarity.argmax(1) == np.arange(6)
    assert scores["retrieval/six/image_to_text_r1"] == pytest.approx(first.mean())
    first = similarity.argmax(0) == np.arange(6)
    assert scores["retrieval/six/text_to_image_r1"] == pytest.approx(first.mean())

    if make.__name__ not in EVERY_COMMAND:
        return
    command = ["search", "index", str(photos), "--checkpoint=weights", "--out=index"]
    done = commands.run([*command, THREE], tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["pictures"] == 6
    done = commands.run(["search", "query", "two dogs", "--index=index", "--k=6"], tmp_path)
    assert done.returncode == 0, done.stderr
    finds = [json.loads(line) for line in done.stdout.splitlines()[:-1]]
    by_place = {os.path.basename(find["image"]): find["score"] for find in finds}
    for number, score in enumerate((images @ wanted.T)[:, 0]):
        assert by_place[f"{number}.png"] == pytest.approx(score, abs=2e-3)  # the index has float16


def posted(address, picture, **fields):
    """(status, answer) of a form with a picture."""
    mark = "a mark between fields"
    parts = [
        f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    head = f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
    body = b"".join([*parts, head.encode(), picture, f"\r\n--{mark}--\r\n".encode()])
    how = {"Content-Type": f'multipart/form-data; boundary="{mark}"'}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body, how)) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_serve_answers_what_towers_can_and_refuses_captions(photos, tmp_path, monkeypatch):
    pytest.importorskip("fastapi", reason="needs the extra 'serve'")
    image, text, numbers = openvision(tmp_path / "files", monkeypatch)
    convert.from_open_clip(str(tmp_path / "files"), str(tmp_path / "weights"))
    command = [sys.executable, "-m", "coca_jax", "serve", "--port=0"]
    process = subprocess.Popen(
        [*command, f"--checkpoint={tmp_path / 'weights'}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"},
    )
    said = ""
    while "serving at" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    assert "this model has no decoder" in said
    address = re.search(r"http://127.0.0.1:\d+", said)[0] + "/api/"
    picture = (photos / "1.png").read_bytes()
    pixels = np.asarray(Image.open(photos / "1.png"))[None] / 255
    pixels = (pixels - np.array(numbers["mean"])) / np.array(numbers["std"])
    with torch.no_grad():
        wanted = unit(image(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float()))[0]
        first = unit(text([f"a photo of a {name}" for name in CLASSES])) @ wanted
    try:
        status, found = posted(f"{address}embed", picture, text="two dogs")
        assert status == 200
        np.testing.assert_allclose(found["images"][0], wanted, atol=1e-5)
        labels = dict(label="\n".join(CLASSES), template="a photo of a {}")
        status, found = posted(f"{address}zero_shot", picture, **labels)
        assert status == 200
        assert found["results"][0]["labels"][0]["label"] == CLASSES[int(first.argmax())]
        asked = dict(caption={}, explain=dict(text="cats"), answer=dict(question="what?"))
        for name, fields in asked.items():
            status, found = posted(f"{address}{name}", picture, **fields)
            assert status == 404 and "no text decoder" in found["detail"]
        with urllib.request.urlopen(f"{address}info") as answer:
            assert json.loads(answer.read())["captions"] is False
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err
