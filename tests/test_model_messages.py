"""What is said where a model is loaded or asked in another way than there is."""

import io
import os
import re
import time
import urllib.parse
import warnings

import jax
import numpy as np
import pytest
from PIL import Image
from test_inference import (  # noqa: F401
    images,
    model,
    no_compile_cache,
    random_params,
    tiny_parts,
    words,
)
from test_search import encoded

import coca_jax
from coca_jax.config import typed
from coca_jax.inference import export_folder, preprocess
from coca_jax.inference import tokenization as text_arrays
from coca_jax.inference.devices import Devices
from coca_jax.inference.model import CoCaModel
from coca_jax.interop import weights_files
from coca_jax.models import coca


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("exports") / "hub"
    export_folder.write(model, str(folder))
    return folder


def test_a_file_of_weights_is_no_tag(tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ValueError) as told:
        coca_jax.load("coca_ViT-B-32", pretrained=str(file))
    wanted = f"coca-jax convert --input={file} --model=coca_ViT-B-32 --out=FOLDER"
    assert wanted in str(told.value)


def test_one_file_of_a_model_names_its_folder(exported, monkeypatch):
    monkeypatch.chdir(exported.parent)
    for name in ("params.safetensors", "config.json"):
        with pytest.raises(ValueError, match="is one file of a model; give the folder hub$"):
            coca_jax.load(f"hub/{name}")
        with pytest.raises(ValueError, match="give the folder hub$"):
            weights_files.find(f"hub/{name}")
    (exported.parent / "run").mkdir(exist_ok=True)
    (exported.parent / "run/config.json").write_text("{}")
    with pytest.raises(ValueError, match="^run/config.json is one file .*; give the folder run$"):
        coca_jax.load("run/config.json")
    with pytest.raises(ValueError, match="--input=hub is converted already, .*--to=open_clip"):
        weights_files.find("hub")


def test_options_that_models_do_not_have_are_a_line_before_anything_is_read(exported):
    with pytest.raises(TypeError, match="batchsize"):
        coca_jax.load("none", batchsize=3)
    for size in (0, -1, 2.5, None):
        with pytest.raises(ValueError, match=f"^batch_size={size}: give a whole number of images"):
            coca_jax.load("none", batch_size=size)
    for path in (None, 3, b"runs", ""):
        with pytest.raises(ValueError, match=f"^path={path!r}: give a run, an export, weights"):
            coca_jax.load(path)
    with pytest.raises(ValueError, match="^dtype='fp16'"):
        coca_jax.load("none", dtype="fp16")
    assert coca_jax.load(str(exported), batch_size=np.int64(2), devices=jax.devices()[:1])


def test_a_batch_of_none_is_refused_by_the_model_too(model):  # noqa: F811
    with pytest.raises(ValueError, match="^batch_size=0: give"):
        CoCaModel(model.config, model.params, model.vocabulary, batch_size=0)


def test_one_prompt_and_no_prompt(model, images):  # noqa: F811
    names = ["red", "green"]
    one = model.zero_shot(images[:2], names, "a {}")
    np.testing.assert_array_equal(one, model.zero_shot(images[:2], names, ["a {}"]))


def test_an_empty_path_and_a_file_url(model, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="^images='': give the path or URL"):
        model.caption("")
    file = tmp_path / "a picture%20.png"
    file.write_bytes(encoded(3))
    wanted = model.encode_image(str(file))
    quoted = urllib.parse.quote(os.fspath(file))
    for url in (f"file://{file}", f"file://{quoted}", f"file:{quoted}", file.as_uri()):
        np.testing.assert_array_equal(model.encode_image(url), wanted)
        np.testing.assert_array_equal(model.encode_image([url]), wanted)


def test_ids_and_beams_beyond_the_vocabulary_are_refused(model, images):  # noqa: F811
    for how in (
        dict(num_beams=100_000),
        dict(bad_words_ids=[[5, 100_000]]),
        dict(forced_prefix_ids=[100_000]),
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(how))}.*100000|100000"):
            model.caption(images[:1], **how)


def test_a_question_to_a_head_that_reads_none_is_refused(words, images):  # noqa: F811
    config = tiny_parts()[0]
    config.head.kind = "classification"
    config = typed(config)
    params = random_params(coca.build(config.model, head=config.head, num_classes=2))
    headed = CoCaModel(config, params, words, class_names=["cat", "dog"])
    for texts in ("what?", ["what?", "who?"], []):
        with pytest.raises(ValueError, match="^texts: a head of kind 'classification' reads none"):
            headed.classify(images[:2], texts)


def test_class_names_are_as_many_as_the_head_has(words):  # noqa: F811
    config = tiny_parts()[0]
    config.head.kind = "classification"
    config = typed(config)
    params = random_params(coca.build(config.model, head=config.head, num_classes=3))
    for names, says in (
        (["cat", "dog"], "^class_names: 2 names for a task head of 3 classes; give one for each"),
        ([], "^class_names: 0 names for a task head of 3 classes"),
        ("cat", "^class_names='cat': give a list of the names$"),
        (["cat", "dog", 3], r"^class_names\[2\]=3: give a str"),
    ):
        with pytest.raises(ValueError, match=says):
            CoCaModel(config, params, words, class_names=names)
    named = CoCaModel(config, params, words, class_names=iter(("cat", "dog", "owl")))
    assert named.class_names == ["cat", "dog", "owl"]


def test_ids_that_the_model_has_not_are_refused(model, images):  # noqa: F811
    """Those of another tokenizer gave embeddings, of other words."""
    ids, valid = model.tokenize_with_mask(["a red circle", "a"])
    wanted = model.encode_text(["a red circle", "a"])
    for given in (ids, ids.astype(np.int64), ids.tolist()):
        found = model.encode_tokens(given, valid.tolist())
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    pixels = np.zeros((2, 16, 16, 3), np.float32)
    for bad in (320, -1):
        other = ids.copy()
        other[1, 1] = bad
        says = rf"holds {min(bad, 0)}\.\.{max(bad, ids.max())}; ids go from 0 to 319$"
        with pytest.raises(ValueError, match=f"^tokens {says}"):
            model.encode_tokens(other, valid)
        with pytest.raises(ValueError, match=f"^token_ids {says}"):
            model.forward(pixels, other)
    with pytest.raises(ValueError, match="^tokens are float32: give whole numbers, the ids of"):
        model.encode_tokens(ids.astype(np.float32), valid)
    with pytest.raises(ValueError, match=r"^tokens have shape \(2, 24\) and valid \(24,\); give"):
        model.encode_tokens(ids, valid[0])


def test_a_picture_whose_file_was_closed_is_told_so(model, images, tmp_path):  # noqa: F811
    """PIL reads pixels when they are asked for: it was told to be damaged, without a reason."""
    for name in ("a.png", "a.jpg", "a.gif"):
        Image.fromarray(images[0]).save(tmp_path / name)
        with Image.open(tmp_path / name) as left:
            pass
        closed = Image.open(tmp_path / name)
        closed.close()
        with open(tmp_path / name, "rb") as file:
            behind = Image.open(file)
        for picture in (left, closed, behind):
            with pytest.raises(
                ValueError, match=r"^images\[1\]: its file was closed before its pix"
            ):
                model.encode_image([images[0], picture])
        with Image.open(tmp_path / name) as read:
            read.load()
        assert model.encode_image(read).shape == (1, 16)
    cut = Image.open(io.BytesIO((tmp_path / "a.jpg").read_bytes()[:-40]))
    with pytest.raises(ValueError, match="^damaged image: image file is truncated"):
        model.encode_image(cut)


def test_min_tokens_beyond_the_room_is_refused(model, images):  # noqa: F811
    known = len(model.vocabulary.encode("a red"))
    for prompt, before, least in (("", 0, 24), ("a red", known, 24 - known)):
        says = (
            f"^min_new_tokens={least}: behind a prompt of {before} tokens the model writes {least - 1} "
            r"\(model.text.max_len=24\); lower it$"
        )
        with pytest.raises(ValueError, match=says):
            model.caption(images[:1], prompt=prompt, min_new_tokens=least)
        with pytest.raises(ValueError, match=says):
            next(model.stream_captions(images[:1], prompt=prompt, min_new_tokens=least))
    (told,) = model.captions(images[:1], min_new_tokens=23)
    assert told[0].num_tokens == 23 and not told[0].finished


def test_a_prompt_without_room_is_named_before_an_image_is_read(model):  # noqa: F811
    """One of the last of many once ended the call after all batches before it."""
    long = "a red circle " * 20
    tokens = len(model.vocabulary.encode(long))
    says = rf"^prompt '{long[:60]}'\.\.\.: {tokens} tokens, and the model writes 24 in all, with be"
    missing = [f"none-{number}.png" for number in range(3)]
    with pytest.raises(ValueError, match=says):
        model.captions(missing, prompt=["a", "a", long])
    with pytest.raises(ValueError, match=says):
        next(model.stream_captions(missing, prompt=["a", "a", long]))


def test_columns_of_paths_and_values_of_a_dict_are_lists(model, images, tmp_path):  # noqa: F811
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    for path, image in zip(paths, images):
        Image.fromarray(image).save(path)
    for column in (np.array(paths), np.array(paths, object), dict(enumerate(paths)).values()):
        assert preprocess.as_list(column) == paths
    assert preprocess.as_list(dict.fromkeys(paths).keys()) == paths
    np.testing.assert_array_equal(
        model.encode_image(np.array(paths)), model.encode_image(images[:2])
    )
    for wrong, says in (
        (np.zeros(2), r"image array of shape \(2,\)"),
        (dict(a=paths[0]), "images of type dict"),
    ):
        with pytest.raises(ValueError, match=says):
            preprocess.as_list(wrong)


@pytest.fixture
def reader():
    return preprocess.ImageReader(16, "squash", 0, 4, Devices(None, "cpu"))


class Watched(Image.Image):
    """A picture that knows how many threads are in `load` at a time."""

    inside = most = 0

    def load(self):
        Watched.inside += 1
        Watched.most = max(Watched.most, Watched.inside)
        time.sleep(0.02)
        Watched.inside -= 1
        return super().load()


def test_a_picture_of_pil_may_stand_in_a_list_several_times(reader, images):  # noqa: F811
    """PIL decodes in place: two threads at once give a damaged picture."""
    picture = Image.fromarray(images[0])
    picture.__class__ = Watched
    found = np.concatenate(list(reader.batches([picture] * 6, False)))
    np.testing.assert_array_equal(found, np.stack([images[0]] * 6))
    assert Watched.most == 1


def test_an_image_without_a_path_is_named_by_its_place(reader, images):  # noqa: F811
    for wrong, says in ((b"junk", "not an image"), (images[0] / 1.0, "float image with values")):
        given = [*images, wrong]
        with pytest.raises(ValueError, match=rf"^images\[6\]: {says}"):
            list(reader.batches(given, False))
        with pytest.raises(ValueError, match=rf"^images\[3\]\[0\]: {says}"):
            list(reader.batches([*given, images[0]], False, even=True))
        with pytest.raises(ValueError, match=f"^{says}"):
            list(reader.batches([wrong], False))


def test_prompts_that_are_no_text_are_named(model, images):  # noqa: F811
    for given, says in (
        (["a", None], r"prompts\[1\]=None: give a str"),
        (["a", float("nan")], r"prompts\[1\]=nan: give a str"),
        ("a \ud800", r"prompts\[0\]='a \\ud800' holds half of a character"),
        (3, "prompts=3: give a str for all images, or a list of them"),
    ):
        with pytest.raises(ValueError, match=f"^{says}"):
            model.caption(images[:2], prompt=given)
        with pytest.raises(ValueError, match=f"^{says}"):
            next(model.stream_captions(images[:2], prompt=given))


def test_devices_that_are_no_list_are_named(model):  # noqa: F811
    for given in (jax.devices()[0], [], "cpu", 0):
        says = f"^devices={re.escape(repr(given))}: give a list of them, as jax.devices\\('cpu'\\)"
        with pytest.raises(ValueError, match=says):
            coca_jax.load("none", devices=given)
        with pytest.raises(ValueError, match=says):
            CoCaModel(model.config, model.params, model.vocabulary, devices=given)


def test_a_caption_has_no_blank_at_its_end(words):  # noqa: F811
    known, a, end = [words.bos_id], words.encode("a"), words.eos_id
    blanks = [i for i in range(words.size) if words.decode([*a, i]) == "a "]
    assert blanks
    for blank in blanks:
        new = np.array([[[*a, blank, end]]])
        decoded = new, np.array([[new.shape[2]]]), np.array([[-1.5]])
        ((caption,),) = text_arrays.captions(words, [known], decoded, by_log_prob=True)
        assert caption.text == "a" and caption.tokens == (*known, *a, blank, end)
        assert caption.finished and caption.log_prob == -1.5


@pytest.mark.parametrize("kinds, warned", [(["caption"], 1), (["caption", "question"], 0), ([], 0)])
def test_answers_of_a_model_that_learned_none_come_with_a_warning(words, kinds, warned):  # noqa: F811
    config, params = tiny_parts()
    config = typed(config).change({"data.sources": [dict(path="x", kind=kind) for kind in kinds]})
    asked = CoCaModel(config, params, words, batch_size=8)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert asked.answer([], []) == []  # nothing is compiled
    told = [one for one in told if "kind='question'" in str(one.message)]
    assert [one.filename for one in told] == [__file__] * warned
