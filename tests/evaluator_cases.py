"""A model whose answers are given, and pictures that hold their number, for tests of scores."""

import numpy as np

from coca_jax.evaluation.evaluators import zero_shot


class Fake:
    """A model whose embeddings and captions are given; an image holds its number in one pixel."""

    def __init__(self, image=None, text=None, captions=None):
        self.image, self.text, self.captions = image, text, captions
        self.largest = 0
        self.asked = set()  # whether texts were class names in prompts

    def encode_image(self, images):
        assert images.dtype == np.uint8 and images.ndim == 4
        self.largest = max(self.largest, len(images))
        return self.image[images[:, 0, 0].astype(int) @ [1, 256, 0]]

    def encode_text(self, texts, *, labels=False):
        self.asked.add(labels)
        return np.stack([self.text(t) for t in texts]).astype(np.float32)

    def tokenize_with_mask(self, texts, *, labels=False):
        """A letter a token, and as many as there is room for."""
        rows = [[*map(ord, t[: self.max_len])] + [0] * (self.max_len - len(t)) for t in texts]
        return np.asarray(rows, np.int32), np.asarray(rows) > 0

    def caption(self, images, **how):
        return [self.captions[i] for i in images[:, 0, 0, 0]]

    def score(self, images, texts, *, labels=False):
        self.asked.add(labels)
        numbers = images[:, 0, 0].astype(int) @ [1, 256, 0]
        return np.asarray([[self.text(t)[i] for t in texts] for i in numbers], np.float32)

    scale = 10.0
    max_len = 64

    def score_some(self, images, texts, chosen):
        assert len(images) == len(chosen)
        whole = self.score(images, texts)
        return [row[numbers] for row, numbers in zip(whole, chosen)]

    def num_tokens(self, texts, *, labels=False):
        self.asked.add(labels)
        return np.asarray([len(t) + 1 for t in texts])

    def caption_log_likelihood(self, images, texts):
        tokens = np.asarray([len(t.split()) + 1 for t in texts])
        return -0.5 * tokens, tokens


def picture(number):
    image = np.zeros((4, 4, 3), np.uint8)
    image[0, 0, 0], image[0, 0, 1] = number % 256, number // 256
    return image


def unit(rng, *shape):
    return zero_shot.normalise(rng.normal(size=shape)).astype(np.float32)
