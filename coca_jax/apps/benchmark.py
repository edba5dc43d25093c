"""Times of a model with random weights: image encoding, captions, a token."""

from __future__ import annotations

import functools
import io
import itertools
import multiprocessing
import os
import pathlib
import resource
import statistics
import tarfile
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coca_jax.checkpoints import config_file
from coca_jax.config import Config, Model, Recipe, shapes, typed
from coca_jax.config.shapes import Size
from coca_jax.data import batches
from coca_jax.data.batches import open_stream
from coca_jax.data.mixture import Mixture, head_classes
from coca_jax.data.sources import files
from coca_jax.data.sources.records import Record
from coca_jax.inference.generation import driver
from coca_jax.inference.generation.config import GenerationConfig
from coca_jax.interop import open_clip_config
from coca_jax.models import coca, text_decoder
from coca_jax.models.image_encoder import normalise_pixels
from coca_jax.ops.captioning_loss import captioning_loss
from coca_jax.ops.contrastive_loss import contrastive_loss
from coca_jax.parallel import sharding
from coca_jax.runtime import machine
from coca_jax.training import auto_mesh, feed, programs, run_vocabulary
from coca_jax.training.optimizer import make_schedule
from coca_jax.training.state import build_model, init_state
from coca_jax.training.train_step import of_step

# `benchmark losses`: both losses against their plain definitions, memory and time.
#
# Peak memory is the compiler's own count of temporaries and results at the full size; nothing of
# that size has to be run. Times are medians at the size given for timing.


def naive_contrastive(image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
    """The paper's Eq. 2 as it is written: [B, E], [B, E], temperature -> loss."""
    scores = scale * image @ text.T
    rows = jnp.diagonal(jax.nn.log_softmax(scores, axis=1))
    columns = jnp.diagonal(jax.nn.log_softmax(scores, axis=0))
    return -(rows + columns).mean()


def naive_captioning(
    states: jax.Array, kernel: jax.Array, bias: jax.Array, targets: jax.Array, mask: jax.Array
) -> jax.Array:
    """The paper's Eq. 3 with all logits [B, L, V] at once -> mean loss."""
    logits = jnp.einsum("bld,dv->blv", states, kernel) + bias
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return -(picked * mask).sum() / mask.sum()


def measure_losses(
    functions: dict[str, Callable[..., Any]],
    full: tuple[Any, ...],
    timed: tuple[Any, ...],
    repeats: int,
) -> dict[str, Any]:
    """{name}_bytes at the shapes `full`, {name}_seconds on the arrays `timed`, and the ratios."""
    result: dict[str, Any] = {}
    compiled = {}
    for name, function in functions.items():
        jitted = jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2)))
        memory = jitted.lower(*full).compile().memory_analysis()
        result[f"{name}_bytes"] = memory.temp_size_in_bytes + memory.output_size_in_bytes
        compiled[name] = jitted.lower(*timed).compile()
        jax.block_until_ready(compiled[name](*timed))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):  # turn about, so that a busy spell hits all alike
        for name, function in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*timed))
            times[name].append(time.perf_counter() - start)
    for name, values in times.items():
        result[f"{name}_seconds"] = statistics.median(values)
        result[f"{name}_seconds_spread"] = max(values) - min(values)
    result["memory_ratio"] = result["ours_bytes"] / result["naive_bytes"]
    result["time_ratio"] = result["ours_seconds"] / result["naive_seconds"]
    return result


def contrastive(batch: int, width: int, timed_batch: int, chunk: int, repeats: int) -> dict:
    """Our contrastive loss in column tiles of `chunk` against the plain one."""

    def ours(image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
        return contrastive_loss(image, text, scale, chunk=chunk)[0]

    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2, timed_batch, width)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    shape = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    timed = (jnp.asarray(rows[0]), jnp.asarray(rows[1]), jnp.float32(14.3))
    functions: dict[str, Callable[..., Any]] = {"naive": naive_contrastive, "ours": ours}
    return measure_losses(functions, (shape, shape, scalar), timed, repeats)


def captioning(
    batch: int, length: int, vocab: int, width: int, timed_batch: int, chunk: int, repeats: int
) -> dict:
    """Our captioning loss in chunks of tokens against the plain one; all targets real."""

    def ours(states: jax.Array, kernel: jax.Array, bias: jax.Array, *rest: jax.Array) -> jax.Array:
        return captioning_loss(states, kernel, bias, *rest, chunk=chunk)[0]

    def shapes(rows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        shape = jax.ShapeDtypeStruct
        return (
            shape((rows, length, width), jnp.float32),
            shape((width, vocab), jnp.float32),
            shape((vocab,), jnp.float32),
            shape((rows, length), jnp.int32),
            shape((rows, length), jnp.bool_),
        )

    rng = np.random.default_rng(0)
    timed = (
        jnp.asarray(rng.normal(size=(timed_batch, length, width)), jnp.float32),
        jnp.asarray(rng.normal(size=(width, vocab)) * 0.02, jnp.float32),
        jnp.zeros((vocab,), jnp.float32),
        jnp.asarray(rng.integers(0, vocab, size=(timed_batch, length)), jnp.int32),
        jnp.ones((timed_batch, length), bool),
    )
    functions: dict[str, Callable[..., Any]] = {"naive": naive_captioning, "ours": ours}
    return measure_losses(functions, shapes(batch), timed, repeats)


def run(repeats: int = 5) -> dict[str, Any]:
    """Both comparisons at the sizes that docs/performance.md quotes; prints a table."""
    result = {
        "contrastive": contrastive(32_768, 512, 8_192, 1_024, repeats),
        "captioning": captioning(64, 76, 49_408, 512, 8, 304, repeats),
    }
    for name, numbers in result.items():
        print(
            f"{name:12s} memory {numbers['ours_bytes'] / 2**20:.0f} MiB of "
            f"{numbers['naive_bytes'] / 2**20:.0f} MiB ({numbers['memory_ratio']:.3f}), time "
            f"{numbers['ours_seconds']:.3f} s of {numbers['naive_seconds']:.3f} s "
            f"({numbers['time_ratio']:.2f})"
        )
    return result


# open_clip (PyTorch) at the same work and sizes, in the same session: `benchmark --peer`.
#
# Needs `pip install '.[parity]'`. Models have random weights; their sizes come from the config, which
# must be one that open_clip can express. The input pipeline reads the same records.


END = 1  # the token that would end a caption; kept away by min_seq_len


def import_torch(flag: str = "--peer") -> Any:
    """torch. Raises ValueError, naming the flag that asks, where open_clip is not installed."""
    try:
        import open_clip  # noqa: F401
        import torch
    except ImportError as error:
        raise ValueError(f"{flag} needs open_clip: pip install '.[parity]'") from error
    return torch


def tokens(texts: Sequence[str], length: int) -> np.ndarray:
    """Texts as open_clip's tokenizer gives them, int [B, length], 0 where there is nothing."""
    import_torch("--texts")
    import open_clip

    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=length)
    found: np.ndarray = tokenizer(list(texts)).numpy()
    return found


def trainer(config: Config) -> Callable[[np.ndarray, np.ndarray], float]:
    """A function that takes one step of open_clip's CoCa: (pixels uint8 [B, S, S, 3], tokens int
    [B, L], 0 where there is nothing) -> loss.

    Both losses with the config's weights, AdamW with its constants, its gradient clipping; in
    bfloat16 under autocast. Raises ValueError for another optimizer than AdamW, and for image
    tokens that are hidden from the decoder.
    """
    torch = import_torch()
    from open_clip.loss import CoCaLoss

    options = config.optimizer
    if options.name != "adamw":
        raise ValueError(
            f"--peer trains with AdamW but optimizer.name={options.name!r}; "
            "add --config.optimizer.name=adamw"
        )
    if hidden := config.model.pooler.token_dropout:
        raise ValueError(
            f"--peer: model.pooler.token_dropout={hidden} hides image tokens from the decoder; "
            "open_clip has no such option; add --config.model.pooler.token_dropout=0"
        )
    peer = build_peer(config.model, training=True).train()
    rule = torch.optim.AdamW(
        peer.parameters(),
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        weight_decay=options.weight_decay,
    )
    loss = CoCaLoss(config.loss.captioning_weight, config.loss.contrastive_weight)
    narrow = config.model.dtype == "bfloat16"

    def step(pixels: np.ndarray, tokens: np.ndarray) -> float:
        rule.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
            found = peer(_images(pixels), torch.from_numpy(tokens).long())
            values = {k: v for k, v in found.items() if k != "logit_bias"}
            total: Any = sum(loss(**values))
        total.backward()
        if options.clip_norm:
            torch.nn.utils.clip_grad_norm_(peer.parameters(), options.clip_norm)
        rule.step()
        return float(total.detach())

    return step


def build_peer(model: Model, training: bool = False) -> Any:
    """open_clip's CoCa of these sizes, float32, in evaluation mode.

    Every parameter is drawn again: open_clip leaves some as the memory was found, NaN included.

    It computes on the CPU. Raises ValueError where JAX does not, when open_clip is not installed or
    has no such model, and for a model in bfloat16, which would be no like for like but in
    `training`, where autocast is theirs.
    """
    if jax.default_backend() != "cpu":
        raise ValueError(
            f"--peer runs open_clip on the CPU and JAX computes on a {jax.default_backend()}: give "
            "the command with JAX_PLATFORMS=cpu"
        )
    if model.dtype != "float32" and not training:
        raise ValueError(
            f"--peer runs in float32 but model.dtype={model.dtype!r}; "
            "add --config.model.dtype=float32"
        )
    torch = import_torch()
    from open_clip.coca_model import CoCa

    config = open_clip_config.from_model(model)
    try:
        peer = CoCa(**{k: v for k, v in config.items() if k != "custom_text"})
    except TypeError as error:  # a key that only other releases know, as correct_cls_mask
        raise ValueError(
            f"--peer: the installed open_clip has no such model ({error}); of correct_cls_mask: "
            "add --config.model.text.cls_mask=shifted"
        ) from error
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(std=0.02, generator=generator)
    return peer.eval()


def encode_with_peer(peer: Any, pixels: np.ndarray) -> np.ndarray:
    """Pixels uint8 [B, S, S, 3] -> image embeddings float32 [B, E]."""
    import torch

    with torch.no_grad():
        return peer.encode_image(_images(pixels)).numpy()


def caption_with_peer(peer: Any, pixels: np.ndarray, tokens: int, beams: int) -> np.ndarray:
    """Pixels uint8 [B, S, S, 3] -> ids int [B, 1 + tokens], greedy or by one group of beams."""
    import torch

    length = tokens + 1
    options: dict[str, Any] = dict(
        seq_len=length,
        min_seq_len=length - 1,
        eos_token_id=END,
        pad_token_id=0,
        sot_token_id=2,
        fixed_output_length=True,
    )
    if beams > 1:
        options |= dict(generation_type="beam_search", num_beams=beams, num_beam_groups=1)
    else:
        options |= dict(generation_type="top_k", top_k=1)
    with torch.no_grad():
        return peer.generate(_images(pixels), **options).numpy()


def _images(pixels: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)


def write_tar(records: Sequence[Record], path: str) -> None:
    """Writes records as the webdataset tar that `input_batches` reads, the first text of each."""
    with tarfile.open(path, "w") as archive:
        for number, record in enumerate(records):
            suffix = "png" if record.image.startswith(b"\x89PNG") else "jpg"
            text = (record.texts or record.labels or ("",))[0]
            for name, data in ((suffix, record.image), ("txt", text.encode())):
                info = tarfile.TarInfo(f"{number:06d}.{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def input_batches(tars: str, examples: int, batch_size: int, size: Size) -> Iterator[Any]:
    """open_clip's own training pipeline over webdataset tars, epoch after epoch, in this thread.

    Its shuffle buffers, its default augmentation (a bicubic crop of 90 to 100% of the area) and
    its CLIP tokenizer; images float32 [B, 3, S, S], as its model wants them.

    Raises ValueError when open_clip or webdataset is not installed, and for fewer examples than a
    batch, of which its pipeline, which leaves out rests, would never give one.
    """
    if examples < batch_size:
        raise ValueError(
            f"--peer reads {examples:,} records again and again, of which open_clip's pipeline "
            f"gives no batch of {batch_size:,}; add --config.batch_size={examples} or less"
        )
    try:
        import open_clip
        import torch
        from open_clip.transform import image_transform
        from open_clip_train.data import get_wds_dataset
    except ImportError as error:
        raise ValueError(f"--peer needs open_clip ({error}): pip install '.[parity]'") from error
    torch.set_num_threads(1)
    args = types.SimpleNamespace(
        train_data=tars,
        train_num_samples=examples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        workers=0,
        world_size=1,
        batch_size=batch_size,
        seed=0,
    )
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    found = get_wds_dataset(args, image_transform(size, True), True, tokenizer=tokenizer)
    for epoch in itertools.count():
        found.set_epoch(epoch)
        for images, texts in found.dataloader:
            yield images.numpy(), texts.numpy()


Call = Callable[[], Any]
USUAL_TOKENS = 60  # of a caption that is timed


def timed(function: Call, repeats: int, peer: Call | None = None) -> dict[str, float]:
    """{seconds: median, seconds_low, seconds_high, cpu_seconds: median of processor time} of
    calls, each until its arrays are there.

    With `peer`, its calls alternate with ours: also {peer_seconds..., times_peer, cpu_times_peer:
    the quotients of the medians}.
    """
    calls = {"": function} if peer is None else {"": function, "peer_": peer}
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(repeats):
        for name, call in calls.items():
            start, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
            spent[name].append(time.process_time() - cpu)
    result = {}
    for name, taken in times.items():
        result[f"{name}seconds"] = statistics.median(taken)
        result |= {f"{name}seconds_low": min(taken), f"{name}seconds_high": max(taken)}
        result[f"{name}cpu_seconds"] = statistics.median(spent[name])
    if peer is not None:
        result["times_peer"] = result["peer_seconds"] / result["seconds"]
        result["cpu_times_peer"] = result["peer_cpu_seconds"] / max(1e-9, result["cpu_seconds"])
    return result


def random_batch(config: Config, size: int) -> dict[str, np.ndarray]:
    """`size` rows of a batch: random pixels, captions of 3 to max_len tokens. Raises ValueError for
    a config that trains on kept features in place of pixels."""
    if config.data.features:
        raise ValueError(
            f"data.features={config.data.features}: a benchmark draws pixels, and this config "
            "trains on what an image encoder has made of them; give --config.data.features=''"
        )
    rng = np.random.default_rng(config.seed)
    text = config.model.text
    lengths = rng.integers(3, text.max_len + 1, size)
    batch = batches.empty(config, size)
    batch["image"][:] = rng.integers(0, 256, batch["image"].shape, dtype=np.uint8)
    batch["tokens"][:] = rng.integers(5, text.vocab_size, (size, text.max_len))
    batch["text_valid"][:] = np.arange(text.max_len)[None] < lengths[:, None]
    batch["is_label"][:] = np.arange(size) % 2 == 0
    batch["text_id"][:] = rng.integers(0, 2**31 - 1, (size, 2))
    batch["prompt_len"][:] = lengths
    return batch


def encode(config: Config, batch: int, repeats: int, compare: bool = False) -> dict[str, float]:
    """Image embeddings of a batch: images_per_second."""
    peer = build_peer(config.model) if compare else None
    model, params = build(config), make_params(config)
    pixels = random_batch(config, batch)["image"]

    @jax.jit
    def embed(params: Any, image: jax.Array) -> jax.Array:
        normal = normalise_pixels(image, config.model)
        return model.apply({"params": params}, normal, method="encode_image")[0]

    result = timed(
        lambda: embed(params, pixels),
        repeats,
        (lambda: encode_with_peer(peer, pixels)) if compare else None,
    )
    return result | {"images_per_second": batch / result["seconds"]}


def caption(
    config: Config, batch: int, tokens: int, beams: int, repeats: int, compare: bool = False
) -> dict[str, float]:
    """Captions of `tokens` tokens from a batch of pixels: tokens_per_second (of what is returned),
    encode_seconds, and the step's time by position, see `token_times`.

    tokens: 0 for USUAL_TOKENS, or what the model writes at most. Raises ValueError for more.
    """
    text = config.model.text
    most = text.max_len - 1  # after the symbol of the begin
    if tokens > most:
        raise ValueError(
            f"--tokens={tokens}: the model writes {most} at most "
            f"(model.text.max_len={text.max_len}); give --tokens={most} or less"
        )
    tokens = tokens or min(USUAL_TOKENS, most)
    peer = build_peer(config.model) if compare else None
    model, params = build(config), make_params(config)
    spec = text_decoder.decoder(config.model, num_ids=text.vocab_size, eos_id=text.vocab_size - 1)
    # As inference.CoCaModel does.
    spec, layout = text_decoder.fastest(spec, params)
    weights = text_decoder.pack(spec, params, layout)
    pixels = random_batch(config, batch)["image"]
    prompt, lengths = np.full((batch, 1), 3, np.int32), np.ones((batch,), np.int32)

    @jax.jit
    def look(params: Any, image: jax.Array) -> Any:
        normal = normalise_pixels(image, config.model)
        return model.apply({"params": params}, normal, method="encode_image")[1]

    def write(count: int) -> Any:
        settings = GenerationConfig(max_new_tokens=count, min_new_tokens=count, num_beams=beams)
        image_tokens = look(params, pixels)
        return driver.generate(spec, weights, image_tokens, prompt, lengths, settings)

    result = timed(
        lambda: write(tokens),
        repeats,
        (lambda: caption_with_peer(peer, pixels, tokens, beams)) if compare else None,
    )
    result["encode_seconds"] = timed(lambda: look(params, pixels), repeats)["seconds"]
    image_tokens = jax.block_until_ready(look(params, pixels))
    result |= token_times(spec, weights, image_tokens, beams, tokens, repeats)
    return result | {"tokens": tokens, "tokens_per_second": batch * tokens / result["seconds"]}


SPAN = 8  # tokens timed together, so that a call is long beside its start


def token_times(
    spec: text_decoder.Decoder,
    weights: dict,
    image_tokens: jax.Array,
    width: int,
    tokens: int,
    repeats: int,
) -> dict[str, float]:
    """Seconds of one token of a batch around token 5 and at the end of captions of `tokens` tokens.

    One program, with the cache of the whole caption, runs SPAN steps of the decoder and takes the
    most probable token of each; the two places are timed in turn, call by call. image_tokens:
    float32 [B, Q, D]. Returns medians early_token_seconds, late_token_seconds and
    late_over_early.
    """
    batch, span = len(image_tokens), min(SPAN, tokens)
    look = functools.partial(text_decoder.image_caches, spec, width=width)
    image = jax.jit(look)(weights, image_tokens)
    caches = text_decoder.empty_caches(spec, weights, batch, tokens * width)

    @jax.jit
    def steps(weights: dict, image: Any, caches: Any, start: jax.Array) -> Any:
        def step(i: jax.Array, state: Any) -> Any:
            token, caches = state
            slot = (start + i) * width
            mask = jnp.broadcast_to(
                jnp.arange(tokens * width) < slot + width, (batch, width, tokens * width)
            )
            place = jnp.broadcast_to(start + i, (batch, width))
            states, caches = text_decoder.run_tokens(
                spec, weights, token, place, mask, slot, caches, image
            )
            return text_decoder.log_probs_of(weights, states).argmax(-1).astype(jnp.int32), caches

        return jax.lax.fori_loop(0, span, step, (jnp.zeros((batch, width), jnp.int32), caches))[0]

    def at(start: int) -> Call:
        return lambda: steps(weights, image, caches, np.int32(start))

    found = timed(at(min(1, tokens - span)), repeats, at(tokens - span))
    early, late = found["seconds"] / span, found["peer_seconds"] / span
    return dict(early_token_seconds=early, late_token_seconds=late, late_over_early=late / early)


def build(config: Config) -> coca.CoCa:
    """The config's model for this machine's devices."""
    model = build_model(config, None, len(head_classes(config)))
    assert isinstance(model, coca.CoCa)  # what is compared writes captions
    return model


def make_params(config: Config) -> Any:
    """Fresh parameters from config.seed."""
    model = build(config)
    return jax.jit(lambda k: sharding.unbox(coca.init(model, k)))(jax.random.key(config.seed))


# Times and memory of a train step with random weights, alone or beside open_clip's.


Batch = dict[str, np.ndarray]


def train(config: Config, repeats: int, compare: bool = False, texts: str = "") -> dict[str, float]:
    """The whole train step at config.batch_size: pairs_per_second and what it comes from.

    compare: open_clip's step runs in turn with ours, on the same batches, with the same optimizer
    and weights of the losses, in bfloat16 by autocast where the model's dtype says so; then each
    once in a process of its own for its peak memory. texts: a file with a caption a line; batches
    take them in order, and the captions of ours are cut as config.text_lengths says. Without it
    captions are of 3 to max_len tokens, beside the peer full ones.
    """
    found = (
        step_batches(config, texts)
        if compare or texts
        else [random_batch(config, config.batch_size)]
    )
    step = ours(config)
    peer = theirs(config) if compare else None
    for batch in {lengths_of(batch, config): batch for batch in found}.values():
        step(batch)  # compiles
    place = dict(ours=0, theirs=0)

    def take(name: str) -> Batch:
        place[name] += 1
        return found[place[name] % len(found)]

    result = timed(
        lambda: step(take("ours")),
        repeats,
        None if peer is None else lambda: peer(take("theirs")),
    )
    rates = {"pairs_per_second": config.batch_size / result["seconds"]}
    if compare:
        own, other = (peak_bytes(name, config, found[0]) for name in ("ours", "theirs"))
        rates |= {"peak_bytes": own, "peer_peak_bytes": other, "peak_over_peer": own / other}
    return result | rates


def step_batches(config: Config, texts: str) -> list[Batch]:
    """Batches of random pixels with captions from a file, or full ones: every caption of the file
    once, at most four batches.

    Raises ValueError for a file that is none of text, or has fewer captions than a batch.
    """
    size, text = config.batch_size, config.model.text
    if not texts:
        full = random_batch(config, size)
        full["text_valid"][:] = True
        return [full]
    try:
        lines = [line for line in files.read_lines(texts) if line.strip()]
    except (OSError, ValueError) as error:
        line = f"--texts={texts}: give a text file, one caption a line"
        raise ValueError(line) from error
    if len(lines) < size:
        raise ValueError(f"--texts={texts} has {len(lines)} captions, a batch {size}; give more")
    found = []
    for start in range(0, min(len(lines), 4 * size) - size + 1, size):
        batch = random_batch(config, size)
        ids = tokens(lines[start : start + size], text.max_len)
        valid = ids > 0
        batch["tokens"][:] = np.where(valid, 1 + (ids - 1) % (text.vocab_size - 1), 0)
        batch["text_valid"][:] = valid
        found.append(batch)
    return found


def lengths_of(batch: Batch, config: Config) -> feed.Lengths:
    """The length to which a batch's captions are cut, for all of its rows."""
    longest = int(shapes.lengths(batch["text_valid"]).max())
    return feed.choose(config, (longest, longest))


def ours(config: Config) -> Callable[[Batch], Any]:
    """A function that takes one step on a batch, and its metrics."""
    mesh = auto_mesh.make(config).mesh
    config_file.check_batch(config, sharding.batch_parts(mesh))
    compiled: dict[feed.Lengths, Any] = {}
    with jax.set_mesh(mesh):
        model = build(config)
        state = init_state(model, config, mesh)
        steps = config.steps or max(1000, config.optimizer.warmup_steps + 1)
        schedule = make_schedule(config.optimizer, steps)
        schedule = sharding.replicate(mesh, schedule)

    def step(batch: Batch) -> Any:
        nonlocal state
        lengths = lengths_of(batch, config)
        with jax.set_mesh(mesh):
            if lengths not in compiled:
                size = config.model.image_size
                compiled[lengths] = programs.program(model, of_step(config), mesh, size, lengths)
            placed = sharding.place_batch(mesh, batch)
            state, metrics = compiled[lengths](state, placed, schedule)
        return metrics

    return step


def theirs(config: Config) -> Callable[[Batch], float]:
    """The same by open_clip: see peer_times.trainer."""
    step = trainer(config)
    return lambda batch: step(batch["image"], np.where(batch["text_valid"], batch["tokens"], 0))


def peak_bytes(name: str, config: Config, batch: Batch) -> int:
    """What two steps of 'ours' or 'theirs' add to the memory of a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (name, config.to_dict(), batch))


def _peak(name: str, config: dict[str, Any], batch: Batch) -> int:
    from coca_jax.config import read

    machine.use()  # compiling is not what is measured
    typed = read(Config, config)
    jax.block_until_ready(jax.numpy.zeros(1) + 1)
    import_torch()

    def work() -> None:
        step: Callable[[Batch], Any] = (ours if name == "ours" else theirs)(typed)
        for _ in range(2):
            jax.block_until_ready(step(batch))

    return added(work)


def added(work: Callable[[], None]) -> int:
    """What `work` adds to the memory of this process at its peak, in bytes, 1 at least (Linux)."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = _memory("VmRSS")
    work()
    return max(1, _memory("VmHWM") - before)


def _memory(field: str) -> int:
    """Bytes of this process by its status file (Linux): 'VmRSS' now, 'VmHWM' the most."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


# How fast batches come without a model, also beside open_clip's pipeline over the same records.


PEER_EXAMPLES = 2000  # that a comparison reads again and again


def read_input(
    config: Recipe, seconds: float, every: float, repeats: int, compare: bool = False
) -> dict[str, Any]:
    """Batches without a model, for `seconds`: what `measure` returns.

    With `compare`, `repeats` times in turn with open_clip's pipeline over the first
    PEER_EXAMPLES records of the first source, all pinned to one core. The rates are then medians
    of images per second of processor time, with their extremes: {images_per_second_per_core,
    ..._low, ..._high, peer_images_per_second_per_core, ..., times_peer: the medians' quotient}.
    Raises ValueError on a system that cannot pin, and for a config that reads no pictures.
    """
    config = typed(config)
    if config.data.features:
        raise ValueError(
            f"data.features={config.data.features}: this times the reading of pictures, and this "
            "config reads what an image encoder has made of them; give --config.data.features=''"
        )
    if not compare:
        return measure_input(config, seconds, every)
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError("--peer pins both to one core, which only Linux can; leave out --peer")
    config = config.change({"data.num_threads": 1})
    source = Mixture(config).sources[0]
    count = min(len(source), PEER_EXAMPLES)
    rates: dict[str, list[float]] = {"": [], "peer_": []}
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_tar(source.read(range(count)), f"{folder}/0.tar")
            peer = input_batches(
                f"{folder}/0.tar", count, config.batch_size, config.model.image_size
            )
            next(peer)
            for _ in range(repeats):
                result = measure_input(config, seconds)
                rates[""].append(result["images_per_second_per_core"])
                rate, cores_busy, _ = rate_of(peer, seconds)
                rates["peer_"].append(rate / cores_busy)
    finally:
        os.sched_setaffinity(0, cores)
    quotient = statistics.median(rates[""]) / statistics.median(rates["peer_"])
    for name, found in rates.items():
        name += "images_per_second_per_core"
        result[name] = statistics.median(found)
        result |= {f"{name}_low": min(found), f"{name}_high": max(found)}
    return result | {"times_peer": quotient}


def measure_input(config: Config, seconds: float = 10.0, every: float = 0.0) -> dict[str, Any]:
    """How fast batches come.

    Args:
        config: of a run.
        seconds: how long to read.
        every: seconds between looks at the memory; 0: only its maximum at the end.

    Returns:
        images_per_second, images_per_second_per_core (per second of processor time used),
        first_batch_seconds (opening the data included), cores_busy, max_rss_mib; with `every`,
        rss_mib: at each look, the resident memory of this process.
    """
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = run_vocabulary.load_or_train(config, folder)
    started = time.perf_counter()
    batches = open_stream(config, vocabulary)
    next(batches)
    first = time.perf_counter() - started
    for _ in range(4):  # what was made ahead while nobody looked
        next(batches)
    images, wall, busy, resident = 0.0, 0.0, 0.0, []
    while wall < seconds:
        rate, cores, took = rate_of((batch["image"] for batch in batches), every or seconds)
        images, wall, busy = images + rate * took, wall + took, busy + cores * took
        if every:
            resident.append(_resident_mib())
    batches.close()
    result: dict[str, Any] = dict(
        images_per_second=images / wall,
        images_per_second_per_core=images / busy,
        cores_busy=busy / wall,
        first_batch_seconds=first,
        max_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )
    return result | (dict(rss_mib=resident) if every else {})


def rate_of(batches: Iterator[Any], seconds: float) -> tuple[float, float, float]:
    """(examples a second, cores busy, seconds taken) of reading batches for `seconds`.

    Batches are arrays, or tuples of them, with the examples as the first axis.
    """
    count, started, processor = 0, time.perf_counter(), time.process_time()
    while (wall := time.perf_counter() - started) < seconds:
        batch = next(batches)
        count += len(batch[0] if isinstance(batch, tuple) else batch)
    return count / wall, (time.process_time() - processor) / wall, wall


def _resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20
