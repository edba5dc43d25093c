"""Clips as data and in the model: prepared, in batches, embedded, pooled, captioned."""

import json

import jax
import numpy as np
import pytest
from clip_cases import animation, numbered, numbers_of
from conftest import random_batch
from one_device import models_on_one  # noqa: F401
from test_inference import (  # noqa: F401
    no_compile_cache,
    random_params,
    tiny_model,
    tiny_parts,
)

from coca_jax import inference
from coca_jax.cli import prepare
from coca_jax.data import videos
from coca_jax.data.batches import open_stream
from coca_jax.data.evaluation_data import Records
from coca_jax.evaluation import runner
from coca_jax.inference import caption_files, preprocess
from coca_jax.models import coca
from coca_jax.models.image_encoder import shrink
from coca_jax.recipes import base
from coca_jax.training import run_vocabulary
from coca_jax.training.train_step import loss_and_metrics

# ---- Prepared data and batches


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve animations, the last three in the split 'test', and a damaged one."""
    root = tmp_path_factory.mktemp("videos")
    (root / "raw").mkdir()
    lines = []
    for index in range(12):
        frames = numbered(10, channels=4 if index % 2 else 3)
        frames[:, :4, :4, :3] = 20 * index
        format = ("WEBP", "GIF", "PNG")[index % 3]
        name = f"{index:02d}.{format.lower()}"
        (root / "raw" / name).write_bytes(animation(frames, format))
        split = "test" if index >= 9 else "train"
        group = "even" if index % 2 == 0 else "odd"
        lines.append(dict(file_name=name, text=f"clip {index}", label=group, split=split))
    whole = animation(np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), np.uint8), "PNG")
    (root / "raw" / "bad.png").write_bytes(whole[: len(whole) // 2])
    lines.append(dict(file_name="bad.png", text="bad", label="odd", split="train"))
    (root / "raw" / "metadata.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    for split in ("train", "test"):
        options = prepare.Options(where=(("split", (split,)),))
        prepare.prepare(
            "imagefolder", str(root / "raw"), str(root / "out"), split=split, options=options,
            progress=False,
        )  # fmt: skip
    return root


def _config(data, num_frames, batch=4, **data_keys):
    config = base.get_config()
    config.batch_size = batch
    config.model.image_size, config.model.patch_size = 16, 8
    config.model.text.vocab_size, config.model.text.max_len = 300, 16
    config.data.sources = (dict(path=str(data / "out"), kind="caption"),)
    config.data.update(num_frames=num_frames, **data_keys)
    return config


def _batches(config, data, count, **where):
    words = run_vocabulary.load_or_train(config, str(data / "workdir"))
    batches = open_stream(config, words, **where)
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


def test_animations_are_prepared_as_they_are(data):
    manifest = json.loads((data / "out" / "manifest.json").read_text())
    assert manifest["splits"]["train"]["count"] == 9 and manifest["splits"]["test"]["count"] == 3
    assert manifest["splits"]["train"]["quarantined"] == {"damaged_image": 1}
    quarantine = (data / "out" / "train-quarantine.jsonl").read_text()
    assert json.loads(quarantine)["key"] == "bad.png"
    for record in Records(dict(path=str(data / "out"), split="train")):
        assert record["image"] == (data / "raw" / record["key"]).read_bytes()


def test_a_batch_holds_the_frames_in_order(data):
    (batch,) = _batches(_config(data, 5), data, 1)
    assert batch["image"].shape == (4, 5, 16, 16, 3) and batch["image"].dtype == np.uint8
    for clip, index in zip(batch["image"], batch["index"].tolist()):
        assert numbers_of(clip) == [1, 3, 5, 7, 9]
        assert np.abs(clip[:, 1, 1].astype(int) - 20 * index).max() <= 6
    (one,) = _batches(_config(data, 1), data, 1)
    assert np.array_equal(one["image"][:, 0], batch["image"][:, 2])


def test_all_frames_of_a_clip_are_augmented_alike(data):
    (batch,) = _batches(_config(data, 5, augment="drawing", flip=True), data, 1)
    left = batch["image"][:, :, 4:12, 2:14].astype(int)
    red = (left[..., 0] - left[..., 1] > 40).mean((2, 3))  # the red half, wherever it was put
    assert np.ptp(red, axis=1).max() < 0.15 and (batch["image"][:, 0] != batch["image"][:, 4]).any()
    (other,) = _batches(_config(data, 5, augment="none"), data, 1)
    assert not np.array_equal(other["image"], batch["image"])


def test_jitter_is_a_function_of_seed_and_step(data):
    config = _config(data, 2, frame_jitter=True)
    first, resumed = _batches(config, data, 4), _batches(config, data, 2, start_step=2)
    for a, b in zip(first[2:], resumed):
        assert np.array_equal(a["image"], b["image"])
    halves = [
        _batches(config, data, 1, process_index=index, process_count=2)[0] for index in (0, 1)
    ]
    joined = np.concatenate([half["image"] for half in halves])
    assert np.array_equal(joined, first[0]["image"])
    places = np.array([numbers_of(clip) for batch in first for clip in batch["image"]])
    assert (places[:, 0] < 5).all() and (places[:, 1] >= 5).all()
    assert len(set(places[:, 0].tolist())) > 2
    other = _config(data, 2, frame_jitter=True)
    other.seed = 1
    assert _batches(other, data, 1)[0]["image"].tolist() != first[0]["image"].tolist()


def test_an_undecodable_clip_is_replaced(data, tmp_path):
    options = prepare.Options(where=(("split", ("train",)),), check=False)
    prepare.prepare(
        "imagefolder", str(data / "raw"), str(tmp_path), options=options, progress=False
    )
    config = _config(data, 5, max_bad_fraction=0.5)
    config.data.sources = (dict(path=str(tmp_path), kind="caption"),)
    seen = set()
    for batch in _batches(config, data, 3):
        seen |= set(batch["index"].tolist())
        assert all(numbers_of(clip) == [1, 3, 5, 7, 9] for clip in batch["image"])
    assert 9 not in seen and len(seen) >= 8


# ---- The model


@pytest.fixture(scope="module")
def model(data):
    words = run_vocabulary.load_or_train(_config(data, 4), str(data / "workdir"))
    return tiny_model(words)


@pytest.fixture(scope="module")
def video_model(model):
    return inference.CoCaModel(
        model.config, model.params, model.vocabulary, batch_size=8, num_frames=4
    )


CLIPS = np.random.default_rng(0).integers(0, 256, (3, 4, 16, 16, 3), dtype=np.uint8)


def test_a_video_is_the_mean_of_its_frames(model, video_model):
    frames = model.encode_image(CLIPS.reshape(-1, 16, 16, 3)).reshape(3, 4, -1)
    mean = frames.mean(1)
    mean /= np.linalg.norm(mean, axis=-1, keepdims=True)
    np.testing.assert_allclose(video_model.encode_video(CLIPS), mean, atol=1e-5)
    np.testing.assert_allclose(video_model.encode_image(CLIPS), mean, atol=1e-5)
    shuffled = CLIPS[:, [2, 0, 3, 1]]
    np.testing.assert_allclose(video_model.encode_video(shuffled), mean, atol=1e-5)


def test_a_clip_of_one_frame_is_the_image(model, video_model):
    stills = CLIPS[:, 0]
    wanted = model.encode_image(stills)
    np.testing.assert_allclose(model.encode_video(stills[:, None], 1), wanted, atol=1e-5)
    repeated = list(stills)  # a model of clips repeats a still
    np.testing.assert_allclose(video_model.encode_video(repeated), wanted, atol=1e-5)
    assert video_model.caption(repeated, max_new_tokens=4) == model.caption(
        stills, max_new_tokens=4
    )


def test_the_decoder_attends_to_the_tokens_of_all_frames(model):
    pixels = (CLIPS / 255 - 0.5) / 0.5
    module, params = coca.build(model.config.model), {"params": model.params}

    @jax.jit
    def run(pixels):
        tokens = module.apply(params, pixels, method="encode_image")[1]
        encoded = module.apply(params, pixels.reshape(-1, 16, 16, 3), method="encode_pixels")
        return tokens, module.apply(params, encoded.reshape(3, 16, 16), method="pool")[1]

    tokens, wanted = run(pixels)  # each frame has 4 patches: 16 tokens a clip
    np.testing.assert_allclose(tokens, wanted, atol=1e-5)
    assert tokens.shape == (3, 4, 16)
    other = pixels.copy()
    other[:, 3] = 0
    assert np.abs(run(other)[0] - tokens).max() > 1e-3


@pytest.fixture(scope="module")
def head_model():
    """(config, module, params) with a head over 3 classes, its classifier drawn as the rest."""
    config, _ = tiny_parts()
    config.model.bias, config.head.kind = False, "classification"
    module = coca.build(config.model, head=config.head, num_classes=3)
    return config, module, random_params(module)


def test_a_head_pools_the_tokens_of_all_frames(head_model):
    config, module, params = head_model
    pixels = ((CLIPS / 255 - 0.5) / 0.5).astype(np.float32)

    @jax.jit
    def run(pixels):
        frames = module.apply(
            {"params": params}, pixels.reshape(-1, 16, 16, 3), method="encode_pixels"
        )
        tokens = frames.reshape(3, -1, frames.shape[-1])
        alone = module.task_head.apply({"params": params["head"]}, tokens)
        return module.apply({"params": params}, pixels, method="classify"), alone

    logits, alone = run(pixels)
    np.testing.assert_allclose(logits, alone, atol=1e-4)
    np.testing.assert_allclose(run(pixels[:, ::-1])[0], logits, atol=1e-4)  # a set of frames
    repeated = np.repeat(pixels[:, :1], 4, 1)
    classify = jax.jit(lambda x: module.apply({"params": params}, x, method="classify"))
    still = classify(pixels[:, 0])
    np.testing.assert_allclose(run(repeated)[0], still, atol=1e-4)
    assert np.abs(logits - still).max() > 1e-2


@pytest.mark.long
def test_training_on_equal_frames_is_training_on_the_image(head_model):
    config, module, params = head_model
    config.batch_size = 4
    batch = random_batch(config) | dict(class_id=np.array([0, 1, 2, 0], np.int32),
                                        prompt_len=np.ones(4, np.int32))  # fmt: skip
    clips = batch | dict(image=np.repeat(batch["image"][:, None], 3, 1))

    @jax.jit
    def run(batch):
        def loss(params):
            return loss_and_metrics(params, module, config, batch, jax.random.key(0))[0]

        return jax.value_and_grad(loss)(params)

    (loss, grads), (clip_loss, clip_grads) = run(batch), run(clips)
    assert np.isfinite(loss) and abs(loss - clip_loss) < 1e-4
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(clip_grads)):
        np.testing.assert_allclose(a, b, atol=2e-4)
    small = shrink(clips["image"], 8)  # a stage of a size curriculum
    assert small.shape == (4, 3, 8, 8, 3)
    np.testing.assert_allclose(small[:, 1], shrink(batch["image"], 8), atol=1e-4)


def test_paths_captions_and_zero_shot(video_model, data, tmp_path):
    paths = [str(data / "raw" / name) for name in ("00.webp", "01.gif", "02.png")]
    arrays = np.stack([videos.decode(path, 4) for path in paths])
    np.testing.assert_allclose(
        video_model.encode_video(paths), video_model.encode_video(arrays), atol=1e-5
    )
    assert len(video_model.caption(paths, max_new_tokens=3)) == 3
    np.testing.assert_allclose(video_model.zero_shot(paths, ["a", "b"]).sum(1), 1, atol=1e-5)
    lines = list(caption_files.caption_files(video_model, [*paths, str(data / "raw" / "bad.png")],
                                       max_new_tokens=3))  # fmt: skip
    assert ["error" in line for line in lines] == [False, False, False, True]
    assert type(preprocess.check_frames(np.int64(2))) is int
    with pytest.raises(ValueError, match="num_frames"):
        inference.CoCaModel(video_model.config, video_model.params, video_model.vocabulary,
                            num_frames=-1)  # fmt: skip


def test_a_loaded_model_takes_more_frames_at_a_time_when_told(video_model):
    with pytest.raises(ValueError, match="more images than batch_size=8"):
        next(video_model.stream_captions(CLIPS))
    video_model.set_batch_size(12)
    assert len(next(video_model.stream_captions(CLIPS, max_new_tokens=2))) == 3
    with pytest.raises(ValueError, match="batch_size=0: give a whole number"):
        video_model.set_batch_size(0)
    video_model.set_batch_size(8)


def test_zero_shot_and_retrieval_of_videos(video_model, data, tmp_path):
    entry = dict(path=str(data / "out"), split="test")
    asked = [
        dict(kind="zero_shot", name="clips", data=dict(entry, kind="label"), prompts="bare"),
        dict(kind="retrieval", name="clips", data=entry),
    ]
    scores = runner.run_tasks(video_model, asked, str(tmp_path))
    paths = [str(data / "raw" / name) for name in ("09.webp", "10.gif", "11.png")]
    found = video_model.zero_shot(paths, ["even", "odd"], ["{}"]).argmax(1)
    assert scores["zero_shot/clips/top1"] == pytest.approx(np.mean(found == [1, 0, 1]))
    similar = video_model.similarity(paths, ["clip 9", "clip 10", "clip 11"])
    ranks = (similar >= np.diag(similar)[:, None]).sum(1)
    assert scores["retrieval/clips/image_to_text_r1"] == pytest.approx((ranks == 1).mean())
    assert scores["retrieval/clips/num_images"] == 3
