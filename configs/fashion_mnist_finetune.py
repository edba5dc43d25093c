"""Fashion-MNIST, all of the encoder of a run of fashion_mnist.py fine-tuned with a new head.

python -m coca_jax.train --config=configs/fashion_mnist_finetune.py:runs/fashion --workdir=runs/tuned
"""  # noqa: E501

from ml_collections import ConfigDict

from coca_jax.recipes import fashion_mnist_frozen


def get_config(weights: str = "") -> ConfigDict:
    """weights: the run or export to start from."""
    config = fashion_mnist_frozen.get_config(weights)
    config.batch_size, config.steps = 64, 4000
    config.head.update(width=0, num_heads=0)
    config.optimizer.update(
        learning_rate=1e-3, encoder_learning_rate=5e-4, layer_decay=0.8, weight_decay=0.05
    )
    config.eval.tasks = config.eval.tasks[:1]
    return config
