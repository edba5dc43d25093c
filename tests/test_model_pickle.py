"""A loaded model goes to the processes that a loader of data starts."""

import copy
import pathlib
import pickle

import numpy as np
from test_inference import images, model, no_compile_cache, words  # noqa: F401

from coca_jax.data import vocabulary
from coca_jax.data.vocabulary import clip_bpe


def test_a_model_that_was_used_is_pickled_and_copied_as_a_new_one_is(model, images):  # noqa: F811
    """Its programs are no part of it; before the first call pickle took it, after it none."""
    found, written = model.encode_image(images), model.captions(images[:1])
    model.step = 7
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert other.step == 7 and other.stored_dtype == model.stored_dtype
        assert other.checksum() == model.checksum() and other.batch_size == model.batch_size
        assert np.abs(other.encode_image(images) - found).max() < 1e-6
    preprocess = pickle.loads(pickle.dumps(model.fit_image))  # as a pool of processes gets it
    picture = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3)
    assert (preprocess(picture) == model.fit_image(picture)).all()
    assert preprocess.__self__.captions(images[:1])[0][0].tokens == written[0][0].tokens


def test_a_vocabulary_of_clip_is_pickled_too():
    """Its words are kept in a cache, which is no part of it."""
    file = pathlib.Path(clip_bpe.__file__).with_name(clip_bpe.FILE_NAME)
    words = vocabulary.load(file)  # noqa: F811
    ids = words.encode("two small cats")
    other = pickle.loads(pickle.dumps(words))
    assert other.encode("two small cats") == ids and other.checksum == words.checksum
