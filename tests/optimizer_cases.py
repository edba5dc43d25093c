"""A small tree of parameters, its gradients, and steps with them here and by the definitions.

Names and shapes are as a model has them; gradients are random, of very different sizes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import update_rules
from conftest import tiny

from coca_jax.config import typed
from coca_jax.training import optimizer
from coca_jax.training.state import TrainState, trainable
from coca_jax.training.train_step import make_update

TOLERANCE = 2e-5
KEY = jax.random.key(0)
STEPS = 6
ENCODER, DECODER = "image_encoder/blocks/layers/", "text_decoder/multimodal/layers/"

SHAPES = {
    "image_encoder/patch_embedding/kernel": (48, 40),
    "image_encoder/positions/value": (36, 33),
    ENCODER + "attention/query/kernel": (3, 40, 4, 10),
    ENCODER + "attention/query/bias": (3, 4, 10),
    ENCODER + "attention/out/kernel": (3, 4, 10, 40),
    ENCODER + "attention/out/bias": (3, 40),
    ENCODER + "mlp/in/kernel": (3, 40, 34),
    ENCODER + "mlp_norm/scale": (3, 40),
    "image_encoder/final_norm/scale": (40,),
    "image_to_joint/kernel": (33, 32),
    "text_decoder/token_embedding/value": (50, 31),
    "text_decoder/unimodal/layers/mlp/out/kernel": (2, 34, 32),
    DECODER + "mlp/out/kernel": (2, 34, 32),
    "text_decoder/unimodal_norm/scale": (32,),
    "text_decoder/multimodal_norm/scale": (32,),
    "text_decoder/head/kernel/value": (32, 50),
    "text_decoder/head/bias/value": (50,),
    "log_scale/value": (),
    "head/classifier/kernel": (40, 3),
    "head/classifier/bias": (3,),
}

# Weight decay: kernels and tables. Muon: kernels but for the softmax over the vocabulary, as
# (layers, axes that are summed over, axes of the outputs).
TABLES = {
    "image_encoder/positions/value",
    "text_decoder/token_embedding/value",
    "text_decoder/head/kernel/value",
}
KERNELS = {
    "image_encoder/patch_embedding/kernel": ((), (0,), (1,)),
    ENCODER + "attention/query/kernel": ((0,), (1,), (2, 3)),
    ENCODER + "attention/out/kernel": ((0,), (1, 2), (3,)),
    ENCODER + "mlp/in/kernel": ((0,), (1,), (2,)),
    "image_to_joint/kernel": ((), (0,), (1,)),
    "text_decoder/unimodal/layers/mlp/out/kernel": ((0,), (1,), (2,)),
    DECODER + "mlp/out/kernel": ((0,), (1,), (2,)),
    "head/classifier/kernel": ((), (0,), (1,)),
}
DECAYED = TABLES | set(KERNELS)
# layer_decay's power for each layer of three in the encoder, of two and two in the decoder.
DEPTHS = {
    "image_encoder/patch_embedding/": 4,
    "image_encoder/positions/": 4,
    ENCODER: (3, 2, 1),
    "text_decoder/token_embedding/": 5,
    "text_decoder/unimodal/": (4, 3),
    DECODER: (2, 1),
}


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.normal(size=s)).astype(np.float32) for n, s in SHAPES.items()}


def gradients_of(step):
    """Of very different sizes: some steps below the norm of 1, some above, some near it."""
    scale = (1e-3, 0.5, 0.008, 3.0, 0.004, 0.02)[step]
    found = draw(100 + step, scale)
    found[ENCODER + "mlp/in/kernel"][0] *= 30.0  # so that clipping its RMS is seen
    return found


def nested(flat):
    tree = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[last] = value
    return tree


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(k.key for k in path): np.asarray(leaf) for path, leaf in leaves}


def make_config(**changes):
    rule = dict(name="adamw", schedule="linear", beta1=0.9, beta2=0.99, clip_norm=1.0)
    rates = dict(learning_rate=0.05, warmup_steps=2, weight_decay=0.0, layer_decay=1.0)
    return tiny(optimizer=rule | rates | changes)


UPDATES = {}


def update_of(config):
    """`make_update`, jitted once for all that ask for the same configuration."""
    if (told := repr(config)) not in UPDATES:
        UPDATES[told] = jax.jit(make_update(config))
    return UPDATES[told]


def ours(config, gradients, start=None):
    """States before and after each step, on the host, and the metrics of each step."""
    params = jax.tree.map(jnp.asarray, nested(start or draw(0, 0.3)))
    trained = trainable(params, config)
    rule = optimizer.make_optimizer(config.optimizer)
    ema = trained if optimizer.averages(config.optimizer) else None
    zero = jnp.zeros((), jnp.int32)
    states = [TrainState(zero, zero, params, rule.init(trained), ema)]
    update = update_of(config)
    schedule = optimizer.make_schedule(typed(config).optimizer, STEPS)
    metrics = []
    for found in gradients:
        chosen = trainable(nested(found), config)
        state, values = update(states[-1], chosen, schedule)
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(values))
    return states, metrics


def rule_of(options):
    betas = options.beta1, options.beta2
    if options.name == "muon":
        return update_rules.Muon(*betas, KERNELS)
    if options.name == "adafactor":
        return update_rules.Adafactor(*betas, {name for name in SHAPES if "/layers/" in name})
    return update_rules.AdamW(*betas)


def factor(name, param, encoder=1.0, decay=1.0, projections=1.0):
    """The rate of a parameter over that of the head."""
    if name.startswith("head/"):
        return 1.0
    if name == "image_to_joint/kernel":
        return encoder * projections
    depth = next((d for prefix, d in DEPTHS.items() if name.startswith(prefix)), 0)
    if isinstance(depth, int):
        return encoder * decay**depth
    return encoder * np.array([decay**d for d in depth]).reshape(-1, *[1] * (param.ndim - 1))


def definition(config, gradients, factors=factor):
    """Parameters after each step, float64."""
    options = config.optimizer
    rule = rule_of(options)
    params = [{n: p.astype(np.float64) for n, p in draw(0, 0.3).items()}]
    for step, found in enumerate(gradients):
        if not all(np.isfinite(g).all() for g in found.values()):
            params.append(params[-1])
            continue
        rate = update_rules.rate(
            options.schedule, options.learning_rate, options.warmup_steps, STEPS, step
        )
        params.append(
            update_rules.step(
                rule,
                params[-1],
                {n: g.astype(np.float64) for n, g in found.items()},
                rate=rate,
                decayed=DECAYED,
                factors=factors,
                weight_decay=options.weight_decay,
                clip_norm=options.clip_norm,
            )
        )
    return params


def assert_steps_are_those_of_the_definition(config, gradients, tolerance, factors=factor):
    states, metrics = ours(config, gradients)
    wanted = definition(config, gradients, factors)
    for number, (state, want) in enumerate(zip(states, wanted, strict=True)):
        for name, values in flat(state.params).items():
            worst = np.abs(values - want[name]).max() / config.optimizer.learning_rate
            assert worst < tolerance, (number, name, worst)
    return states, metrics
