"""Layouts of open_clip beside those released, and its preprocessing, against open_clip itself.

Needs torch and open_clip (pip install -e '.[parity]').
"""

import json

import numpy as np
import open_clip_cases as cases
import pytest
from conftest import tiny_config
from conversion_cases import as_tensors, each_loss, forward, relative, with_keys

from coca_jax.config import Model, read, typed
from coca_jax.data import images
from coca_jax.interop import export_format, open_clip_config
from coca_jax.interop.open_clip_weights import Layout
from coca_jax.models import coca

torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
open_clip = pytest.importorskip("open_clip", reason="needs open_clip: pip install -e '.[parity]'")
pytestmark = pytest.mark.torch


def there_and_back(model_config, theirs):
    """Parameters from open_clip's module; written again they are its tensors, to the bit."""
    layout = Layout(model_config)
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    layout.check(state)

    def whole(shape, parts):
        return np.concatenate([np.ravel(part) for part in parts()]).reshape(shape)

    read_in = {path: whole(b.shape, b.parts) for path, b in layout.read(state).items()}
    for key, (shape, parts) in layout.write(read_in).items():
        np.testing.assert_array_equal(whole(shape, parts), state[key])
    return export_format.unflatten(read_in)


ONE = dict(layers=1)  # where it is no matter of blocks, of which "blocks" has several


@pytest.mark.parametrize("pool", ["cascade", "parallel"])
def test_two_poolers_and_the_corrected_mask(pool):
    """coca2's arrangement. open_clip 3.3.0 has its parts, but joins them wrongly and has no
    configuration for the mask, so the test joins them as later versions do."""
    import open_clip_oracle as oracle
    from open_clip.transformer import AttentionalPooler, LayerNorm

    changes = dict(vision_cfg=dict(attentional_pool=pool), text_cfg=dict(correct_cls_mask=True))
    small = with_keys(cases.SMALL, vision_cfg=ONE, multimodal_cfg=ONE)
    config = with_keys(small, **changes) | dict(quick_gelu=True)
    theirs = open_clip.coca_model.CoCa(
        **{
            key: value
            for key, value in with_keys(config, text_cfg=dict()).items()
            if key != "custom_text"
        }
        | dict(text_cfg=small["text_cfg"])
    )
    theirs.text.correct_cls_mask = True
    vision = theirs.visual
    vision.ln_post, vision.proj = LayerNorm(64), None
    if pool == "cascade":
        vision.attn_pool_contrastive = AttentionalPooler(48, 48, n_head=4, n_queries=1)
    original = vision._pool
    vision._pool = lambda x: (original(x)[0][:, 0], original(x)[1])
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            tensor.copy_(torch.from_numpy(cases.redraw(name, tuple(tensor.shape))))
    theirs.eval()
    model_config = read(Model, open_clip_config.to_model(config))
    params = there_and_back(model_config, theirs)
    tokens, pixels = cases.captions(530, 12), cases.pixels(6, 32)
    out = forward(coca.build(model_config), params, pixels, tokens)
    assert_near(out, oracle.run(theirs, pixels, tokens), tokens, 2e-5)


BLOCKS = dict(
    vision_cfg=dict(ls_init_value=0.1, qk_norm=True, norm_kwargs=dict(eps=1e-3)),
    text_cfg=dict(act_kwargs=dict(approximate="tanh"), qk_norm=True),
    multimodal_cfg=dict(ls_init_value=0.2),
)
OTHERS = dict(
    blocks=BLOCKS,
    tall_with_wide_patches=dict(
        vision_cfg=ONE | dict(image_size=[48, 32], patch_size=[8, 16]),
        text_cfg=ONE,
        multimodal_cfg=ONE,
    ),
    no_pooler=dict(
        vision_cfg=ONE | dict(attentional_pool=False),
        text_cfg=ONE | dict(width=64, heads=4),
        multimodal_cfg=ONE | dict(width=64, heads=4),
    ),
)
# Of an image or a patch alone that is not square, outputs.
NOT_SQUARE = dict(
    wide=dict(vision_cfg=ONE | dict(image_size=[16, 40]), text_cfg=ONE, multimodal_cfg=ONE),
    square_with_tall_patches=dict(
        vision_cfg=ONE | dict(patch_size=[16, 8]), text_cfg=ONE, multimodal_cfg=ONE
    ),
)


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
@pytest.mark.long
def test_other_layouts_come_in_and_go_back(changes):
    """LayerScale, QK-norm, other eps and tanh GELU, each in some towers, and images and patches
    that are not square, in outputs and gradients; what comes back is the same configuration and
    the same tensors."""
    import open_clip_oracle as oracle

    theirs, model_config, params = converted(changes)
    tokens, pixels = cases.captions(530, 12), cases.pixels(6, model_config.image_size)
    ours = list(each_loss(coca.build(model_config), params, pixels, tokens))
    its_own = oracle.losses(theirs, pixels, tokens)
    for (value, gradients, _), (loss, wanted) in zip(ours, its_own, strict=True):
        assert value == pytest.approx(loss, rel=1e-5)
        found = as_tensors(model_config, gradients)
        for key, tensor in wanted.items():
            if key.endswith("attn.ln_k.bias"):  # softmax does not see it: rounding alone
                assert np.abs(found[key]).max() == 0 and np.abs(tensor).max() < 1e-6
                continue
            scale = max(np.abs(tensor).max(), 1e-12)
            assert np.abs(found[key] - tensor).max() <= 1e-4 * scale, key
    assert_near(ours[0][2], oracle.run(theirs, pixels, tokens), tokens, 1e-5)


@pytest.mark.parametrize("changes", NOT_SQUARE.values(), ids=NOT_SQUARE)
def test_what_is_not_square_gives_the_same_outputs(changes):
    import open_clip_oracle as oracle

    theirs, model_config, params = converted(changes)
    tokens, pixels = cases.captions(530, 12), cases.pixels(6, model_config.image_size)
    out = forward(coca.build(model_config), params, pixels, tokens)
    assert_near(out, oracle.run(theirs, pixels, tokens), tokens, 1e-5)


def converted(changes):
    """(open_clip's model with other keys, its configuration here, its parameters here)."""
    import open_clip_oracle as oracle

    config = with_keys(cases.SMALL, **changes)
    theirs = oracle.build(config)
    model_config = read(Model, open_clip_config.to_model(config))
    back = open_clip_config.from_model(model_config)
    assert open_clip_config.to_model(back) == open_clip_config.to_model(config)
    json.dumps(back)
    return theirs, model_config, there_and_back(model_config, theirs)


def assert_near(out, wanted, tokens, tolerance):
    labels = tokens[:, 1:] != 0
    assert relative(out.image_embedding, wanted["image_features"]) < tolerance
    assert relative(out.text_embedding, wanted["text_features"]) < tolerance
    logits = np.asarray(out.logits[:, :-1])[labels]
    assert relative(logits, wanted["logits"][labels]) < tolerance


@pytest.fixture(scope="module")
def odd():
    """100 images of every kind, drawn once."""
    return cases.odd_images(100)


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_preprocessing_of_100_odd_images(resize, odd):
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from PIL import Image

    config = tiny_config(image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6))
    said = open_clip_config.write(typed(config).model, resize)
    transform = image_transform_v2(PreprocessCfg(size=224, **said), is_train=False)
    mean, std = (np.asarray(said[name], np.float32) for name in ("mean", "std"))
    for image in odd:
        rgb = images.decode(image)
        got = images.preprocess_eval(rgb, 224, resize).astype(np.float32) / 255
        # To RGB first, as open_clip's own loader does.
        wanted = transform(Image.fromarray(rgb)).numpy().transpose(1, 2, 0) * std + mean
        assert np.abs(got - wanted).max() <= 2 / 255, (image.mode, image.size)
        if image.mode not in ("I;16", "RGBA"):
            np.testing.assert_array_equal(rgb, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("size", [(96, 224), (224, 63)])
def test_preprocessing_of_odd_images_to_sizes_that_are_not_square(size, odd):
    from open_clip.transform import image_transform
    from PIL import Image

    transform = image_transform(size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    for image in odd[:30]:
        rgb = images.decode(image)
        got = images.preprocess_eval(rgb, size, "crop").astype(np.float32) / 255
        wanted = transform(Image.fromarray(rgb)).numpy().transpose(1, 2, 0)
        assert got.shape == (*size, 3) and np.abs(got - wanted).max() <= 2 / 255, image.size
