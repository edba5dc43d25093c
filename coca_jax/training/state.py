"""What a step of training changes: parameters, optimizer, counts, averages; fresh or abstract."""

from __future__ import annotations

import functools
from collections.abc import Callable, Set
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from coca_jax.config import Config, Optimizer, Recipe, heads, typed
from coca_jax.models import lora, network, param_groups
from coca_jax.models.network import Network
from coca_jax.ops.contrastive_loss import UNSEEN
from coca_jax.parallel import sharding as partitioning
from coca_jax.training import losses
from coca_jax.training.optimizer import averages, make_optimizer


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes. step, skipped: int32; ema: averaged params or None.

    opt_state and ema cover only what is trained (see `trainable`). estimates: {'image', 'text'}:
    float32 [N], what the loss against all examples keeps of each (see ops/contrastive_loss.py),
    or None.
    """

    step: jax.Array
    skipped: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    estimates: Any = None

    def items(self) -> dict[str, Any]:
        """The items of a checkpoint: name -> pytree."""
        items = {
            "params": self.params,
            "opt_state": self.opt_state,
            "counters": {"step": self.step, "skipped": self.skipped},
        }
        optional = {"ema": self.ema, "estimates": self.estimates}
        return items | {name: item for name, item in optional.items() if item is not None}

    @classmethod
    def from_items(cls, items: dict[str, Any]) -> TrainState:
        """The state whose `items` are these."""
        rest = {name: item for name, item in items.items() if name != "counters"}
        return cls(**items["counters"], **({"ema": None} | rest))


def build_model(config: Config, mesh: Mesh | None, num_classes: int = 0) -> Network:
    """The module of `config` for the devices of `mesh`, None: those that there are; num_classes: of
    its task head."""
    return network.build(
        config.model,
        remat=config.remat,
        loss=config.loss,
        platform=mesh.devices.flat[0].platform if mesh else None,
        head=config.head,
        num_classes=num_classes,
    )


def make_state(model: Network, config: Config, rng: jax.Array) -> TrainState:
    """A fresh state; parameters boxed with their axis names (trace it with jax.eval_shape)."""
    boxed = network.init(model, rng)
    params = partitioning.unbox(boxed)
    zero = jnp.zeros((), jnp.int32)
    trained = trainable(params, config)
    ema = trained if averages(config.optimizer) else None
    if config.optimizer.lora_rank:
        optimizer: Any = lora.init(trained, config.optimizer, jax.random.fold_in(rng, 1))
    else:
        optimizer = make_optimizer(config.optimizer).init(trained)
    return TrainState(zero, zero, boxed, optimizer, ema, make_estimates(config))


def make_estimates(config: Config) -> dict[str, jax.Array] | None:
    """What the loss against all examples keeps of each before any was seen; None without it.

    Raises ValueError where it is not said how many there are.
    """
    loss = config.loss
    if loss.contrastive != "global" or not loss.contrastive_weight:
        return None
    if loss.global_examples < 2:
        raise ValueError(
            f"loss.global_examples={loss.global_examples}: loss.contrastive='global' keeps numbers "
            "of each example; say how many there are where no data are open"
        )
    fresh = jnp.full(loss.global_examples, UNSEEN, jnp.float32)
    return {side: fresh for side in losses.ESTIMATES}


def trainable(params: dict, config: Config) -> dict:
    """The part of a tree of parameters (or of anything by parameter) that the run trains.

    Everything without a head, or with image_learning_rate 0 all but the image encoder (of dual
    encoders, all but what is up to the image embedding, as text_learning_rate does for the text);
    with keep_embeddings what captions alone depend on; with lora_rank the adapted kernels. With a head:
    the head, and unless encoder_learning_rate is 0 what its loss and the losses beside it depend
    on; weight decay would shrink what has no gradient.
    """
    if config.optimizer.lora_rank:
        return param_groups.adapted(params, config.optimizer.lora)
    if config.optimizer.keep_embeddings:
        return param_groups.of_captions(params, heads.pooler_kind(config.model.pooler.kind))
    if not config.head.kind:
        if config.model.family != "coca":
            rates = param_groups.tower_rates(config.optimizer)
            return param_groups.select(params, lambda part: rates.get(part.tower) != 0)
        if config.optimizer.image_learning_rate:
            return params
        return param_groups.select(params, lambda part: part.serves != "image")
    words = {"head"}
    if config.optimizer.encoder_learning_rate != 0:
        words = words.union(*(objective.serves for objective in losses.of(config)))
    return param_groups.served(params, words, heads.pooler_kind(config.model.pooler.kind))


def learning(config: Config) -> Set[str]:
    """`serves` of the parts of the model that the losses of a run depend on (see models/layers.py).
    What is trained besides has no gradient."""
    words = frozenset().union(*(objective.serves for objective in losses.of(config)))
    return param_groups.with_pooling(words, heads.pooler_kind(config.model.pooler.kind))


def state_shardings(model: Network, config: Config, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """(abstract state, its shardings on the mesh), without making an array.

    Raises ValueError when a parameter cannot be split evenly over the mesh.
    """
    return _shardings(model, of_state(config), mesh)


class Alike:
    """A config by which something is kept: equal to others that say the same."""

    def __init__(self, config: Config):
        self.config = config
        self._text = repr(config)  # a model's blocks are mappings, which have no hash

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alike) and self._text == other._text


def of_state(config: Recipe) -> Alike:
    """What a fresh state follows from beside the module, all else as by default: equal for configs
    that train the same parameters by the same rule, at whatever rates."""
    config = typed(config)
    plain = Optimizer()
    rates = ("learning_rate", "warmup_steps", "schedule", "decay_share")
    optimizer = config.optimizer.replace_unchecked(**{k: getattr(plain, k) for k in rates})
    sections: dict[str, Any] = dict(model=config.model, head=config.head, loss=config.loss)
    return Alike(Config().replace_unchecked(**sections, optimizer=optimizer))


@functools.lru_cache(maxsize=4)  # a start asks four times, and a trace of the model takes a second
def _shardings(model: Network, alike: Alike, mesh: Mesh) -> tuple[TrainState, TrainState]:
    config = alike.config
    boxed = jax.eval_shape(lambda: make_state(model, config, jax.random.key(0)))
    specs = partitioning.param_specs(boxed.params, mesh)
    abstract = boxed.replace(params=partitioning.unbox(boxed.params))
    partitioning.check_divisible(mesh, abstract.params, specs)
    scalar: Any = jax.sharding.PartitionSpec()
    tree = TrainState(
        step=scalar,
        skipped=scalar,
        params=specs,
        opt_state=partitioning.optimizer_specs(abstract.opt_state, abstract.params, specs),
        ema=trainable(specs, config) if averages(config.optimizer) else None,
        estimates=jax.tree.map(lambda _: scalar, abstract.estimates),
    )
    return abstract, partitioning.shardings(mesh, tree)


def init_state(model: Network, config: Config, mesh: Mesh) -> TrainState:
    """A fresh state, made directly in its place on the mesh from config.seed."""
    # As jax.random.key takes a number: its lowest 32 bits, of which int32 would hold 31.
    return _draw(model, of_state(config), mesh)(np.uint32(config.seed))


@functools.lru_cache(maxsize=4)  # its program may take longer to compile than a step's
def _draw(model: Network, alike: Alike, mesh: Mesh) -> Callable[[np.uint32], TrainState]:
    """A seed -> the state of `init_state`, compiled once in a process."""
    _, sharding = _shardings(model, alike, mesh)

    def init(seed: jax.Array) -> TrainState:
        state = make_state(model, alike.config, jax.random.key(seed))
        return state.replace(params=partitioning.unbox(state.params))

    return jax.jit(init, out_shardings=sharding)
