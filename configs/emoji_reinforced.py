"""Emoji once more, with what a model that was trained before says of the drawings.

coca-jax recaption --checkpoint=runs/emoji --input=data/emoji --out=data/emoji_rich \\
    --to=array_record --text=all --embeddings --how=greedy,max_new_tokens=15 \\
    --how=nucleus,top_p=0.9,num_return_sequences=3,max_new_tokens=15
"""

from ml_collections import ConfigDict

from coca_jax.recipes import emoji


def get_config() -> ConfigDict:
    """A ninth of the steps: what both towers are to give is known from the first step."""
    config = emoji.get_config()
    config.steps = 600
    config.optimizer.update(schedule="cosine", average_share=0.0, projection_rate=1.0)
    reinforced = dict(path="data/emoji_rich", captions="scored", synthetic=0.1)
    config.data.sources = (config.data.sources[0] | reinforced,)
    config.loss.update(imitation_weight=5.0, teacher_width=config.model.embed_dim)
    return config
