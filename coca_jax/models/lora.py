"""LoRA (Hu et al. 2022): a kernel moves by a product of two thin matrices, W + alpha / rank A B.

The parameters of a run are the moved kernels, so that evaluation, checkpoints and exports know
nothing of it; the factors and Adam's moments of them are the optimizer's state. By the chain rule
the gradient of A is alpha / rank G B^T, and of B alpha / rank A^T G, with G that of the kernel: the
same training as with factors in the model, and as little optimizer state, but G takes the memory of
the adapted kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
