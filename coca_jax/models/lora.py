"""LoRA (Hu et al. 2022): a kernel moves by a product of two thin matrices, W + alpha / rank A B.

The parameters of a run are the moved kernels, so that evaluation, checkpoints and exports know
nothing of it; the factors and Adam's moments of them are the optimizer's state. By the chain rule
the gradient of A is alpha / rank G B^T, and of B alpha / rank A^T G, with G that of the kernel: the
same training as with factors in the model, and as little optimizer state, but G takes the memory of
the adapted kernels. `extract` and `apply` keep the change of a run apart from its start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from coca_jax.config import Optimizer
from coca_jax.models.param_groups import Role, matrix_shape, names_of, role_of


class Factors(NamedTuple):
    """a: [(layers,) inputs, rank], small and random; b: [(layers,) rank, outputs], zeros."""

    a: Any
    b: Any


class LoraState(NamedTuple):
    """What the optimizer keeps: the factors of each kernel, and Adam's moments of them."""

    factors: Any
    inner: Any


def rule(optimizer: Optimizer) -> optax.GradientTransformation:
    """Adam, without weight decay: the factors start near 0."""
    return optax.scale_by_adam(optimizer.beta1, optimizer.beta2)


def init(kernels: Any, optimizer: Optimizer, rng: jax.Array) -> LoraState:
    """The state before the first step: every change is 0.

    kernels: the adapted parameters alone, see roles.adapted.
    """
    factors = []
    for number, (role, leaf) in enumerate(_leaves(kernels)):
        *layers, inputs, outputs = matrix_shape(role, leaf)
        limit, rank = inputs**-0.5, optimizer.lora_rank
        key, shape = jax.random.fold_in(rng, number), (*layers, inputs, rank)
        a = jax.random.uniform(key, shape, jnp.float32, -limit, limit)
        factors.append(Factors(a, jnp.zeros((*layers, rank, outputs), jnp.float32)))
    return LoraState(factors, rule(optimizer).init(factors))


def step(
    kernels: Any, gradients: Any, state: LoraState, optimizer: Optimizer, rate: jax.Array
) -> tuple[Any, Any]:
    """(the moved kernels, the next state), of kernels and their gradients at a learning rate."""
    scale = optimizer.lora_alpha / optimizer.lora_rank
    thin = []
    for (role, gradient), factors in zip(_leaves(gradients), state.factors):
        g = gradient.reshape(matrix_shape(role, gradient)).astype(jnp.float32)
        a = scale * jnp.matmul(g, factors.b.swapaxes(-1, -2), precision="highest")
        b = scale * jnp.matmul(factors.a.swapaxes(-1, -2), g, precision="highest")
        thin.append(Factors(a, b))
    updates, inner = rule(optimizer).update(thin, state.inner, state.factors)
    factors = jax.tree.map(lambda x, u: x - rate * u, state.factors, updates)
    moved = [
        kernel + (scale * (_product(new) - _product(old))).reshape(kernel.shape)
        for (_, kernel), new, old in zip(_leaves(kernels), factors, state.factors)
    ]
    tree = jax.tree.unflatten(jax.tree.structure(kernels), moved)
    return tree, LoraState(factors, inner)


def _leaves(tree: Any) -> list[tuple[Role, Any]]:
    """(role, leaf) of every kernel, in the order of the tree."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [(role_of(names_of(path)), leaf) for path, leaf in found]


def _product(factors: Factors) -> jax.Array:
    return jnp.matmul(factors.a, factors.b, precision="highest")


def extract(params: Mapping[str, Any], base: Mapping[str, Any], rank: int) -> dict[str, np.ndarray]:
    """What a run changed, as factors of at most `rank`: flat, 'path/a' and 'path/b' in float32.

    params, base: nested, of the run and of what it started from. Of each kernel that changed the
    best approximation of that rank (by singular values), which is exact for a run with lora_rank up
    to it that does not average its parameters: a mean of products has a higher rank. Raises
    ValueError for a parameter that changed and is no kernel, or other shapes.
    """
    found: dict[str, np.ndarray] = {}

    def one(path: Any, role: Any, new: Any, old: Any) -> None:
        change = np.asarray(new, np.float64) - np.asarray(old, np.float64)
        if not change.any():
            return
        if role.kind != "kernel":
            raise ValueError(f"{path} changed and is no kernel: this is no change that LoRA made")
        u, s, v = np.linalg.svd(change.reshape(matrix_shape(role, change)), full_matrices=False)
        half = np.sqrt(s[..., :rank])
        found[f"{path}/a"] = (u[..., :rank] * half[..., None, :]).astype(np.float32)
        found[f"{path}/b"] = (half[..., None] * v[..., :rank, :]).astype(np.float32)

    _walk(one, params, base)
    return found


def apply(
    base: Mapping[str, Any], factors: Mapping[str, np.ndarray], share: float = 1.0
) -> dict[str, Any]:
    """The parameters with `share` of a change that `extract` found. Raises ValueError for factors
    of a kernel that is not there, or of another shape."""
    used: set[str] = set()

    def one(path: str, role: Any, old: Any, _: Any) -> Any:
        if f"{path}/a" not in factors:
            return old
        used.update((f"{path}/a", f"{path}/b"))
        change = np.asarray(factors[f"{path}/a"]) @ np.asarray(factors[f"{path}/b"])
        if change.size != np.size(old):
            raise ValueError(f"the adapter's {path} is of another shape than the model's")
        return np.asarray(old, np.float32) + share * change.reshape(np.shape(old))

    moved = _walk(one, base, base)
    if unknown := sorted(factors.keys() - used):
        raise ValueError(f"the adapter has {unknown[0]}, which the model lacks")
    return moved


def _walk(function: Any, tree: Any, other: Any, names: tuple[str, ...] = ()) -> Any:
    """The tree of function(path, role, leaf, the other's leaf)."""
    if isinstance(tree, Mapping):
        if not isinstance(other, Mapping) or tree.keys() != other.keys():
            raise ValueError(f"{'/'.join(names) or 'the models'}: not the same parameters")
        return {k: _walk(function, v, other[k], (*names, k)) for k, v in tree.items()}
    path = "/".join(names)
    if np.shape(tree) != np.shape(other):
        raise ValueError(f"{path} is of shape {np.shape(tree)} and of {np.shape(other)}")
    return function(path, role_of(names), tree, other)
