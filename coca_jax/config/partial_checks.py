"""What runs go with that train a part of the model: adapters, a frozen encoder, kept tokens."""

from __future__ import annotations

from coca_jax.config.data import Data
from coca_jax.config.run import Config
from coca_jax.models import head_kinds


def frozen_encoder(config: Config) -> bool:
    """Whether nothing of the image encoder is trained."""
    optimizer = config.optimizer
    if config.head.kind:
        return optimizer.encoder_learning_rate == 0
    return optimizer.image_learning_rate == 0 or optimizer.keep_embeddings


def check(config: Config) -> None:
    """Raises ValueError for what LoRA, an image encoder with a rate of its own, or one whose tokens
    are kept, does not go with."""
    data, optimizer = config.data, config.optimizer
    rate = optimizer.image_learning_rate
    if rate >= 0 and (config.head.kind or optimizer.lora_rank):
        raise ValueError(
            f"optimizer.image_learning_rate={rate} goes with no task head and no LoRA; with a head "
            "set optimizer.encoder_learning_rate"
        )
    if optimizer.lora_rank:
        _check_lora(config)
    if optimizer.keep_embeddings:
        wanted: list[tuple[str, object, object]] = [
            ("config.head.kind", config.head.kind, ""),
            ("optimizer.lora_rank", optimizer.lora_rank, 0),
            ("optimizer.image_learning_rate", rate, -1.0),
            ("optimizer.projection_rate", optimizer.projection_rate, 1.0),
        ]
        of_embeddings = ("contrastive", "bag", "hidden", "affinity", "imitation")
        for loss in (f"{name}_weight" for name in of_embeddings):
            wanted.append((f"loss.{loss}", getattr(config.loss, loss), 0.0))
        for name, value, good in wanted:
            if value != good:
                raise ValueError(
                    f"{name}={value!r} does not go with optimizer.keep_embeddings, which trains "
                    f"what captions alone depend on; set {good!r}"
                )
    if rate > 0 and not optimizer.learning_rate:
        raise ValueError(
            f"optimizer.image_learning_rate={rate} is a share of learning_rate=0; set both above 0"
        )
    if config.init_parts != "all" and not config.init_from:
        raise ValueError(
            f"init_parts={config.init_parts!r} needs init_from, the weights to take that from"
        )
    if data.augmentations and data.loader != "direct":
        raise ValueError(
            f"data.augmentations={data.augmentations} needs data.loader='direct'; set it"
        )
    if data.features:
        check_features(config)


def moving(data: Data) -> bool:
    """Whether an image, or a clip, is another one at each visit."""
    return data.augment != "none" or data.flip or bool(data.num_frames and data.frame_jitter)


def check_features(config: Config) -> None:
    """Raises ValueError where kept tokens of the image encoder would not be those of each step."""
    data = config.data
    kept = f"data.features={data.features!r}"
    if not frozen_encoder(config):
        raise ValueError(
            f"{kept} keeps the tokens of a frozen image encoder; set optimizer.image_learning_rate"
            "=0 (with a task head encoder_learning_rate=0), or data.features=''"
        )
    if moving(data) and not data.augmentations:
        raise ValueError(
            f"{kept} keeps each image as it is augmented, and data.augmentations=0 draws a new one "
            "at each visit; set it to 4, say, or data.augment='none' and data.flip=False"
        )
    for name, value, good in (
        ("data.loader", data.loader, "direct"),
        ("model.image.patch_dropout", config.model.image.patch_dropout, 0.0),
        ("config.image_sizes", config.image_sizes, ()),
        ("loss.hidden_weight", config.loss.hidden_weight, 0.0),
    ):
        if value != good:
            raise ValueError(f"{name}={value!r} does not go with {kept}; set {good!r}")
    kind = head_kinds.of(config.head.kind)
    if kind is not None and kind.images > 1:
        raise ValueError(f"head.kind={kind.name!r} does not go with {kept}; set data.features=''")


def _check_lora(config: Config) -> None:
    """Raises ValueError for what factors of products do not go with."""
    optimizer = config.optimizer
    for key, number, none in (
        ("optimizer.layer_decay", optimizer.layer_decay, 1.0),
        ("optimizer.projection_rate", optimizer.projection_rate, 1.0),
        ("loss.min_temperature", config.loss.min_temperature, 0.0),
    ):
        if number != none:
            raise ValueError(
                f"{key}={number} has no effect with optimizer.lora_rank={optimizer.lora_rank}, "
                f"which trains factors of the products alone; set {none}"
            )
    for key, weight in (
        ("loss.bag_weight", config.loss.bag_weight),
        ("loss.hidden_weight", config.loss.hidden_weight),
    ):
        if weight:
            raise ValueError(
                f"{key}={weight} reads a layer of its own, which optimizer.lora_rank="
                f"{optimizer.lora_rank} leaves as it is drawn; set 0"
            )
