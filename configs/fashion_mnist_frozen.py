"""Fashion-MNIST on the frozen features of a run of fashion_mnist.py, with probes beside it.

python -m coca_jax.train --config=configs/fashion_mnist_frozen.py:runs/fashion --workdir=runs/frozen
"""

from ml_collections import ConfigDict

from coca_jax.recipes import adapt


def get_config(weights: str = "") -> ConfigDict:
    """weights: the run or export to start from."""
    config = adapt.get_config(weights)
    config.batch_size, config.steps = 128, 4000
    # One query, wider than the small encoder and with more heads: it looks in more places.
    config.head.update(kind="classification", width=192, num_heads=12, label_smoothing=0.1)
    config.optimizer.update(
        name="muon",
        learning_rate=2e-3,
        encoder_learning_rate=0.0,
        warmup_steps=50,
        weight_decay=0.1,
        ema=0.99,
    )
    path = "data/fashion_mnist"
    config.data.sources = (dict(path=path, split="train", kind="label"),)
    config.data.flip = True
    test = dict(path=path, split="test", kind="label")
    config.eval.tasks = (
        dict(kind="classification", name="fashion_mnist", data=test),
        dict(kind="linear_probe", name="fashion_mnist", data=test),
        dict(kind="knn", name="fashion_mnist", data=test),
    )
    config.checkpoint.every_steps = 500
    return config
