"""Every value of a config has a range; what is absurd is refused before any work, in one line."""

import pytest

from coca_jax.config import Config, read
from coca_jax.recipes import base
from coca_jax.training import recipes

NAN, INF = float("nan"), float("inf")
ABSURD = {
    "seed": (-1, 1 << 32, 1.5, "x", None),
    "batch_size": (0, -1, 2.5, True),
    "steps": (-1, 1e3),
    "epochs": (-1.0, NAN, INF),
    "remat": ("all", None, 1),
    "accumulate_steps": (0, -1, 10**9),
    "image_sizes": (((0.5, -32),), ((2.0, 32),), ((0.6, 32), (0.6, 64)), (32,), "x", 5),
    "text_lengths": ((2,), ("a",)),
    "text_parts": (0, -1, 5000),
    "init_from": (5, None, ("x",)),
    "model.image_size": (0, -224, 10**9),
    "model.patch_size": (0, -16, 2.5),
    "model.embed_dim": (0, 10**6),
    "model.dtype": ("float16", "int8", None),
    "model.temperature": (0.0, -1.0, 1e-30, NAN),
    "model.image_mean": ((0.5, 0.5), (NAN, 0.0, 0.0), 0.5),
    "model.image_std": ((0.5, 0.0, 0.5), (0.5, 0.5), (0.5, 0.5, 1e-30)),
    "model.implementation": ("fast", ""),
    "model.qk_norm": (1, "yes"),
    "model.activation": ("swish",),
    "model.qk_norm_kind": ("batch",),
    "model.image.block": (5, "norm"),
    "model.gated_mlp": ("swiglu",),
    "model.norm": ("batch", None),
    "model.norm_eps": (0.0, -1e-5, NAN, 1.0),
    "model.bias": (0,),
    "model.layer_scale": (-1.0, INF),
    "model.positions": ("sinusoidal", True),
    "model.image.registers": (-1, 0.5),
    "model.image.rope_theta": (0.0, NAN),
    "model.text.kv_heads": (-1,),
    "model.text.rope_theta": (1.0,),
    "model.image.width": (0, -768),
    "model.image.depth": (0, -1, 10**6),
    "model.image.mlp_dim": (0,),
    "model.image.num_heads": (0,),
    "model.image.patch_dropout": (1.0, -0.1),
    "model.image.conv_widths": ((0,), 64),
    "model.image.class_token": ("true",),
    "model.text.width": (0,),
    "model.text.unimodal_depth": (0, 2000),
    "model.text.multimodal_depth": (0,),
    "model.text.vocab_size": (0, -5),
    "model.text.max_len": (2, 10**6),
    "model.text.cls_mask": ("none",),
    "model.text.multimodal_heads": (-1,),
    "model.pooler.kind": ("mean",),
    "model.pooler.num_queries": (0, 10**6),
    "model.pooler.num_heads": (0,),
    "model.pooler.token_dropout": (1.0, -0.5),
    "model.pooler.query_std": (-1.0, 1e3),
    "head.kind": ("regression", None),
    "head.num_queries": (0,),
    "head.unknown": ("ignore",),
    "head.weight": (-1.0, INF, 1e30),
    "head.label_smoothing": (1.0,),
    "loss.contrastive": ("triplet",),
    "loss.reduction": ("none",),
    "loss.label_smoothing": (1.0, -0.1, NAN),
    "loss.captioning_weight": (-1.0, INF, 1e38),
    "loss.contrastive_chunk": (-1, 1.5),
    "loss.caption_chunk": (-1,),
    "loss.hidden_weight": (-1.0,),
    "loss.imitation_weight": (-1.0, INF),
    "loss.hidden_share": (0.0, 1.0),
    "loss.min_temperature": (-0.1, NAN, 101.0),
    "loss.global_rate": (0.0, 1.1),
    "loss.global_examples": (-1, 1.5),
    "loss.bag_weight": (-1.0, INF),
    "loss.z_loss": (-1e-4, 2.0),
    "loss.duplicate_texts": ("drop",),
    "optimizer.name": ("sgd",),
    "optimizer.learning_rate": (1e6, NAN, INF, -1e-3, "fast"),
    "optimizer.encoder_learning_rate": (-0.5, 2.0, NAN),
    "optimizer.layer_decay": (0.0, 1.5),
    "optimizer.projection_rate": (-0.1, 1.5),
    "optimizer.warmup_steps": (-1,),
    "optimizer.schedule": ("step",),
    "optimizer.decay_share": (0.0, 1.5),
    "optimizer.average_share": (1.0, -0.1),
    "optimizer.weight_decay": (-0.1, NAN),
    "optimizer.beta1": (1.0, -0.1),
    "optimizer.beta2": (1.0, -0.1),
    "optimizer.clip_norm": (-1.0, NAN),
    "optimizer.ema": (1.0, 2.0, -0.5),
    "mesh.data": (0, -2),
    "mesh.fsdp": (-2, 1.5),
    "mesh.tensor": (-2, 1.5),
    "data.sources": (({"weight": -1.0},), ({"weight": NAN},), ({"limit": -3},)),
    "data.vocabulary": (None, 7),
    "data.vocabulary_kind": ("wordpiece",),
    "data.label_token": ("no",),
    "data.prompts": (3,),
    "data.augment": ("mixup",),
    "data.randaugment": ((0, 10), (2, 99), 5),
    "data.flip": (1,),
    "data.resize": ("pad",),
    "data.num_frames": (-1, 10**5),
    "data.num_threads": (-1,),
    "data.loader": ("tf",),
    "data.max_bad_fraction": (1.5, -0.1),
    "checkpoint.every": ("never",),
    "checkpoint.every_steps": (0, -1),
    "checkpoint.mean_hours_between_failures": (0.0, -1.0, NAN),
    "checkpoint.keep": (0,),
    "checkpoint.best": (7, None),
    "checkpoint.max_skipped": (-1,),
    "faults.hang_minutes": (-1.0, NAN),
    "faults.spike_deviations": (-1.0,),
    "eval.every_steps": (-1,),
    "eval.tasks": ((5,), "x"),
    "log.every_steps": (0,),
    "log.profile_steps": ((5,), (-1, 3), (0, 3), (10, 5)),
    "log.trackers": (("mlflow",), "wandb"),
}


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_within_the_ranges(name):
    read(Config, recipes.load(name))


@pytest.mark.parametrize("key", ABSURD)
def test_absurd_values_are_refused_by_name(key):
    for value in ABSURD[key]:
        config = base.get_config().to_dict()
        section = config
        *parents, last = key.split(".")
        for parent in parents:
            section = section[parent]
        section[last] = value
        # An entry of a tuple of sections is named by its place: config.data.sources[0].weight=-1.
        with pytest.raises(ValueError, match=rf"^config\.{key}(\[0\]\.\w+)?=.*: give ") as error:
            read(Config, config)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key, value",
    [
        ("optimizer.learning_rate", "-1"),
        ("batch_size", "0"),
        ("model.image_size", "-224"),
        ("data.augment", "mixup"),
        ("image_sizes", "((0.6,32),(0.6,64))"),
    ],
)
def test_the_command_refuses_them_with_status_2(commands, tmp_path, key, value):
    given = ["train", "--config=tiny", "--workdir=w", f"--config.{key}={value}"]
    done = commands.run(given, tmp_path)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert line.startswith(f"error: config.{key}=") and ": give " in line
    assert not (tmp_path / "w").exists()
