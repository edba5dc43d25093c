"""The role of every parameter: what freezing, learning rates, decay, Muon and casts go by.

The modules say it: `PARTS` of coca.py, image_encoder.py and text_decoder.py names the parts of the
model, `LEAVES` of layers.py what its parameters are. A parameter that no module describes is an
error, so that a new one cannot be left out of a rule by oversight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp

from coca_jax.config import Optimizer
from coca_jax.config.heads import PoolerKind
from coca_jax.models import block, coca, image_encoder, layers, text_decoder
from coca_jax.models.layers import STACK, Part

# Stacks in the order in which a tower runs them, see `Role.stack`.
PARTS: dict[tuple[str, ...], Part] = {
    **{(name,): part for name, part in coca.PARTS.items()},
    **{("image_encoder", name): part for name, part in image_encoder.PARTS.items()},
    **{("text_decoder", name): part for name, part in text_decoder.PARTS.items()},
}


@dataclasses.dataclass(frozen=True)
class Role:
    """What one parameter is.

    kind: 'kernel' (of a product), 'bias', 'norm' (scales and gains) or 'table' (embeddings,
    positions, the softmax layer, single numbers). part: where it belongs. stack: the path of the
    stack that it is a layer of, or None; its first axis then runs over layers. outputs: how many of
    a kernel's last axes are its outputs, the others but the layers' being summed over.
    """

    kind: str
    part: Part
    stack: tuple[str, ...] | None
    outputs: int

    def dimensions(self, leaf: Any) -> int:
        """Axes of a parameter, that of layers not counted."""
        return leaf.ndim - (self.stack is not None)


def names_of(path: Any) -> tuple[str, ...]:
    """jax's path of a leaf -> the names on it."""
    return tuple(str(getattr(key, "key", key)) for key in path)


def part_of(names: Sequence[str]) -> Part:
    """The part of the model at a path, or that holds it. Raises ValueError where there is none."""
    for length in (1, 2):
        if tuple(names[:length]) in PARTS:
            return PARTS[tuple(names[:length])]
    raise ValueError(
        f"no module says what the parameter {'/'.join(names)} is for; add it to the PARTS of its "
        "module in models/"
    )


def is_optional(names: Sequence[str]) -> bool:
    """Whether weights to start from may have the parameter at a path, or lack it; False for one
    that no module describes."""
    found = (PARTS.get(tuple(names[:length])) for length in (1, 2))
    return any(part.optional for part in found if part)


def role_of(names: Sequence[str]) -> Role:
    """The role of the parameter at a path. Raises ValueError where no module says it."""
    part = part_of(names)
    if names[-1] not in layers.LEAVES:
        raise ValueError(
            f"no module says what kind of parameter {'/'.join(names)} is; add {names[-1]!r} to "
            "LEAVES of models/layers.py"
        )
    stack = tuple(names[: names.index(block.STACKED)]) if block.STACKED in names else None
    outputs = 2 if len(names) > 1 and names[-2] in layers.BY_HEAD else 1
    return Role(layers.LEAVES[names[-1]], part, stack, outputs)


def map_with_roles(function: Any, tree: Any, is_leaf: Any = None) -> Any:
    """The tree of function(role, leaf) over a tree of (or by) parameters."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(role_of(names_of(path)), leaf), tree, is_leaf=is_leaf
    )


def select(tree: dict, wanted: Any, names: tuple[str, ...] = ()) -> dict:
    """What of a tree by parameters has a Part of which wanted(part) holds; no empty branches."""
    found = {}
    for key, value in tree.items():
        path = (*names, key)
        if path not in PARTS and len(path) == 1:
            value = select(value, wanted, path)
            if value:
                found[key] = value
        elif wanted(part_of(path)):
            found[key] = value
    return found


def tower_rates(optimizer: Optimizer) -> dict[str, float]:
    """The learning rate of each tower of a dual encoder; -1: the same as all."""
    return dict(image=optimizer.image_learning_rate, text=optimizer.text_learning_rate)


def with_pooling(words: Set[str], pooler: PoolerKind) -> Set[str]:
    """`serves` of all parts that losses depend on which serve `words`: what serves embeddings reads
    the generative pooler, unless that is of captions alone."""
    pooled = {"pooling"} if "contrastive" in words and not pooler.of_captions else set()
    return words | pooled


def served(tree: dict, words: Set[str], pooler: PoolerKind) -> dict:
    """What of a tree by parameters losses depend on that serve `words`, see `with_pooling`."""
    wanted = with_pooling(words, pooler)
    return select(tree, lambda part: part.serves in wanted)


def of_captions(tree: dict, pooler: PoolerKind) -> dict:
    """What of a tree by parameters captions alone depend on: without it, both embeddings are the
    same. The generative pooler is among it where the contrastive one does not read it."""
    words = {"decoding", "captioning"} | ({"pooling"} if pooler.of_captions else set())
    return select(tree, lambda part: part.serves in words)


def adapted(tree: dict, which: str, names: tuple[str, ...] = ()) -> dict:
    """What of a tree by parameters LoRA adapts: kernels of the blocks' and poolers' attention,
    'qv' of queries and values, 'all' of all four and of the MLPs; no empty branches."""
    found = {}
    for key, value in tree.items():
        path = (*names, key)
        if key != "kernel":
            value = adapted(value, which, path) if isinstance(value, dict) else {}
            if value:
                found[key] = value
        elif which == "qv" and names[-1] in ("query", "value"):
            found[key] = value
        elif which == "all" and any(name.endswith(("attention", "mlp")) for name in names):
            found[key] = value
    return found


def matrix_shape(role: Role, leaf: Any) -> tuple[int, ...]:
    """([layers,] inputs, outputs) of a kernel's leaf as a matrix, or one a layer."""
    layers_ = leaf.shape[: role.stack is not None]
    split = leaf.ndim - role.outputs
    inputs, outputs = leaf.shape[len(layers_) : split], leaf.shape[split:]
    return (*layers_, math.prod(inputs), math.prod(outputs))


def depths(params: Any) -> dict[str, dict[tuple[str, ...], int]]:
    """{tower: {stack: its layers}} of a tree of parameters, in the order in which they run."""
    found: dict[str, dict[tuple[str, ...], int]] = {}
    for path, part in PARTS.items():
        node = params
        for name in path:
            node = node.get(name, {})
        if part.place == STACK and node:
            found.setdefault(part.tower, {})[path] = jax.tree.leaves(node)[0].shape[0]
    return found


def has_task_head(params: dict) -> bool:
    """Whether weights have a task head."""
    return "head" in params


def num_classes(params: dict) -> int:
    """Of the task head that weights have; 0 without one."""
    return params["head"]["classifier"]["kernel"].shape[-1] if has_task_head(params) else 0


def without_task_head(params: dict) -> dict:
    """Weights without their task head."""
    return {name: part for name, part in params.items() if name != "head"}


def without_training_aids(params: dict) -> dict:
    """Weights without layers that a loss of training alone reads."""
    return select(params, lambda part: not part.aid)


def sigmoid_bias(params: dict) -> Any:
    """The learned bias of the sigmoid loss, or None where weights have none."""
    return params["logit_bias"]["value"] if "logit_bias" in params else None


def log_scale(params: dict) -> Any:
    """The logarithm of the similarity's inverse temperature."""
    return params["log_scale"]["value"]


def with_temperature(params: dict, least: float) -> dict:
    """Parameters, or those that are trained, with the similarity's temperature `least` at least."""
    if not least or "log_scale" not in params:
        return params
    bounded = jax.tree.map(lambda x: jnp.minimum(x, -math.log(least)), params["log_scale"])
    return params | {"log_scale": bounded}


def narrow(params: dict) -> dict:
    """Matrices and tables in bfloat16; what the model computes in float32 anyway stays."""

    def one(role: Role, x: Any) -> jax.Array:
        narrow = role.kind in ("kernel", "table") and x.ndim > 1 and not role.part.wide
        return jnp.asarray(x, jnp.bfloat16) if narrow else jnp.asarray(x)

    return map_with_roles(one, params)


def merge(params: dict, part: dict) -> dict:
    """`params` with the parameters in `part` put in their place."""
    merged = dict(params)
    for key, value in part.items():
        merged[key] = merge(params[key], value) if isinstance(value, dict) else value
    return merged
