"""What several values of a configuration must agree on, before any work."""

from __future__ import annotations

from coca_jax.config import heads, shapes
from coca_jax.config.data import Data
from coca_jax.config.fields import plain, read
from coca_jax.config.model import BLOCK, Head, Model
from coca_jax.config.run import Config, Optimizer

# What runs go with that train a part of the model: adapters, a frozen encoder, kept tokens.


def frozen_encoder(config: Config) -> bool:
    """Whether nothing of the image encoder is trained."""
    optimizer = config.optimizer
    if config.head.kind:
        return optimizer.encoder_learning_rate == 0
    return optimizer.image_learning_rate == 0 or optimizer.keep_embeddings


def check_partial(config: Config) -> None:
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
    kind = heads.head_kind(config.head.kind)
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


def check(config: Config) -> None:
    """Raises ValueError for the first impossible value: its name, the value, the remedy.

    What a kind of task head asks of a run, the kind itself says.
    """
    check_model(config.model)
    _check_pooler_block(config.model)
    if bool(config.steps) == bool(config.epochs):
        both = "; --config.steps=0 leaves the epochs, --config.epochs=0 the steps"
        raise ValueError(
            f"config.steps={config.steps} and config.epochs={config.epochs}; set exactly one"
            + (both if config.steps else "")
        )
    check_length(config, config.steps)
    if config.optimizer.ema and config.optimizer.average_share:
        raise ValueError(
            f"optimizer.ema={config.optimizer.ema} and optimizer.average_share="
            f"{config.optimizer.average_share}; set one of them, there is one average"
        )
    _check_image_sizes(config)
    if config.batch_sizes and config.data.loader != "direct":
        raise ValueError(
            f"config.batch_sizes={config.batch_sizes} does not go with data.loader="
            f"{config.data.loader!r}; set data.loader='direct', or batch_sizes=()"
        )
    check_texts(config)
    check_contrastive(config)
    check_partial(config)
    check_trim(config)
    check_native(config)
    if config.loss.hidden_weight and not config.optimizer.ema:
        raise ValueError(
            f"loss.hidden_weight={config.loss.hidden_weight} learns from averaged parameters; set "
            "optimizer.ema, as 0.996"
        )
    if config.loss.hidden_weight and (config.data.num_frames or config.head.kind):
        raise ValueError(
            f"loss.hidden_weight={config.loss.hidden_weight} is for images without a task head; "
            "set it to 0"
        )
    if config.data.frame_jitter and not config.data.num_frames:
        raise ValueError(
            "data.frame_jitter=True is of clips, and data.num_frames=0; give frames, or set False"
        )
    check_sources(config)
    taught(config)
    weights = {k: v for k, v in config.loss.to_dict().items() if k.endswith("_weight")}
    if not (config.head.kind or any(weights.values())):
        raise ValueError(f"{', '.join(f'loss.{name}' for name in weights)} are all 0; give one")


def check_sources(config: Config) -> None:
    """Raises ValueError for a run without sources, or a key that one of them does not read."""
    if not config.data.sources:
        raise ValueError("config.data.sources is empty; name at least one source of data")
    for number, entry in enumerate(config.data.sources):
        entry.check_read(f"config.data.sources[{number}]")
    loss, kinds = config.loss, {entry.kind for entry in config.data.sources}
    if loss.captioning_weight and not loss.caption_labels and kinds == {"label"}:
        raise ValueError(
            f"loss.caption_labels=False leaves the decoder nothing to learn from sources of "
            f"kind='label' alone, and loss.captioning_weight={loss.captioning_weight}; set "
            "loss.caption_labels=True, or loss.captioning_weight=0"
        )


def _check_image_sizes(config: Config) -> None:
    patch = config.model.patch_size
    if not all(shapes.divides(patch, size) for _, size in config.image_sizes):
        raise ValueError(
            f"config.image_sizes={config.image_sizes} must be multiples of model.patch_size={patch}"
        )
    square = isinstance(config.model.image_size, int)
    if not all(isinstance(shapes.shortest(s), int) == square for _, s in config.image_sizes):
        raise ValueError(
            f"config.image_sizes={config.image_sizes}: give {'one number' if square else 'a pair'} "
            f"each, as model.image_size={config.model.image_size}"
        )
    most = shapes.pair(config.model.image_size)
    for _, size in config.image_sizes:
        if any(one > own for one, own in zip(shapes.pair(size), most)):
            raise ValueError(
                f"config.image_sizes={config.image_sizes}: {size} is larger than "
                f"model.image_size={config.model.image_size}, at which images are read; give "
                "smaller ones"
            )


def taught(config: Config) -> None:
    """Raises ValueError for a distillation without the width of its embeddings, or of another."""
    loss = config.loss
    if bool(loss.affinity_weight or loss.imitation_weight) != bool(loss.teacher_width):
        raise ValueError(
            f"loss.affinity_weight={loss.affinity_weight}, loss.imitation_weight="
            f"{loss.imitation_weight} and loss.teacher_width={loss.teacher_width}; set one of both "
            "weights and the width (that of the model whose embeddings `recaption --embeddings` "
            "wrote), or none"
        )
    if loss.teacher_width and config.data.loader != "direct":
        raise ValueError(
            f"data.loader={config.data.loader!r} brings no embeddings of a teacher, and "
            f"loss.teacher_width={loss.teacher_width}; set data.loader='direct'"
        )
    if loss.imitation_weight and loss.teacher_width != config.model.embed_dim:
        raise ValueError(
            f"loss.imitation_weight={loss.imitation_weight} compares embeddings of model.embed_dim="
            f"{config.model.embed_dim} numbers with those of loss.teacher_width="
            f"{loss.teacher_width}; set model.embed_dim to that, or use loss.affinity_weight"
        )


def check_texts(config: Config) -> None:
    """Raises ValueError for parts of texts without lengths."""
    if config.text_parts > 1 and not config.text_lengths:
        raise ValueError(
            f"config.text_parts={config.text_parts} needs config.text_lengths, such as (16, 32)"
        )


def check_contrastive(config: Config) -> None:
    """Raises ValueError for a temperature that starts below its bound, and for what the loss
    against all examples does not go with."""
    loss = config.loss
    if loss.min_temperature > config.model.temperature and not config.init_from:
        raise ValueError(
            f"loss.min_temperature={loss.min_temperature} is above model.temperature="
            f"{config.model.temperature}, with which a run starts; raise that, or lower this"
        )
    if loss.contrastive == "sigmoid" and loss.reduction != "sum":
        raise ValueError(
            f"loss.reduction={loss.reduction!r} is of two directions, and loss.contrastive="
            "'sigmoid' has one; set 'sum'"
        )
    if loss.contrastive != "global" or not loss.contrastive_weight:
        return
    for name, value, good in (
        ("loss.contrastive_chunk", loss.contrastive_chunk, (0,)),
        ("loss.duplicate_texts", loss.duplicate_texts, ("negatives", "ignore")),
        ("data.loader", config.data.loader, ("direct",)),
    ):
        if value not in good:
            raise ValueError(
                f"{name}={value!r} does not go with loss.contrastive='global'; set "
                f"{' or '.join(map(repr, good))}"
            )
    if loss.global_examples == 1:
        raise ValueError("loss.global_examples=1: there is nothing to compare with; give 2 or more")


def check_trim(config: Config) -> None:
    """Raises ValueError for a cut at random of images whose plain margins are cut already."""
    if config.data.resize == "trim" and config.data.augment in ("crop", "inception"):
        raise ValueError(
            f"data.augment={config.data.augment!r} does not go with data.resize='trim', which "
            "leaves what an image shows; set 'none', 'drawing' or 'randaugment', or "
            "data.resize='squash'"
        )


def check_native(config: Config) -> None:
    """Raises ValueError for what does not go with images that keep their aspect ratio."""
    data, image = config.data, config.model.image
    if data.resize != "native":
        if data.max_patches:
            raise ValueError(
                f"data.max_patches={data.max_patches} is of data.resize='native'; set that, or 0"
            )
        return
    for side in ("image_size", "patch_size"):
        size = getattr(config.model, side)
        if not isinstance(size, int):
            raise ValueError(
                f"model.{side}={size} does not go with data.resize='native', whose images have any "
                "shape: give one number, or data.resize='squash'"
            )
    for name, value, good in (
        ("data.augment", data.augment, ("none", "crop", "inception")),
        ("data.num_frames", data.num_frames, (0,)),
        ("data.loader", data.loader, ("direct",)),
        ("data.features", data.features, ("",)),
        ("model.image.conv_widths", image.conv_widths, ((),)),
        ("model.image.patch_dropout", image.patch_dropout, (0,)),
        ("image_sizes", config.image_sizes, ((),)),
        ("loss.hidden_weight", config.loss.hidden_weight, (0,)),
        ("model.pooler.kind", config.model.pooler.kind, _pooled()),
    ):
        if value not in good:
            raise ValueError(
                f"{name}={value!r} does not go with data.resize='native'; set "
                f"{' or '.join(map(repr, good))}, or data.resize='squash'"
            )
    head = heads.head_kind(config.head.kind)
    if head is not None and head.images > 1:
        raise ValueError(
            f"head.kind={config.head.kind!r} takes several images, which data.resize='native' does "
            "not; set data.resize='squash'"
        )


def _pooled() -> tuple[str, ...]:
    """The names of kinds with a pooler."""
    return tuple(name for name, kind in heads.POOLERS.items() if kind.pools)


def check_length(config: Config, steps: int) -> None:
    """Raises ValueError for what a run of so many steps (0: not known) never comes to."""
    check_warmup(config.optimizer, steps)
    if config.log.profile_steps[:1] > (steps,) > (0,):
        raise ValueError(
            f"log.profile_steps={config.log.profile_steps} is behind the run's {steps} steps; "
            "name steps of the run"
        )


def check_warmup(optimizer: Optimizer, steps: int) -> None:
    """Raises ValueError for a warm-up that a run of so many steps (0: not known) never ends."""
    warmup = optimizer.warmup_steps
    if warmup >= steps > 0 and warmup:
        raise ValueError(
            f"optimizer.warmup_steps={warmup} is not below the run's {steps} steps; shorten it"
        )


def head_sizes(head: Head, model: Model) -> tuple[int, int]:
    """(width, attention heads) of the task head's pooler, where 0 takes the model's.

    Raises ValueError where the one does not divide the other.
    """
    width, num_heads = head.width or model.text.width, head.num_heads or model.pooler.num_heads
    if width % num_heads:
        raise ValueError(
            f"head.num_heads={num_heads} does not divide head.width={width} (0 in the config takes "
            "the model's); choose a divisor"
        )
    return width, num_heads


def check_vocabulary(model: Model, size: int, remedy: str = "") -> None:
    """Raises ValueError where a tokenizer of `size` ids has more than the model has rows for.

    remedy: what to do, where the size of the model is not for the user to choose.
    """
    rows = model.text.vocab_size
    if size > rows:
        raise ValueError(
            f"model.text.vocab_size={rows} is less than the {size} ids of the vocabulary; "
            + (remedy or f"set it to {size} or more, or use the model's own vocabulary")
        )


def check_captioner(model: Model) -> Model:
    """`check_model`, and ValueError for a family without a decoder."""
    if model.family != "coca":
        raise ValueError(
            f"model.family={model.family!r}: such towers have no decoder; they are loaded, scored "
            "and searched with, but not trained"
        )
    return check_model(model)


def check_model(model: Model) -> Model:
    """The model; raises ValueError that names the first impossible value, and the remedy."""
    model = read(Model, model.to_dict(), "model", old=True)
    whole = shapes.divides(model.patch_size, model.image_size)
    if not whole and (model.family == "coca" or not model.num_patches):
        raise ValueError(
            f"model.patch_size={model.patch_size} does not divide "
            f"model.image_size={model.image_size}; choose a divisor"
        )
    stages = len(model.image.conv_widths)
    if stages and (model.patch_size != 2**stages or len(model.image.conv_depths) != stages):
        raise ValueError(
            f"model.image.conv_widths has {stages} stages; it needs model.patch_size={2**stages} "
            f"(is {model.patch_size}) and as many model.image.conv_depths"
        )
    if model.image.conv_depths and not stages:
        raise ValueError(
            f"model.image.conv_depths={model.image.conv_depths} are of the stages in "
            "model.image.conv_widths=(); give these too, or conv_depths=()"
        )
    for name, tower in (("image", model.image), ("text", model.text)):
        if tower.width % tower.num_heads:
            raise ValueError(
                f"model.{name}.num_heads={tower.num_heads} does not divide "
                f"model.{name}.width={tower.width}; choose a divisor"
            )
    _check_blocks(model)
    _check_heads(model)
    pooler = model.pooler
    if model.text.width % pooler.num_heads:
        raise ValueError(
            f"model.pooler.num_heads={pooler.num_heads} does not divide "
            f"model.text.width={model.text.width}; choose a divisor"
        )
    kind = heads.pooler_kind(pooler.kind)
    kind.check(pooler.num_queries)
    if model.family == "coca" and not pooler.project and model.embed_dim != model.text.width:
        raise ValueError(
            f"model.embed_dim={model.embed_dim}: without a projection (model.pooler.project=False) "
            f"it must be model.text.width={model.text.width}; set it, or project=True"
        )
    if model.family == "coca" and not kind.pools:
        for name, value, good in (
            ("image.class_token", model.image.class_token, True),
            ("image.width", model.image.width, model.text.width),
            ("pooler.project", pooler.project, True),
        ):
            if value != good:
                raise ValueError(
                    f"model.{name}={value}: without a pooler (model.pooler.kind={pooler.kind!r}) "
                    f"it must be {good}; set it, or choose another kind"
                )
    return model


def _check_blocks(model: Model) -> None:
    """Raises ValueError for what the block of a tower cannot have."""
    for name, own in (
        ("image.block", model.image.block),
        ("text.block", model.text.block),
        ("text.multimodal_block", model.text.multimodal_block),
        ("pooler.block", model.pooler.block),
    ):
        for key in own:
            if key not in BLOCK:
                raise ValueError(
                    f"model.{name}: no key {key!r} of a block; it has: {', '.join(BLOCK)}"
                )
        read(Model, model.to_dict() | plain(own), f"model.{name}", old=True)


# What a pooler reads of a block: its norms and its attention.
_POOLER_BLOCK = ("norm", "norm_eps", "bias", "qk_norm", "qk_norm_kind")


def _check_pooler_block(model: Model) -> None:
    """Raises ValueError for a key of a block that a pooler does not have. Of a run alone: models
    with such a key, which nothing reads, are loaded."""
    for key, value in model.pooler.block.items():
        if key not in _POOLER_BLOCK:
            raise ValueError(
                f"model.pooler.block: {key}={value!r} is of MLPs, residual parts or positions, "
                f"which poolers do not have; leave it out"
            )


def _check_heads(model: Model) -> None:
    """Raises ValueError for heads that cannot be shared, or that are too narrow to be turned."""
    text, image = model.text, model.image
    heads = {"num_heads": text.num_heads, "multimodal_heads": text.multimodal_heads}
    for name, count in heads.items():
        if text.kv_heads and count % text.kv_heads:
            raise ValueError(
                f"model.text.kv_heads={text.kv_heads} does not divide model.text.{name}={count}; "
                "choose a divisor"
            )
    upper = text.multimodal_heads or text.num_heads
    if text.width % upper:
        raise ValueError(
            f"model.text.multimodal_heads={upper} does not divide model.text.width={text.width}; "
            "choose a divisor"
        )
    for name, own, width, multiple in (
        ("image", image.block, image.width // image.num_heads, 4),
        ("text", text.block, text.width // text.num_heads, 2),
        ("text", text.multimodal_block, text.width // upper, 2),
    ):
        positions = own.get("positions", model.positions)
        if positions != "learned" and width % multiple:
            raise ValueError(
                f"model.positions={positions!r}: heads of model.{name} are {width} wide, and "
                f"rotary positions need a multiple of {multiple}; choose another num_heads"
            )
