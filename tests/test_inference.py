"""What `coca_jax.load` returns, against the plain module."""

import subprocess
import sys
import threading
import warnings

import jax
import kept_models
import numpy as np
import pytest
from conftest import tiny_config
from kept_models import no_compile_cache  # noqa: F401
from one_device import models_on_one  # noqa: F401
from PIL import Image

from coca_jax import inference, ops
from coca_jax.config import typed
from coca_jax.data import prompts, vocabulary
from coca_jax.inference import export_folder, loading, tokenization
from coca_jax.inference.generation.config import own_seeds
from coca_jax.models import coca, text_decoder
from coca_jax.models.image_encoder import normalise_pixels
from coca_jax.parallel import sharding

TEXTS = ["a red circle", "a blue square", "green", "two stars on white", "a", "red and blue"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "vocabulary.model"
    vocabulary.train(TEXTS * 20, 300, str(path), 0)
    return vocabulary.load(path)


@pytest.fixture(scope="module")
def model(words):
    return tiny_model(words)


def tiny_parts():
    """(config, random parameters) of a captioner of one block a tower."""
    config = tiny_config()
    config.model.image.depth = 1
    config.model.text.update(vocab_size=320, max_len=24, unimodal_depth=1, multimodal_depth=1)
    return config, random_params(coca.build(config.model))


def random_params(module, of=coca) -> dict:
    """float32 parameters of a module that `of` builds, none as at the start; NumPy draws them in
    no time, where the module's own draw compiles for seconds."""
    shapes = jax.eval_shape(lambda: sharding.unbox(of.init(module, jax.random.key(0))))
    rng = np.random.default_rng(1)

    def drawn(path, leaf):
        names = [str(one.key) for one in path]
        start = 2.7 if names[0] == "log_scale" else float(names[-1] == "scale")  # of a norm: 1
        return np.asarray(start + 0.3 * rng.standard_normal(leaf.shape), np.float32)

    return jax.tree_util.tree_map_with_path(drawn, shapes)


def tiny_model(words, **how) -> inference.CoCaModel:
    """A model of random weights for the vocabulary; how: options of CoCaModel."""
    return inference.CoCaModel(*tiny_parts(), words, batch_size=8, **how)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)


def test_embeddings_are_those_of_the_forward_pass(model, words, images):
    tokens, valid = words.encode_batch(TEXTS, model.max_len)
    out = model.forward((images / 255 - 0.5) / 0.5, tokens)
    np.testing.assert_allclose(model.encode_image(images), out.image_embedding, atol=1e-5)
    np.testing.assert_allclose(model.encode_text(TEXTS), out.text_embedding, atol=1e-5)
    assert out.logits.shape == (6, 24, 320) and out.image_tokens.shape == (6, 4, 16)
    np.testing.assert_allclose(
        model.similarity(images, TEXTS), out.image_embedding @ out.text_embedding.T, atol=1e-5
    )


def test_log_likelihoods(model, words, images):
    tokens, valid = words.encode_batch(TEXTS, model.max_len)
    logits = model.forward((images / 255 - 0.5) / 0.5, tokens).logits
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = np.take_along_axis(logs[:, :-1], tokens[:, 1:, None], 2)[..., 0] * valid[:, 1:]
    total, count = model.caption_log_likelihood(images, TEXTS)
    np.testing.assert_allclose(total, each.sum(1), rtol=1e-4)
    np.testing.assert_array_equal(count, valid[:, 1:].sum(1))
    scores = model.score(images, TEXTS)
    np.testing.assert_allclose(np.diag(scores), total, rtol=1e-4)
    per_token = model.score(images, TEXTS, per_token=True)
    np.testing.assert_allclose(per_token, scores / count, rtol=1e-6)
    assert scores.dtype == per_token.dtype == np.float32
    np.testing.assert_array_equal(model.num_tokens(TEXTS), count)
    pairs = np.array([3, 0, 5]), np.array([1, 4, 4])
    some, lengths = model.score_pairs(model.image_tokens(images)[1], TEXTS, *pairs)
    np.testing.assert_allclose(some, scores[pairs], rtol=1e-5)
    np.testing.assert_array_equal(lengths, count)
    chosen = [[2, 0], [], [5], [1], [0, 1, 2, 3, 4], [3]]
    for row, numbers, found in zip(scores, chosen, model.score_some(images, TEXTS, chosen)):
        np.testing.assert_allclose(found, row[numbers], rtol=1e-5)
    with pytest.raises(ValueError, match="5 lists for more images"):
        model.score_some(images, TEXTS, chosen[:5])
    with pytest.raises(ValueError, match="7 lists for 6 images"):
        model.score_some(images, TEXTS, [*chosen, [1]])
    of, whole = "; texts go from 0 to 5$", "; give each image a list of the numbers"
    for wrong, why in (([-1], of), ([1, 6], of), ([1, 1.5], whole), ([True, False], whole)):
        with pytest.raises(ValueError, match=f"^chosen holds .*{why}"):
            model.score_some(images[:2], TEXTS, [[0], wrong])
    with pytest.raises(ValueError, match="one text an image"):
        model.caption_log_likelihood(images, TEXTS[:2])


def test_one_text_alone_is_a_list_of_one(model, images):
    text, one = "a red circle", images[:1]
    np.testing.assert_array_equal(model.score(one, text), model.score(one, [text]))
    np.testing.assert_array_equal(model.num_tokens(text), model.num_tokens([text]))
    np.testing.assert_array_equal(model.tokenize(text), model.tokenize([text]))
    (some,) = model.score_some(one, text, [[0]])
    np.testing.assert_allclose(some, model.score(one, [text])[0], rtol=1e-5)
    found, count = model.caption_log_likelihood(one, text)
    np.testing.assert_allclose(found, some, rtol=1e-5)
    assert count.tolist() == model.num_tokens(text).tolist()
    assert len(model.answer(one, text, max_new_tokens=2)) == 1
    for letters in range(3, 7):  # a text of as many letters as there are images
        with pytest.raises(ValueError, match="1 texts for .*; give one text an image"):
            model.caption_log_likelihood(images[:letters], "circle"[:letters])
        with pytest.raises(ValueError, match=f"1 questions for {letters} images; give one each"):
            model.answer(images[:letters], "circle"[:letters])
    for method in (model.score, model.caption_log_likelihood):
        with pytest.raises(ValueError, match=r"texts\[1\]=3: give a str"):
            method(images[:2], ["a", 3])


def test_texts_are_scored_in_parts_of_the_batch_size(model, images, monkeypatch):
    texts = [f"{text} {'far ' * (i % 3)}" for i, text in enumerate(TEXTS * 4)][:21]
    monkeypatch.setattr(model, "batch_size", 8)
    apart = [model.score(images, texts[i : i + 6]) for i in (0, 6, 12, 15)]  # as of other tests
    whole = np.concatenate([*apart[:3], apart[3][:, 3:]], axis=1)
    sizes, program = [], model._programs.text_states

    def counted(params, tokens, valid):
        sizes.append(len(tokens))
        return program(params, tokens, valid)

    monkeypatch.setattr(model._programs, "text_states", counted)
    np.testing.assert_allclose(model.score(images, texts), whole, rtol=1e-5)
    pairs = np.arange(21) % 6, np.arange(21)
    some, _ = model.score_pairs(model.image_tokens(images)[1], texts, *pairs)
    np.testing.assert_allclose(some, whole[pairs], rtol=1e-5)
    assert sizes == [8] * 6
    assert model.score(images, []).shape == (6, 0)


def test_few_numbers_of_texts_are_compiled(words, images, monkeypatch):
    monkeypatch.setattr(kept_models, "KEPT", {})  # programs that no other test has called
    one = tiny_model(words, devices=jax.devices()[:1])
    wanted = one.score(images[:2], TEXTS)  # six, as many rows as eight; 13 are two batches
    for count in (5, 13):
        found = one.score(images[:2], (TEXTS * 3)[:count])
        np.testing.assert_allclose(found, np.tile(wanted, 3)[:, :count], rtol=1e-5)
    assert one._programs.text_states._cache_size() == 1


def test_operations_have_the_form_of_the_devices_that_are_given(words, images, model, monkeypatch):
    wanted = model.caption(images, max_new_tokens=4)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # of a machine that has one
    assert coca.build(tiny_parts()[0].model).options.ops == ops.Gpu(cudnn=True)
    given = tiny_model(words, devices=jax.devices("cpu")[:1])
    assert given._programs.module.options.ops == ops.Cpu()
    assert given.caption(images, max_new_tokens=4) == wanted
    spec, layout = given._decoding.result()
    assert spec.unimodal.options.ops == ops.Cpu() and layout == "transposed"


def test_one_warning_a_call_says_how_many_texts_are_cut(model, words, images):
    """They were cut without a word; a text that fits to its last token is not."""
    fits = "a " * next(n for n in range(30) if len(words.encode("a " * n)) >= model.max_len - 2)
    assert len(words.encode(fits)) == model.max_len - 2
    long = "red " * 30
    some = [fits, long, *TEXTS[:4]]
    for start, call in (
        ("1 of 6 texts", lambda: model.encode_text(some)),
        ("10 of 360 texts", lambda: model.encode_text(TEXTS * 50 + some * 10)),
        ("3 of 6 texts", lambda: model.zero_shot(images, [long, "a"], ["{}", "a {}", "the {}"])),
        ("1 of 6 texts", lambda: model.caption_log_likelihood(images, some)),
        ("2 of 6 texts", lambda: model.score(images, [long, *some[:5]])),
        ("4 of 6 texts", lambda: model.similarity(images, [long] * 4 + TEXTS[:2])),
    ):
        with pytest.warns(UserWarning) as told:
            call()
        (one,) = told
        assert str(one.message).startswith(f"{start} are cut: they have more tokens than ")
        assert "model.text.max_len=24" in str(one.message) and one.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode_text([fits, *TEXTS])


def test_texts_of_like_length_run_together_and_come_back_in_order(model):
    texts = [" ".join(["a red dog on grass"] * (1 + i % 3)) for i in range(20)] + ["", "b"]
    alone = np.concatenate([model.encode_text(text) for text in texts])
    np.testing.assert_allclose(model.encode_text(texts), alone, atol=1e-5)
    assert np.abs(alone[0] - alone[1]).max() > 1e-3  # lengths that are not alike


@pytest.mark.parametrize("streamed", [False, True])
def test_images_are_encoded_while_decoding_waits_for_its_kernels(
    model, words, images, monkeypatch, streamed
):
    """Kernels for a processor take seconds to compile, as the encoder's program does."""
    waiting, encoded = tiny_model(words), threading.Event()
    fastest, encode = text_decoder.fastest, waiting._programs.encode_image

    def late(*of):
        assert encoded.wait(60)
        return fastest(*of)

    monkeypatch.setattr(text_decoder, "fastest", late)
    monkeypatch.setattr(
        waiting._programs, "encode_image", lambda *of: (encode(*of), encoded.set())[0]
    )
    if streamed:
        *_, found = waiting.stream_captions(images, max_new_tokens=4)
        found = [captions[0].text for captions in found]
    else:
        found = waiting.caption(images, max_new_tokens=4)
    assert found == model.caption(images, max_new_tokens=4)


def test_a_caption_and_its_log_probability(model, images):
    found = model.captions(
        images, num_beams=2, num_return_sequences=2, min_new_tokens=1, max_new_tokens=6
    )
    assert [len(captions) for captions in found] == [2] * 6
    assert all(0 < c.num_tokens <= 6 and c.log_prob < 0 for captions in found for c in captions)
    prompted = model.caption(images, prompt="a red", max_new_tokens=3)
    assert all(text.startswith("a red") for text in prompted)
    mixed = model.caption(images, prompt=["a red", ""] * 3, max_new_tokens=3)
    assert mixed[0] == prompted[0]


def test_images_of_every_kind_and_batches_agree(model, images, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(images[0]).save(path)
    kinds = [str(path), path, path.read_bytes(), Image.fromarray(images[0]), images[0]]
    embeddings = model.encode_image(kinds)
    np.testing.assert_allclose(embeddings, np.broadcast_to(embeddings[:1], (5, 16)), atol=1e-6)
    np.testing.assert_allclose(model.encode_image(str(path)), embeddings[:1], atol=1e-6)
    with path.open("rb") as file:
        np.testing.assert_allclose(model.encode_image(file), embeddings[:1], atol=1e-6)
    many = np.concatenate([images, images, images])  # three batches
    np.testing.assert_allclose(
        model.encode_image(many), np.tile(model.encode_image(images), (3, 1)), atol=1e-5
    )
    assert model.encode_image([]).shape == (0, 16)


def test_zero_shot_is_the_softmax_of_scaled_similarities(model, images):
    found = model.zero_shot(images, ["red", "blue", "green"], ["{}"])
    scale = np.exp(float(model.params["log_scale"]["value"]))
    logits = scale * model.similarity(images, ["red", "blue", "green"])
    np.testing.assert_allclose(found, np.asarray(jax.nn.softmax(logits, axis=-1)), atol=1e-4)


def test_no_images_have_no_rows(model):
    out = model.forward(np.zeros((0, 16, 16, 3), np.float32), np.zeros((0, 24), np.int32))
    assert [x.shape for x in out] == [(0, 16), (0, 16), (0, 24, 320), (0, 4, 16)]


def test_beams_that_find_no_more_give_fewer_captions(model, images):
    ids = model.vocabulary.size
    how = dict(max_new_tokens=1, num_beams=ids, num_return_sequences=ids)
    for row in model.captions(images[:1], min_new_tokens=1, **how):  # the end symbol cannot come
        assert len({one.tokens for one in row}) == len(row) == ids - 1
        assert all(one.num_tokens == 1 and one.log_prob < 0 for one in row)
    (row,) = model.captions(images[:1], **how)
    assert len(row) == ids


def test_a_set_of_prompts_goes_by_its_name_and_images_may_come_one_by_one(model, images):
    names = ["red", "blue"]
    found = model.zero_shot((image for image in images), names, prompts="clip7")
    np.testing.assert_array_equal(found, model.zero_shot(images, names, prompts.CLIP_7))
    with pytest.raises(ValueError, match="prompt 'clop' must hold '{}' once"):
        model.zero_shot(images, names, prompts="clop")


def test_names_prompts_seeds_and_choices_may_come_one_by_one(model, images):
    names, prompts = ["red", "blue"], ["a {}", "the {}"]
    np.testing.assert_array_equal(
        model.zero_shot(images[:2], iter(names), iter(prompts)),
        model.zero_shot(images[:2], names, prompts),
    )
    for too_few in ((), ("frog",)):  # one class has probability 1, whatever the image
        with pytest.raises(ValueError, match="class_names=.*at least two"):
            model.zero_shot(images[:2], iter(too_few))
    assert tokenization.one_each(iter(["a", "the"]), 2) == ["a", "the"]
    assert own_seeds(iter([5, 6]), 2).tolist() == [5, 6]
    chosen = [np.array([0, 1]), np.array([1])]
    for one, same in zip(
        model.score_some(images[:2], names, iter(chosen)),
        model.score_some(images[:2], names, chosen),
    ):
        np.testing.assert_array_equal(one, same)


def test_what_is_no_text_is_named(model, images):
    with pytest.raises(ValueError, match=r"class_names\[0\]=\['a', 'b'\]: give a str"):
        model.zero_shot(images, [["a", "b"], ["c"]])
    line = r"texts\[1\]='a \\ud800' holds half of a character \(a surrogate\); leave it out"
    for call in (model.encode_text, lambda texts: model.score(images, texts)):
        with pytest.raises(ValueError, match=line):
            call(["é", "a \ud800"])
    with pytest.raises(ValueError, match=line):
        model.caption_log_likelihood(images[:2], ["é", "a \ud800"])


def test_forward_sees_the_text_up_to_its_first_end_symbol(model, words, images):
    tokens, valid = words.encode_batch(["a red circle"], model.max_len)
    other = np.where(valid, tokens, 7)  # what stands after the end does not matter
    pixels = np.zeros((1, 16, 16, 3), np.float32)
    first, second = (model.forward(pixels, t).text_embedding for t in (tokens, other))
    np.testing.assert_array_equal(first, second)
    with pytest.raises(ValueError, match="token_ids"):
        model.forward(pixels, tokens + 320)


def test_forward_takes_no_pixels_that_are_not_normalised(model, words, images):
    tokens, _ = words.encode_batch(["a red circle"], model.max_len)
    raw = model.fit_image(images[0])[None]
    for whole, kind in ((raw, "uint8"), (raw.astype(np.int64), "int64")):
        with pytest.raises(ValueError, match=f"^pixels are {kind}: forward takes normalised"):
            model.forward(whole, tokens)
    out = model.forward(normalise_pixels(raw, model.config.model), tokens)
    np.testing.assert_allclose(out.image_embedding, model.encode_image(raw), atol=1e-5)


def test_forward_runs_what_preprocess_and_tokenize_give(model, images, tmp_path):
    """Images of another size and a file too; the embeddings are those of the encoders."""
    path = tmp_path / "large.png"
    Image.effect_noise((40, 24), 60).convert("RGB").save(path)
    given, texts_given = [images[0], str(path)], ["a red circle", "a"]
    pixels, token_ids = model.preprocess(given), model.tokenize(texts_given)
    assert pixels.shape == (2, 16, 16, 3) and pixels.dtype == np.float32
    assert token_ids.shape == (2, model.max_len) and token_ids.dtype == np.int32
    out = model.forward(pixels, token_ids)
    np.testing.assert_allclose(out.image_embedding, model.encode_image(given), atol=1e-5)
    np.testing.assert_allclose(out.text_embedding, model.encode_text(texts_given), atol=1e-5)
    assert model.preprocess([]).shape == (0, 16, 16, 3)


def test_an_export_loads_as_the_same_model(model, images, tmp_path):
    export_folder.write(model, str(tmp_path / "out"))
    loaded = inference.load(tmp_path / "out")
    np.testing.assert_allclose(loaded.encode_image(images), model.encode_image(images), atol=1e-6)
    narrow = inference.load(tmp_path / "out", dtype="bfloat16")
    cosine = (narrow.encode_image(images) * model.encode_image(images)).sum(-1)
    assert cosine.min() > 0.99
    with pytest.raises(ValueError, match="dtype"):
        inference.load(tmp_path / "out", dtype="float8")


def test_wrong_inputs_are_named(model, images, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        inference.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        inference.load(tmp_path)
    with pytest.raises(ValueError, match="'num_beans'.*'num_beams'.*max_new_tokens, .*do_sample"):
        model.caption(images, num_beans=2)
    for given in ([], ["a", "b"], ["a"] * (len(images) + 1)):
        with pytest.raises(ValueError, match=f"{len(given)} prompts for {len(images)} images"):
            model.caption(images, prompt=given)
        with pytest.raises(ValueError, match=f"{len(given)} prompts for {len(images)} images"):
            next(model.stream_captions(images, prompt=given))
    for given, said in (
        *(([1, 2], "2 seeds for 1 images"), ([-1], "seeds: -1; give whole numbers")),
        ([1.5], "seeds: 1.5; give whole numbers"),
    ):
        with pytest.raises(ValueError, match=said):
            model.caption(images[:1], seeds=given, do_sample=True)
    with pytest.raises(ValueError, match="type int"):
        model.encode_image(3)
    with pytest.raises(ValueError, match="a list of 1 is no picture; give one of them"):
        model.fit_image(["a.jpg"])
    with pytest.raises(ValueError, match="an image of type NoneType"):
        model.encode_image([None])
    with pytest.raises(ValueError, match=r"texts\[1\]=None: give a str"):
        model.encode_text(["a cat", None])
    for none in (None, 3):
        with pytest.raises(ValueError, match=f"^texts={none}: give a str, or a list of them"):
            model.encode_text(none)
    with pytest.raises(ValueError, match="class_names='cat': give a list"):
        model.zero_shot(images, "cat")


def test_import_is_cheap_and_without_tensorflow():
    code = (
        "import sys, time; t = time.process_time(); import coca_jax; "
        "assert time.process_time() - t < 0.3 and 'jax' not in sys.modules; "
        "import coca_jax.inference; assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_without_its_vocabulary_says_what_is_missing(tmp_path, monkeypatch):
    from coca_jax.checkpoints import manager

    monkeypatch.setattr(manager, "find_step", lambda path: (tmp_path / "checkpoints", 1))
    monkeypatch.setattr(manager, "load_step", lambda path: ({}, typed(tiny_config()), 1))
    with pytest.raises(FileNotFoundError, match="vocabulary.model is missing, the run's own"):
        loading._read_run(str(tmp_path))
