"""The update rules written down from their papers, in NumPy float64, over {name: array}.

Nothing here imports the package. A name is a parameter's path, 'tower/part/.../kernel'; whoever
calls says which names decay, which are Muon's matrices and how fast each moves.
"""

import math

import ml_dtypes
import numpy as np


def rate(kind, peak, warmup, steps, step):
    """The learning rate of step 0, 1, ...: in the warm-up it rises by peak / warmup a step, from
    that value on; its last step and the first one after it have the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / (steps - warmup))
    return (
        peak * dict(linear=1 - done, cosine=(1 + math.cos(math.pi * done)) / 2, constant=1.0)[kind]
    )


def clip(gradients, limit):
    """Pascanu et al. 2013, Algorithm 1, over all parameters together; 0: as they are."""
    norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
    factor = limit / norm if limit and norm > limit else 1.0
    return {name: g * factor for name, g in gradients.items()}


class AdamW:
    """Kingma and Ba 2015, Algorithm 1, with epsilon 1e-8."""

    def __init__(self, beta1, beta2):
        self.betas, self.m, self.v, self.t = (beta1, beta2), {}, {}, 0

    def __call__(self, gradients):
        self.t += 1
        (b1, b2), updates = self.betas, {}
        for name, g in gradients.items():
            self.m[name] = b1 * self.m.get(name, 0) + (1 - b1) * g
            self.v[name] = b2 * self.v.get(name, 0) + (1 - b2) * g**2
            mean, square = self.m[name] / (1 - b1**self.t), self.v[name] / (1 - b2**self.t)
            updates[name] = mean / (np.sqrt(square) + 1e-8)
        return updates


class Adafactor:
    """Shazeer and Stern 2018, Algorithms 1, 2 and 4, with the two changes of Zhai et al. 2022,
    Section 3.4: the second moment's decay has a cap, and a first moment is kept in half precision.

    Arrays whose two largest sides are at least 32 long are factored along these; the second
    moment's decay at step t is min(beta2, 1 - t^-0.8), epsilon 1e-30, the updates of one array
    have an RMS of at most 1, and the step is the given rate (no relative step, no scaling by the
    parameter's size).

    stacks: names of arrays whose first side runs over arrays, each of which is one of its own.
    """

    def __init__(self, beta1, beta2, stacks=()):
        self.betas, self.stacks, self.m, self.v, self.t = (beta1, beta2), stacks, {}, {}, 0

    def __call__(self, gradients):
        self.t += 1
        beta1, decay = self.betas[0], min(self.betas[1], 1 - self.t**-0.8)
        updates = {}
        for name, g in gradients.items():
            squares = g**2 + 1e-30
            of_one = range(name in self.stacks, g.ndim)
            sides = sorted(of_one, key=lambda i: g.shape[i])
            if len(sides) >= 2 and g.shape[sides[-2]] >= 32:
                second, first = sides[-2:]
                means = [squares.mean(axis, keepdims=True) for axis in (first, second)]
                rows, columns = (
                    decay * old + (1 - decay) * new
                    for old, new in zip(self.v.get(name, (0, 0)), means)
                )
                self.v[name] = rows, columns
                v = rows * columns / rows.mean(second, keepdims=True)
            else:
                v = self.v[name] = decay * self.v.get(name, 0) + (1 - decay) * squares
            u = g / np.sqrt(v)
            u = u / np.maximum(1, np.sqrt((u**2).mean(tuple(of_one), keepdims=True)))
            updates[name] = m = beta1 * self.m.get(name, 0) + (1 - beta1) * u
            self.m[name] = m.astype(ml_dtypes.bfloat16).astype(np.float64)
        return updates


class Muon:
    """Jordan et al. 2024: Nesterov momentum 0.95, made orthogonal by four quintic Newton-Schulz
    steps, times 0.2 x sqrt(the longer side) as in Liu et al. 2025, Equation 4. AdamW for the rest.

    matrices: {name: (batch axes, axes that are summed over, axes of the outputs)}. The momentum is
    an average without bias: both its terms are divided by 1 - beta^t of their step.
    """

    def __init__(self, beta1, beta2, matrices):
        self.rest, self.matrices, self.m, self.t = AdamW(beta1, beta2), matrices, {}, 0

    def __call__(self, gradients):
        updates = self.rest({n: g for n, g in gradients.items() if n not in self.matrices})
        self.t += 1
        for name, (batch, rows, columns) in self.matrices.items():
            g = gradients[name]
            self.m[name] = 0.95 * self.m.get(name, 0) + 0.05 * g
            ahead = 0.95 * self.m[name] / (1 - 0.95 ** (self.t + 1))
            ahead = ahead + 0.05 * g / (1 - 0.95**self.t)
            order = batch + rows + columns
            x = ahead.transpose(order)
            sides = [math.prod(g.shape[i] for i in axes) for axes in (rows, columns)]
            flat = [orthogonal(matrix) for matrix in x.reshape(-1, *sides)]
            update = np.stack(flat).reshape(x.shape).transpose(np.argsort(order))
            updates[name] = 0.2 * math.sqrt(max(sides)) * update
        return updates


def orthogonal(x, iterations=4):
    """x / |x| through x <- a x + b (x x') x + c (x x')^2 x, on the shorter side."""
    x = x / np.linalg.norm(x)
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.T, iterations).T
    for _ in range(iterations):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x


def step(rule, params, gradients, *, rate, decayed, factors, weight_decay, clip_norm):
    """One update of the parameters in `gradients`; the others stay. Loshchilov and Hutter 2019:
    the decay is no part of the gradient, and multiplied by the rate."""
    updates = rule(clip(gradients, clip_norm))
    moved = dict(params)
    for name, update in updates.items():
        decay = weight_decay * params[name] if name in decayed else 0.0
        moved[name] = params[name] - rate * factors(name, params[name]) * (update + decay)
    return moved
