"""Visual question answering: a head over the decoder's outputs, and captions beside it (Table 10).

Prepare images whose json lists questions, {"qa": [{"question": ..., "answer": ...}, ...]} (an
answer may be a list, of which one is drawn at each visit), and write the answers to choose from,
3,129 in the paper, one a line. Other answers train the decoder alone.

coca-jax prepare --format=webdataset --input=VQA --out=data/vqa --split=train
python -m coca_jax.train --config=configs/vqa.py:runs/coca --workdir=runs/vqa
"""

from ml_collections import ConfigDict

from coca_jax.recipes import adapt, base


def get_config(weights: str = "") -> ConfigDict:
    """weights: the run or export to start from."""
    config = adapt.get_config(weights)
    config.batch_size, config.steps = 64, 100_000
    config.head.update(kind="answer", classes="data/vqa/answers.txt", unknown="skip")
    config.text_lengths = base.TEXT_LENGTHS
    config.loss.captioning_weight = 1.0  # question + answer; the paper does not give its weight
    config.optimizer.update(learning_rate=5e-4, encoder_learning_rate=2e-5, weight_decay=0.1)
    source = dict(path="data/vqa", split="train", kind="question", questions="qa")
    config.data.sources = (source,)
    config.data.update(augment="randaugment", randaugment=(1, 10))
    test = dict(path="data/vqa", split="validation", kind="question", questions="qa")
    config.eval.tasks = (
        dict(kind="classification", name="vqa", data=test),
        dict(kind="answers", name="vqa", data=test),
    )
    return config
