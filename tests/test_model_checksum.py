"""What a model's checksum tells apart, and what was made with the older one."""

import json

import jax
import numpy as np
import pytest
from test_inference import images, model, no_compile_cache, words  # noqa: F401
from test_search import embed, encoded

from coca_jax.apps.recaption import job
from coca_jax.apps.recaption.request import Request
from coca_jax.apps.search import index, parts
from coca_jax.config import typed
from coca_jax.evaluation import runner
from coca_jax.evaluation.evaluators.base import Writing
from coca_jax.inference import fingerprint
from coca_jax.inference.model import CoCaModel
from coca_jax.models import param_groups


def changed(model, **values):  # noqa: F811
    """The same weights with other values of the configuration."""
    config = typed(model.config).change(
        {key.replace("__", "."): one for key, one in values.items()}
    )
    return CoCaModel(config, model.params, model.vocabulary)


def test_what_changes_embeddings_changes_the_checksum_and_the_rest_does_not(model):  # noqa: F811
    own = model.checksum()
    assert len(own) == 33 and changed(model).checksum() == own
    told = {
        name: changed(model, **{name: value}).checksum()
        for name, value in dict(
            model__activation="quick_gelu",
            model__image_mean=(0.4, 0.4, 0.4),
            model__norm_eps=1e-4,
            data__resize="crop",
            data__label_token=True,
        ).items()
    }
    assert len({own, *told.values()}) == 6
    assert {one.partition("-")[0] for one in told.values()} == {own.partition("-")[0]}
    for name, value in dict(model__temperature=0.5, data__num_threads=3, data__flip=True).items():
        assert changed(model, **{name: value}).checksum() == own, name
    pixels = np.zeros((1, *[model.image_size] * 2, 3), np.uint8)
    other = changed(model, model__image_mean=(0.1, 0.1, 0.1))
    assert np.abs(other.encode_image(pixels) - model.encode_image(pixels)).max() > 1e-3


def test_host_and_devices_sum_the_same_bits(model, monkeypatch):  # noqa: F811
    """In host memory NumPy does, elsewhere a program: of float32 and of what is narrowed."""
    for each in (model, changed(model, model__dtype="bfloat16")):
        params = param_groups.narrow(each.params) if each is not model else each.params
        here = each._programs.bit_sums(params)
        with monkeypatch.context() as patch:
            patch.setattr(each._programs._devices, "platform", "gpu")
            del each._programs.bit_sums
            with each._devices.context():
                there = each._programs.bit_sums(params)
        del each._programs.bit_sums
        assert all(isinstance(x, np.uint32) for x in jax.tree.leaves(here))
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(there))
        assert jax.tree.map(int, here) == jax.tree.map(int, there)


def test_an_index_is_refused_to_other_preprocessing_and_an_old_one_goes_on(model, tmp_path):  # noqa: F811
    (tmp_path / "a.png").write_bytes(encoded(1))
    other = changed(model, model__image_mean=(0.4, 0.4, 0.4))
    embed(model, tmp_path / "a.png", tmp_path / "i")
    with pytest.raises(ValueError, match="made by another model"):
        embed(other, tmp_path / "a.png", tmp_path / "i")
    found = index.Index(str(tmp_path / "i"))
    found.check(model)
    with pytest.raises(ValueError, match="other weights or preprocessing"):
        found.check(other)
    found.about["model"] = model.checksum().partition("-")[0]  # as before
    found.check(model)
    old = parts.Parts(str(tmp_path / "i"))
    old.about["model"] = found.about["model"]
    old.begin(dict(old.about, model=model.checksum()))
    with pytest.raises(ValueError, match="made by another model"):
        old.begin(dict(old.about, model="0" * 16 + "-" + "0" * 16))


def test_an_index_of_another_dtype_is_told_so(model, tmp_path):  # noqa: F811
    """Rounded weights are others, though the checkpoint is the same."""
    (tmp_path / "a.png").write_bytes(encoded(1))
    embed(model, tmp_path / "a.png", tmp_path / "i")
    config = typed(model.config).change({"model.dtype": "bfloat16"})
    rounded = CoCaModel(config, param_groups.narrow(model.params), model.vocabulary)
    found = index.Index(str(tmp_path / "i"))
    says = "was made with --dtype=float32, and the model is in bfloat16: .* give --dtype=float32"
    with pytest.raises(ValueError, match=f"this index {says}"):
        found.check(rounded)
    with pytest.raises(ValueError, match=f"--out=.*i {says}"):
        embed(rounded, tmp_path / "a.png", tmp_path / "i")
    del found.about["dtype"]  # as before
    with pytest.raises(ValueError, match="give that --checkpoint, and the --dtype of then"):
        found.check(rounded)


def test_recaption_and_evaluate_go_on_from_the_older_checksum(model, tmp_path):  # noqa: F811
    own = model.checksum()
    old, other = own[:16], changed(model, model__activation="relu").checksum()
    request = Request("in", "imagefolder", str(tmp_path / "r"))
    job.begin(request, [old])
    job.begin(request, [own])
    job.begin(Request("in", "imagefolder", str(tmp_path / "s")), [own])
    with pytest.raises(ValueError, match="other weights or preprocessing"):
        job.begin(Request("in", "imagefolder", str(tmp_path / "s")), [other])
    asked = dict(step=3, num_frames=0)
    begun = runner.Unfinished(str(tmp_path), asked | dict(weights=old), Writing(True))
    begun.add("task", {"a": 0.5})
    again = runner.Unfinished(str(tmp_path), asked | dict(weights=own), Writing(True))
    assert again.scores("task") == {"a": 0.5} and again.request["weights"] == old
    path = tmp_path / "eval_progress.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | dict(request=asked | dict(weights=own)))
    )
    again = runner.Unfinished(str(tmp_path), asked | dict(weights=other), Writing(True))
    assert again.scores("task") is None
    assert not fingerprint.same_request(dict(asked, weights=own, step=4), dict(asked, weights=own))
