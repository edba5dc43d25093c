"""What the base install does without TensorFlow, seqio and pyarrow, in a process without them."""

import pathlib
import subprocess
import sys

import pytest
from conftest import COMPILE_FAST
from data_cases import write_data

PACKAGE = pathlib.Path(__file__).parent.parent / "coca_jax"
BLOCKED = (
    *("tensorflow", "tensorflow_text", "tensorflow_datasets", "seqio", "pyarrow", "datasets"),
)

# Import of what is not installed fails as it does there.
START = f"""
import importlib.abc, os, sys
os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS="{COMPILE_FAST}")

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
import importlib.util
finds = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {BLOCKED} else finds(name, *rest)
"""


def run(code, timeout=300):
    done = subprocess.run(
        [sys.executable, "-c", START + code], capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.long
def test_train_evaluate_load_caption(tmp_path):
    write_data(tmp_path)
    out = run(f"""
import pathlib
from conftest import tiny_config
import coca_jax
from coca_jax.training import trainer
root = pathlib.Path({str(tmp_path)!r})
config = tiny_config(bias=False)
config.steps, config.batch_size = 2, 8
config.loss.contrastive_weight = 0.0  # half as much to compile
config.model.image.depth = 1
config.model.text.update(vocab_size=400, max_len=16, unimodal_depth=1, multimodal_depth=1)
sources = (dict(path=str(root / "a")), dict(path=str(root / "b"), kind="label"),
           dict(builtin="scenes"), dict(path=str(root / "c"), captions="all", where=dict(group=1)))
config.data.sources = sources
config.eval.tasks = (dict(kind="retrieval", name="a", data=dict(sources[0], split="train")),)
summary = trainer.train(config, str(root / "run"))
assert summary["retrieval/a/num_images"] == 23, summary
model = coca_jax.load(str(root / "run"))
pictures = sorted(map(str, (root / "raw" / "a").glob("*.png")))[:3]
assert len(model.caption(pictures, max_new_tokens=3)) == 3
assert model.encode_image(pictures).shape == (3, 16)
print("done", sorted(set({BLOCKED}) & set(sys.modules)))
""")
    assert out.splitlines()[-1] == "done []"


def test_what_needs_them_names_the_extra(tmp_path):
    write_data(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"any")
    out = run(f"""
import pathlib
from conftest import tiny_config
from coca_jax.training import trainer
from coca_jax.recipes import coca_2b, coca_base, coca_large
from coca_jax.data import batches as loaders, filters as sources; from coca_jax.training import run_vocabulary
from coca_jax.data import evaluation_data as unprepared
from coca_jax.data.prepare import prepare
from coca_jax.data.sources import formats
from coca_jax.apps.recaption.request import Request
root = pathlib.Path({str(tmp_path)!r})
config = tiny_config()
config.data.sources, config.data.loader = (dict(path=str(root / "a")),), "seqio"
config.model.text.vocab_size = 400
for call in (
    lambda: trainer.train(config, str(root / "run")),
    lambda: loaders.open_stream(config, run_vocabulary.load_or_train(config, root)),
    lambda: sources.open_source(dict(seqio="mine")),
    lambda: sources.open_source(dict(tfds="mnist")),
    lambda: unprepared.open_source(dict(tfds="mnist"), "test"),
    lambda: prepare("tfds", "mnist", str(root / "out"), progress=False),
    lambda: prepare("parquet", str(root / "x.parquet"), str(root / "out"), progress=False),
    lambda: Request(input="x", format="csv", out=str(root / "out"), to="parquet"),
    lambda: formats.from_hub("hf://owner/name"),
):
    try:
        call()
    except ValueError as error:
        print(error)
assert not (root / "run").exists() and not (root / "out").exists()
assert {{m.get_config().data.loader for m in (coca_base, coca_large, coca_2b)}} == {{"seqio"}}
""")
    lines = out.splitlines()
    wanted = ["seqio"] * 3 + ["tfds"] * 3 + ["parquet"] * 2 + ["datasets"]
    for line, extra in zip(lines, wanted, strict=True):
        assert f"pip install 'coca_jax[{extra}]'" in line


@pytest.mark.parametrize("recipe", ["demo", "emoji", "coca_224", "tiny"])
def test_other_recipes_train_without(recipe):
    import importlib

    config = importlib.import_module(f"coca_jax.recipes.{recipe}").get_config()
    assert config.data.loader == "direct"
