"""Which parameters of real models are decayed, which are Muon's, and that each has a role."""

import re

import jax
import pytest
from conftest import tiny_config
from optimizer_cases import KEY

from coca_jax.config import typed
from coca_jax.models import coca, network, param_groups
from coca_jax.models.layers import Part
from coca_jax.parallel import sharding
from coca_jax.training import optimizer, recipes

SIZE = r"\b(\w+_)?(width|depth|dim|heads|len|size|queries)=[1-9]\d*\b"


@pytest.fixture(scope="module")
def model_params():
    """Shapes of a model with everything: a convolutional stem, a head, the sigmoid loss's bias."""
    config = tiny_config(patch_size=4)
    config.model.image.update(conv_widths=(8, 8), conv_depths=(1, 1))
    config.head.kind = "answer"
    model = coca.build(config.model, sigmoid=True, head=config.head, num_classes=3)
    return jax.eval_shape(lambda: sharding.unbox(coca.init(model, jax.random.key(0))))


def test_weight_decay_by_names_of_a_real_model(model_params):
    """Kernels, tables and queries; neither biases, norms, gains, [CLS] nor scalars."""
    tables = {
        "contrastive_pooler/query/value",
        "generative_pooler/query/value",
        "head/pooler/query/value",
        "image_encoder/positions/value",
        "text_decoder/positions/value",
        "text_decoder/token_embedding/value",
        "text_decoder/head/kernel/value",
    }
    mask = {
        "/".join(k.key for k in path): value
        for path, value in jax.tree_util.tree_leaves_with_path(optimizer.is_matrix(model_params))
    }
    assert tables < set(mask)
    kernels = {name for name in mask if name.endswith("/kernel")}
    assert len(kernels) > 40
    assert {name for name, value in mask.items() if value} == tables | kernels


def test_muon_takes_the_kernels_of_a_real_model(model_params):
    """(axes that are summed over, axes of the outputs); layers stay apart."""
    axes = jax.tree_util.tree_leaves_with_path(
        optimizer.kernel_axes(model_params),
        is_leaf=lambda x: x is None or isinstance(x, optimizer.MuonDimensionNumbers),
    )
    found = {"/".join(k.key for k in path): value for path, value in axes}
    assert {n for n, v in found.items() if v} == {n for n in found if n.endswith("/kernel")}
    for name, value in found.items():
        if value is None:
            continue
        first = int("/layers/" in name)  # of an array without its axis of layers
        if name.split("/")[-2] in ("query", "key", "value"):
            wanted = (0,), (1, 2)
        elif name.endswith("attention/out/kernel"):
            wanted = (0, 1), (2,)
        elif "/stem/" in name:
            wanted = (0, 1, 2), (3,)
        else:
            wanted = (0,), (1,)
        assert value == tuple(tuple(first + i for i in side) for side in wanted), name


@pytest.mark.long
def test_every_parameter_of_every_recipe_has_a_role():
    """A part or a kind of parameter that no module describes is refused by name. Models that differ
    in sizes alone, none of them 0, have the same parameters."""
    models = {
        repr(model): model for model in (typed(recipes.load(r)).model for r in recipes.names())
    }
    assert len(models) > 10
    kinds = {re.sub(SIZE, "", text): model for text, model in models.items()}
    assert 5 < len(kinds) < len(models)
    for model in kinds.values():
        module = network.build(model, sigmoid=True)
        params = jax.eval_shape(lambda m=module: sharding.unbox(network.init(m, KEY)))
        found = jax.tree.leaves(param_groups.map_with_roles(lambda role, _: role.kind, params))
        assert set(found) - {"bias"} == {"kernel", "norm", "table"}
        assert ("bias" in found) == model.bias
    for names, remedy in {
        ("image_encoder", "memory", "value"): "add it to the PARTS",
        ("text_decoder", "unimodal", "layers", "mlp", "gate"): "add 'gate' to LEAVES",
    }.items():
        with pytest.raises(ValueError, match=f"{'/'.join(names)}.*{remedy}"):
            param_groups.role_of(names)


def test_layers_that_training_alone_reads_are_told_by_their_part(monkeypatch):
    """Weights for other programs leave them out, be they of a loss that was added."""
    monkeypatch.setitem(
        param_groups.PARTS, ("length_head",), Part("length", optional=True, aid=True)
    )
    layer = dict(kernel=0, bias=0)
    kept = dict(log_scale=dict(value=0), image_encoder=dict(final_norm=dict(scale=0)))
    encoder = dict(kept["image_encoder"], mask_token=dict(value=0))
    aids = dict(length_head=layer, bag_head=dict(value=0), token_predictor=layer)
    assert param_groups.without_training_aids(kept | aids | dict(image_encoder=encoder)) == kept
