"""The emoji recipe on three groups of drawings: how a captioner on a locked encoder compares.

`--config=benchmarks/locked_recipe.py:contrastive,700`, `:joint,700`, or `:captioner,700,RUN` on the
locked encoder of a run of the first. Each keeps batches of 64 and that many steps.
"""

from ml_collections import ConfigDict

from coca_jax.recipes import emoji

GROUPS = ("animals-nature", "food-drink", "activities")


def get_config(given: str) -> ConfigDict:
    """given: KIND,STEPS[,RUN]."""
    kind, steps, *run = given.split(",")
    config = emoji.get_config()
    config.batch_size, config.steps = 64, int(steps)
    config.image_sizes, config.text_lengths, config.text_parts = (), (), 1
    config.data.resize = "squash"  # as it was when this was measured, as the next two
    config.loss.min_temperature, config.model.temperature = 0.0, 0.07
    rule = dict(warmup_steps=60, schedule="cosine", average_share=0.0, projection_rate=1.0)
    config.optimizer.update(rule)
    config.checkpoint.every_steps = 10_000
    if kind == "contrastive":
        config.loss.captioning_weight = 0.0
    if kind == "captioner":
        config.init_from = run[0]
        config.optimizer.image_learning_rate = 0.0
        config.data.update(features="features", augmentations=8)

    def few(entry: ConfigDict) -> dict:
        """Of these groups alone."""
        return dict(entry) | dict(where=dict(entry["where"]) | {"label": GROUPS})

    config.data.sources = tuple(few(entry) for entry in config.data.sources)
    config.eval.tasks = tuple(
        dict(task)
        | {name: few(task[name]) for name in ("data", "candidates", "querybank") if name in task}
        for task in config.eval.tasks
        if kind != "contrastive" or task["kind"] == "retrieval"
    )
    return config
