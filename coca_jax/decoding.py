"""Captions from image tokens: KV-cached greedy decoding, sampling and beam search, one program.

Shape letters: B images, W captions or beams of an image, R = B W rows, D width, H heads, K head
width, Q image tokens, V vocabulary, P prompt slots, S new tokens, M = P - 1 + S W cache slots.

Layout of one decode. Prompts stand right-aligned in P slots, so that in every row the last prompt
token is in slot P - 1 and new tokens follow without a gap. `_prefill` runs all but the last
prompt token; every step of the loop then runs one token per row, the last prompt token first. The
W captions of an image share its image keys, its prompt keys and one cache: step s writes its W
keys side by side, and a mask says which of them are a caption's own past. Beam search therefore
reorders a small mask and never the cache.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from coca_jax import cpu_kernels
from coca_jax.decode_settings import Settings
from coca_jax.ops.reference import ACTIVATIONS, NORM_EPSILON

NEVER = -1e30  # score of what must not be chosen; a sum of many of them is still finite
STREAMED = 2**23  # parameters of a text decoder that no cache holds: 32 MiB of them

# How `prepare` lays out the matrices of the layers.
# 'plain': [D, F].
# 'transposed': [F, D], multiplied from the left. XLA's product on a CPU packs its right operand at
# each call, which then is the few rows of a step and not the matrix.
# 'panels': blocks of 32 columns, the softmax layer's too, for the kernels of `cpu_kernels`, which
# then run all of a block.
Layout = Literal["plain", "transposed", "panels"]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The sizes that a decode program is compiled for; hashable.

    num_ids: ids that the vocabulary has; the softmax layer may have more rows, never chosen.
    hidden_id: an id that the lower half's mask takes for padding wherever it stands, or None;
    hides_next: it is the key after such a token that is hidden, not its own (cls_mask 'shifted').
    """

    num_heads: int
    multimodal_heads: int
    vocab_size: int
    num_ids: int
    max_len: int
    cross: str
    activation: str
    dtype: str
    eos_id: int
    hidden_id: int | None = None
    hides_next: bool = False


def decoder(
    model: ConfigDict, *, num_ids: int, eos_id: int, hidden_id: int | None = None
) -> Decoder:
    """The part of `config.model` that decoding needs, and of the vocabulary.

    Raises ValueError for float64, which decoding does not compute in.
    """
    text = model.text
    if model.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"model.dtype={model.dtype!r}: decoding needs 'float32' or 'bfloat16'")
    return Decoder(
        num_heads=text.num_heads,
        multimodal_heads=text.get("multimodal_heads", None) or text.num_heads,
        vocab_size=text.vocab_size,
        num_ids=num_ids,
        max_len=text.max_len,
        cross=text.get("cross", "paper"),
        activation=model.get("activation", "gelu"),
        dtype=model.dtype,
        eos_id=eos_id,
        hidden_id=hidden_id,
        hides_next=text.get("cls_mask", "exact") == "shifted",
    )


@functools.partial(jax.jit, static_argnames=("dtype", "layout"))
def prepare(params: dict, dtype: str, layout: Layout = "plain") -> dict:
    """The text decoder's weights as decoding wants them: a copy, made once per model.

    params: the model's parameters. Layers are taken apart (a loop over stacked weights would copy
    each slice at every token), query, key and value become one matrix with the score's 1 / sqrt(K)
    in it, and all matrices are two-dimensional in `dtype`. Norms and biases stay float32.

    layout: how matrices lie, see Layout; best_layout says which is fastest here.
    """
    text = params["text_decoder"]

    def matrix(kernel: jax.Array, num_in: int = 1) -> jax.Array:
        rows = int(np.prod(kernel.shape[:num_in]))
        return kernel.reshape(rows, -1).astype(dtype)

    def stored(kernel: jax.Array) -> dict:
        if layout == "panels":
            return dict(panels=cpu_kernels.panels(kernel))
        return dict(transposed=kernel.T) if layout == "transposed" else dict(kernel=kernel)

    def join(part: dict, names: tuple[str, ...]) -> dict:
        scale = part["query"]["kernel"].shape[-1] ** -0.5
        kernels = [part[n]["kernel"] * (scale if n == "query" else 1.0) for n in names]
        biases = [part[n]["bias"] * (scale if n == "query" else 1.0) for n in names]
        joined = jnp.concatenate([matrix(k) for k in kernels], axis=1)
        bias = jnp.concatenate([b.reshape(-1) for b in biases])
        # Image keys are computed once, from many rows: there the plain product is best.
        return (stored(joined) if "query" in names else dict(kernel=joined)) | dict(bias=bias)

    def dense(part: dict, num_in: int = 1) -> dict:
        return stored(matrix(part["kernel"], num_in)) | dict(bias=part["bias"].reshape(-1))

    def block(part: dict) -> dict:
        out = {name: part[name] for name in part if name.endswith("norm")}
        out["qkv"] = join(part["attention"], ("query", "key", "value"))
        out["out"] = dense(part["attention"]["out"], 2)
        for name in ("mlp", "cross_mlp"):
            if name in part:
                out[name] = {k: dense(part[name][k]) for k in ("in", "out")}
        if "cross_attention" in part:
            out["cross_q"] = join(part["cross_attention"], ("query",))
            out["cross_kv"] = join(part["cross_attention"], ("key", "value"))
            out["cross_out"] = dense(part["cross_attention"]["out"], 2)
            if layout == "panels":
                out["cross_shared"] = shared(part["cross_attention"], part.get("context_norm"))
        return out

    def shared(part: dict, norm: dict | None) -> dict:
        """Keys and values moved to the query's side, see cpu_kernels.image_attention.

        What the bias of the keys adds is the same at every token, and so nothing to the softmax.
        """
        key, value = part["key"]["kernel"], part["value"]["kernel"]  # [D, H, K]
        bias = part["value"]["bias"].reshape(-1)
        if norm is not None:
            bias = bias + jnp.einsum("d,dhk->hk", norm["bias"], value).reshape(-1)
            key, value = (norm["scale"][:, None, None] * x for x in (key, value))
        padded = jnp.pad(value, ((0, -value.shape[0] % cpu_kernels.PANEL), (0, 0), (0, 0)))
        return dict(
            query=jax.vmap(cpu_kernels.panels)(key.transpose(1, 2, 0)),
            value=jax.vmap(cpu_kernels.panels)(padded.transpose(1, 0, 2)),
            bias=bias,
        )

    def blocks(stack: dict) -> list[dict]:
        depth = jax.tree.leaves(stack)[0].shape[0]
        layer = [jax.tree.map(lambda x, i=i: x[i], stack["layers"]) for i in range(depth)]
        return [block(part) for part in layer]

    embedding = text["token_embedding"]["value"]
    kernel = text["head"]["kernel"]["value"] if "head" in text else embedding.T
    # As `transposed` the softmax layer's output would cost more to transpose than the layout gives.
    head = stored(kernel) if layout == "panels" else dict(kernel=kernel.astype(dtype))
    if "bias" in text.get("head", {}):
        head["bias"] = text["head"]["bias"]["value"]
    elif layout == "panels":
        head["bias"] = jnp.zeros(kernel.shape[1])
    return dict(
        embedding=embedding.astype(dtype),
        positions=text["positions"]["value"].astype(dtype),
        unimodal=blocks(text["unimodal"]),
        multimodal=blocks(text["multimodal"]),
        norm=text["multimodal_norm"],
        head=head,
    )


def best_layout(spec: Decoder, params: dict) -> Layout:
    """The layout in which decoding is fastest on this machine; see Layout.

    'panels' is for weights that no cache holds. A small model's are in cache, where the kernels
    gain nothing, and compiling them would delay its first caption by seconds.
    """
    if jax.default_backend() != "cpu":
        return "plain"
    text = params["text_decoder"]
    size = sum(x.size for x in jax.tree.leaves(text))
    width = text["positions"]["value"].shape[1]
    heads = {width // spec.num_heads, width // spec.multimodal_heads}
    fits = all(k % cpu_kernels.HEAD == 0 and k <= cpu_kernels.WIDEST_HEAD for k in heads)
    # XLA cannot split the kernels' calls over several devices.
    alone = jax.device_count() == 1 and spec.dtype == "float32" and fits
    if alone and size >= STREAMED and cpu_kernels.available():
        return "panels"
    return "transposed"


def _standardise(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + NORM_EPSILON)


def _norm(weights: dict, x: jax.Array) -> jax.Array:
    return _standardise(x) * weights["scale"] + weights["bias"]


def _dense(weights: dict, x: jax.Array) -> jax.Array:
    """x [..., D] -> float32 [..., F], one product."""
    if "transposed" in weights:
        kernel = weights["transposed"]
        rows = x.reshape(-1, x.shape[-1]).astype(kernel.dtype)
        count = rows.shape[0]
        if isinstance(count, int) and count > 4:  # vectors of 8: 6 rows take longer than 8
            rows = jnp.pad(rows, ((0, -count % 8), (0, 0)))
        y = jax.lax.dot_general(
            kernel, rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        # Without the barrier the compiler turns the transposed product back into rows @ kernel.
        y = jax.lax.optimization_barrier(y)[:, :count].T
    else:
        kernel = weights["kernel"]
        rows = x.reshape(-1, x.shape[-1]).astype(kernel.dtype)
        y = jnp.dot(rows, kernel, preferred_element_type=jnp.float32)
    y = y.reshape(x.shape[:-1] + y.shape[-1:])
    return y + weights["bias"] if "bias" in weights else y


def _split(x: jax.Array, parts: int, heads: int) -> list[jax.Array]:
    """[B, N, parts D] -> parts x [B, H, N, K]."""
    batch, length, width = x.shape
    x = x.reshape(batch, length, parts, heads, width // parts // heads)
    return [x[:, :, i].transpose(0, 2, 1, 3) for i in range(parts)]


def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """[B, H, N, K] x [B, H, M, K] -> [B, N, H K], float32. mask: bool [B, N, M]."""
    scores = jnp.einsum(
        "bhnk,bhmk->bhnm", query.astype(key.dtype), key, preferred_element_type=jnp.float32
    )
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, NEVER)
    # Divided after the product: at many rows a pass over the weights costs a third of attention.
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    out = jnp.einsum(
        "bhnm,bhmk->bhnk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    out = out / weights.sum(-1, keepdims=True)
    return out.transpose(0, 2, 1, 3).reshape(query.shape[0], query.shape[2], -1)


# The residual parts of a block by XLA, with the signatures of those in `cpu_kernels`.


def _self_attention(
    x: jax.Array,
    norm: dict,
    qkv: dict,
    out: dict,
    mask: jax.Array,
    slot: jax.Array | int,
    key: jax.Array,
    value: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, *new = _split(_dense(qkv, _norm(norm, x)), 3, key.shape[1])
    key, value = (
        jax.lax.dynamic_update_slice(old, rows.astype(old.dtype), (0, 0, slot, 0))
        for old, rows in zip((key, value), new)
    )
    return x + _dense(out, _attend(query, key, value, mask)), key, value


def _cached_image_attention(
    x: jax.Array, norm: dict, query: dict, out: dict, key: jax.Array, value: jax.Array
) -> jax.Array:
    (rows,) = _split(_dense(query, _norm(norm, x)), 1, key.shape[1])
    return x + _dense(out, _attend(rows, key, value, None))


def _mlp(x: jax.Array, norm: dict, weights: dict, activation: str) -> jax.Array:
    hidden = ACTIVATIONS[activation](_dense(weights["in"], _norm(norm, x)))
    return x + _dense(weights["out"], hidden)


class Cache(NamedTuple):
    """Keys and values of one block, [B, H, M, K]."""

    key: jax.Array
    value: jax.Array


def image_caches(
    spec: Decoder, weights: dict, image_tokens: jax.Array, width: int = 1
) -> list[Cache] | jax.Array:
    """What cross-attention reads of image tokens [B, Q, D], for `width` captions an image.

    Keys and values, one Cache [B, H, Q, K] a block; in panels with one caption an image the tokens
    themselves (cpu_kernels.image_attention; more captions share the reading of keys, so those are
    less work).
    """
    if width == 1 and "panels" in weights["head"]:
        if spec.cross == "open_clip":
            image_tokens = _standardise(image_tokens)
        pad = -image_tokens.shape[2] % cpu_kernels.PANEL
        return jnp.pad(image_tokens.astype(jnp.float32), ((0, 0), (0, 0), (0, pad)))
    caches = []
    for block in weights["multimodal"]:
        context = image_tokens
        if spec.cross == "open_clip":
            context = _norm(block["context_norm"], context)
        key, value = _split(_dense(block["cross_kv"], context), 2, spec.multimodal_heads)
        caches.append(Cache(key.astype(spec.dtype), value.astype(spec.dtype)))
    return caches


def empty_caches(spec: Decoder, weights: dict, batch: int, slots: int) -> list[Cache]:
    """Caches of zeros for every block of both halves."""
    width = weights["embedding"].shape[1]
    heads = [spec.num_heads] * len(weights["unimodal"])
    heads += [spec.multimodal_heads] * len(weights["multimodal"])
    shapes = [(batch, count, slots, width // count) for count in heads]
    return [Cache(jnp.zeros(s, spec.dtype), jnp.zeros(s, spec.dtype)) for s in shapes]


def run_tokens(
    spec: Decoder,
    weights: dict,
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    slot: jax.Array | int,
    caches: list[Cache],
    image: list[Cache] | jax.Array,
    shown: jax.Array | None = None,
) -> tuple[jax.Array, list[Cache]]:
    """Runs N tokens per image through both halves and writes their keys at slots slot..slot + N.

    tokens, positions: int32 [B, N]. mask: bool [B, N, M], which slots each token may look at, its
    own included. shown: bool [B, M], slots that the lower half does not hide (see
    Decoder.hidden_id); None: all. Returns the last block's output, float32 [B, N, D], and the
    caches.
    """
    kernels = "panels" in weights["head"]
    attend = cpu_kernels.self_attention if kernels else _self_attention
    look = cpu_kernels.cached_image_attention if kernels else _cached_image_attention
    mlp = cpu_kernels.mlp if kernels else _mlp
    lower_mask = mask if shown is None else mask & shown[:, None]
    x = (weights["embedding"][tokens] + weights["positions"][positions]).astype(jnp.float32)
    written = []
    for index, block in enumerate(weights["unimodal"] + weights["multimodal"]):
        cross = index - len(weights["unimodal"])
        own = block["attention_norm"], block["qkv"], block["out"]
        x, *cache = attend(x, *own, lower_mask if cross < 0 else mask, slot, *caches[index])
        written.append(Cache(*cache))
        if cross >= 0:
            if spec.cross == "open_clip":
                x = mlp(x, block["mlp_norm"], block["mlp"], spec.activation)
            other = block["cross_norm"], block["cross_q"], block["cross_out"]
            if isinstance(image, list):
                x = look(x, *other, *image[cross])
            else:
                x = cpu_kernels.image_attention(x, *other, block["cross_shared"], image)
        name = "cross_mlp" if cross >= 0 and spec.cross == "open_clip" else "mlp"
        x = mlp(x, block[f"{name}_norm"], block[name], spec.activation)
    return x, written


def _prefill(
    spec: Decoder,
    weights: dict,
    prompt: jax.Array,
    prompt_len: jax.Array,
    caches: list[Cache],
    image: list[Cache] | jax.Array,
    shown: jax.Array | None = None,
) -> list[Cache]:
    """Writes the keys of all prompt tokens but the last. prompt int32 [B, P], right-aligned; shown:
    bool [B, P - 1], keys that the lower half sees, or None for all."""
    slots = prompt.shape[1] - 1
    if slots == 0:
        return caches
    if shown is not None:
        shown = jnp.pad(shown, ((0, 0), (0, caches[0].key.shape[2] - slots)))
    first = (prompt.shape[1] - prompt_len)[:, None]
    place = jnp.arange(slots)[None]
    present = jnp.pad(place >= first, ((0, 0), (0, caches[0].key.shape[2] - slots)))
    causal = jnp.arange(caches[0].key.shape[2])[None] <= jnp.arange(slots)[:, None]
    mask = present[:, None] & causal[None]
    positions = jnp.maximum(place - first, 0)
    return run_tokens(spec, weights, prompt[:, :-1], positions, mask, 0, caches, image, shown)[1]


def log_probs_of(weights: dict, states: jax.Array) -> jax.Array:
    """The next token's, float32 [B, N, V], from what run_tokens returns, [B, N, D]."""
    if "panels" in weights["head"]:
        return cpu_kernels.log_probs(states, weights["norm"], weights["head"])
    return jax.nn.log_softmax(_dense(weights["head"], _norm(weights["norm"], states)))


class Captions(NamedTuple):
    """tokens int32 [B, n, S], new tokens alone, end symbols after the end; length int32 [B, n],
    tokens with the end symbol if it came; log_prob float32 [B, n], the model's log probability of
    these tokens, in nats, whatever rules chose them."""

    tokens: jax.Array
    length: jax.Array
    log_prob: jax.Array


class Plan(NamedTuple):
    """What a decode program is specialised to, beside shapes; the other settings are arguments."""

    width: int
    num_captions: int
    steps: int
    beams: bool
    sample: bool
    filter: bool
    penalise: bool
    ngram: int
    early_stop: bool


def generate(
    spec: Decoder,
    weights: dict,
    image_tokens: jax.Array,
    prompt: np.ndarray,
    prompt_len: np.ndarray,
    settings: Settings,
    *,
    rows: np.ndarray | None = None,
    active: np.ndarray | None = None,
) -> Captions:
    """Captions for image tokens [B, Q, D].

    prompt: int32 [B, P], each row's prompt right-aligned, begin symbol first; prompt_len: int32
    [B], at least 1. rows: int32 [B], what makes an image's random numbers its own (default: its
    place); active: bool [B], False for rows that pad the batch. One program is compiled per (B, P,
    steps rounded up to 16, kind of settings). Raises ValueError when a prompt leaves no room.
    """
    batch = prompt.shape[0]
    longest = int(prompt_len.max())
    if longest >= spec.max_len:
        raise ValueError(
            f"a prompt has {longest} tokens and the model writes {spec.max_len} in all "
            "(model.text.max_len); shorten it"
        )
    steps = min(settings.max_tokens, spec.max_len - int(prompt_len.min()))
    plan = Plan(
        width=settings.num_beams if settings.num_beams > 1 else settings.num_captions,
        num_captions=settings.num_captions,
        steps=min(-(-steps // 16) * 16, spec.max_len - 1),
        beams=settings.num_beams > 1,
        sample=settings.temperature > 0,
        filter=settings.top_k > 0 or settings.top_p < 1,
        penalise=settings.repetition_penalty != 1,
        ngram=settings.no_repeat_ngram,
        early_stop=settings.early_stop,
    )
    rows = np.arange(batch) if rows is None else rows
    active = np.ones(batch, bool) if active is None else active
    numbers = dict(
        limit=np.minimum(steps, spec.max_len - prompt_len).astype(np.int32),
        min_tokens=np.int32(settings.min_tokens),
        temperature=np.float32(settings.temperature or 1.0),
        top_k=np.int32(settings.top_k or spec.vocab_size),
        top_p=np.float32(settings.top_p),
        length_penalty=np.float32(settings.length_penalty),
        repetition_penalty=np.float32(settings.repetition_penalty),
        seed=np.uint32(settings.seed),
        rows=rows.astype(np.uint32),
        active=active,
    )
    return _generate(spec, plan, weights, image_tokens, prompt, prompt_len, numbers)


class _Loop(NamedTuple):
    """What a step of the loop reads and writes. History holds prompts and new tokens by slot, -1
    where there is none; past says which of the cache slots of the steps are a caption's own, shown
    which of them the lower half sees (None: all)."""

    step: jax.Array
    token: jax.Array  # [B, W], to run next
    caches: list[Cache]
    past: jax.Array  # bool [B, W, S, W]
    shown: jax.Array | None  # bool [B, S, W]
    history: jax.Array  # int32 [B, W, P + S]
    log_prob: jax.Array  # [B, W], the model's
    score: jax.Array  # [B, W], after the rules; beams only
    done: jax.Array  # bool [B, W]; beams: all of an image's or none
    length: jax.Array  # int32 [B, W]
    finished: _Finished | None


class _Finished(NamedTuple):
    """Finished captions of a beam search, best first; score NEVER where there is none."""

    score: jax.Array  # [B, W], over tokens^length_penalty
    log_prob: jax.Array
    length: jax.Array
    history: jax.Array  # [B, W, P + S]


@functools.partial(jax.jit, static_argnames=("spec", "plan"))
def _generate(
    spec: Decoder,
    plan: Plan,
    weights: dict,
    image_tokens: jax.Array,
    prompt: jax.Array,
    prompt_len: jax.Array,
    numbers: dict,
) -> Captions:
    batch, slots = prompt.shape
    width, steps = plan.width, plan.steps
    image = image_caches(spec, weights, image_tokens, width)
    caches = empty_caches(spec, weights, batch, slots - 1 + steps * width)
    first = slots - prompt_len
    prompt_mask = jnp.arange(slots - 1)[None] >= first[:, None]
    prompt_mask = jnp.broadcast_to(prompt_mask[:, None], (batch, width, slots - 1))
    known = jnp.where(jnp.arange(slots)[None] >= first[:, None], prompt, -1)
    hides, back = spec.hidden_id is not None, int(spec.hides_next)
    prompt_shown = None
    if hides:
        before = jnp.pad(known, ((0, 0), (back, 0)), constant_values=-1)
        prompt_shown = before[:, : slots - 1] != spec.hidden_id
    caches = _prefill(spec, weights, prompt, prompt_len, caches, image, prompt_shown)
    history = jnp.concatenate([known, jnp.full((batch, steps), -1, jnp.int32)], axis=1)
    zeros = jnp.zeros((batch, width), jnp.float32)
    each = jnp.broadcast_to
    history = each(history[:, None], (batch, width, slots + steps))
    start = _Loop(
        step=jnp.int32(0),
        token=each(prompt[:, -1:], (batch, width)),
        caches=caches,
        past=jnp.zeros((batch, width, steps, width), bool),
        shown=jnp.ones((batch, steps, width), bool) if hides else None,
        history=history,
        log_prob=zeros,
        # All beams start alike: only the first may go on, or they would stay alike.
        score=zeros.at[:, 1:].set(NEVER) if plan.beams else zeros,
        done=each(~numbers["active"][:, None], (batch, width)),
        length=jnp.zeros((batch, width), jnp.int32),
        finished=_Finished(zeros + NEVER, zeros, jnp.zeros((batch, width), jnp.int32), history)
        if plan.beams
        else None,
    )

    def unfinished(loop: _Loop) -> jax.Array:
        return ~loop.done.all()

    def step(loop: _Loop) -> _Loop:
        now = loop.step
        past = loop.past.at[:, :, now].set(jnp.eye(width, dtype=bool))
        mask = jnp.concatenate([prompt_mask, past.reshape(batch, width, -1)], axis=2)
        shown = whole = None
        if hides:
            # A begin symbol alone has nothing before it: there the index is clamped to itself.
            place = slots - 1 + now - back
            decides = jax.lax.dynamic_index_in_dim(loop.history, place, 2, keepdims=False)
            shown = loop.shown.at[:, now].set(decides != spec.hidden_id)
            whole = jnp.concatenate([prompt_shown, shown.reshape(batch, -1)], axis=1)
        positions = jnp.minimum(prompt_len - 1 + now, spec.max_len - 1)
        states, caches = run_tokens(
            spec,
            weights,
            loop.token,
            each(positions[:, None], (batch, width)),
            mask,
            slots - 1 + now * width,
            loop.caches,
            image,
            whole,
        )
        log_probs = log_probs_of(weights, states)
        allowed = _rules(spec, plan, numbers, log_probs, loop.history, slots + now, now)
        loop = loop._replace(caches=caches, past=past, shown=shown)
        choose = _beam_step if plan.beams else _single_step
        return choose(spec, plan, numbers, loop, log_probs, allowed, slots)

    loop = jax.lax.while_loop(unfinished, step, start)
    if plan.beams:
        best = loop.finished
        tokens, length, log_prob = best.history[:, :, slots:], best.length, best.log_prob
    else:
        tokens, length, log_prob = loop.history[:, :, slots:], loop.length, loop.log_prob
    keep = plan.num_captions
    inside = jnp.arange(steps)[None, None] < length[..., None]
    tokens = jnp.where(inside, tokens, spec.eos_id)
    return Captions(tokens[:, :keep], length[:, :keep], log_prob[:, :keep])


def _rules(
    spec: Decoder,
    plan: Plan,
    numbers: dict,
    log_probs: jax.Array,
    history: jax.Array,
    end: jax.Array,
    step: jax.Array,
) -> jax.Array:
    """log_probs [B, W, V] after repetition penalty, n-gram rule and minimum length.

    history: int32 [B, W, T], filled up to slot `end`.
    """
    scores = log_probs
    batch, row = jnp.indices(history.shape[:2], sparse=True)
    batch, row = batch[..., None], row[..., None]
    if plan.penalise:
        seen = jnp.where(history < 0, spec.vocab_size, history)  # out of range: dropped
        old = jnp.take_along_axis(scores, jnp.maximum(history, 0), axis=2)
        scores = scores.at[batch, row, seen].set(old * numbers["repetition_penalty"], mode="drop")
    if plan.ngram:
        n, total = plan.ngram, history.shape[2]
        if n <= total:
            tail = jax.lax.dynamic_slice_in_dim(history, end - (n - 1), n - 1, axis=2)
            count = total - n + 1
            same = history[..., n - 1 :] >= 0
            for i in range(n - 1):
                window = history[..., i : i + count]
                same &= (window == tail[..., i : i + 1]) & (window >= 0)
            banned = jnp.where(same, history[..., n - 1 :], spec.vocab_size)
            scores = scores.at[batch, row, banned].set(NEVER, mode="drop")
    ids = jnp.arange(spec.vocab_size)
    too_early = step < numbers["min_tokens"]
    allowed = (ids < spec.num_ids) & ~((ids == spec.eos_id) & too_early)
    return jnp.where(allowed, scores, NEVER)


def _single_step(
    spec: Decoder,
    plan: Plan,
    numbers: dict,
    loop: _Loop,
    log_probs: jax.Array,
    allowed: jax.Array,
    slots: int,
) -> _Loop:
    """Chooses one token per row: the most probable, or a sample. Finished rows stay as they are."""
    if plan.sample:
        token = _sample(plan, numbers, allowed, loop.step)
    else:
        token = _argmax(allowed)
    gain = jnp.take_along_axis(log_probs, token[..., None], axis=2)[..., 0]
    going = ~loop.done
    place = slots + loop.step
    added = jnp.where(going, token, -1)
    length = loop.length + going
    return loop._replace(
        step=loop.step + 1,
        token=token,
        history=jax.lax.dynamic_update_slice_in_dim(loop.history, added[..., None], place, axis=2),
        log_prob=loop.log_prob + jnp.where(going, gain, 0.0),
        length=length,
        done=loop.done | (token == spec.eos_id) | (length >= numbers["limit"][:, None]),
    )


def _argmax(x: jax.Array) -> jax.Array:
    """First index of the largest value of the last axis: two plain reductions, which the CPU
    backend vectorises; argmax it does not."""
    size = x.shape[-1]
    index = jnp.where(x == x.max(-1, keepdims=True), jnp.arange(size, dtype=jnp.int32), size)
    return index.min(-1)


def _largest(x: jax.Array, enough: Any) -> jax.Array:
    """The largest threshold t [...] of non-negative floats x [..., V] with enough(x >= t) true.

    `enough` must turn from false to true only once as t falls. Halves the interval of bit patterns,
    which order like the floats they stand for: exact, in 31 passes, without sorting.
    """
    low = jnp.zeros(x.shape[:-1], jnp.int32)
    high = jax.lax.bitcast_convert_type(x.max(-1), jnp.int32) + 1

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)
        ok = enough(x >= threshold[..., None])
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _sample(plan: Plan, numbers: dict, allowed: jax.Array, step: jax.Array) -> jax.Array:
    """One token per row of allowed [B, W, V] by its own random number: int32 [B, W]."""
    probs = jax.nn.softmax(allowed / numbers["temperature"], axis=-1)
    if plan.filter:
        kth = _largest(probs, lambda keep: keep.sum(-1) >= numbers["top_k"])
        probs = jnp.where(probs >= kth[..., None], probs, 0.0)
        # A little less than p: the sum of all kept probabilities may round below it.
        mass = numbers["top_p"] * (1 - 1e-6) * probs.sum(-1)
        least = _largest(probs, lambda keep: jnp.where(keep, probs, 0.0).sum(-1) >= mass)
        probs = jnp.where(probs >= least[..., None], probs, 0.0)
    batch, width, size = probs.shape

    def number(row: jax.Array, caption: jax.Array) -> jax.Array:
        key = jax.random.key(numbers["seed"])
        for part in (row, caption, step):
            key = jax.random.fold_in(key, part)
        return jax.random.uniform(key)

    rows = jnp.broadcast_to(numbers["rows"][:, None], (batch, width))
    captions = jnp.broadcast_to(jnp.arange(width), (batch, width))
    uniform = jax.vmap(jax.vmap(number))(rows, captions)
    # Inverse of the cumulative distribution, in two levels: first the block, then the token in it.
    block = 256
    probs = jnp.pad(probs, ((0, 0), (0, 0), (0, -size % block)))
    blocks = probs.reshape(batch, width, -1, block)
    sums = blocks.sum(-1)
    target = uniform * sums.sum(-1)
    which, rest = _pick(sums, target)
    inner = jnp.take_along_axis(blocks, which[..., None, None], axis=2)[:, :, 0]
    return which * block + _pick(inner, rest)[0]


def _pick(weights: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The index where the running sum of weights [..., N] passes target [...], and what is left
    of target there; the heaviest index where rounding keeps the sum below the target."""
    total = jnp.cumsum(weights, axis=-1)
    passed = total > target[..., None]
    index = jnp.where(passed.any(-1), jnp.argmax(passed, -1), jnp.argmax(weights, -1))
    before = jnp.take_along_axis(total - weights, index[..., None], axis=-1)[..., 0]
    return index.astype(jnp.int32), jnp.maximum(target - before, 0.0)


def _beam_step(
    spec: Decoder,
    plan: Plan,
    numbers: dict,
    loop: _Loop,
    log_probs: jax.Array,
    allowed: jax.Array,
    slots: int,
) -> _Loop:
    """Extends every image's beams by a token; finished images stay as they are.

    Of the 2 W best continuations, those that end (and are among the W best) become finished
    captions; the W best others go on. Images at their limit finish their beams as they stand.
    """
    batch, width, vocab = allowed.shape
    per_beam = min(2 * width, vocab)
    best, token = jax.lax.top_k(allowed, per_beam)
    total = (loop.score[..., None] + best).reshape(batch, -1)
    gain = jnp.take_along_axis(log_probs, token, axis=2)
    model = (loop.log_prob[..., None] + gain).reshape(batch, -1)
    score, at = jax.lax.top_k(total, min(2 * width, total.shape[1]))
    take = functools.partial(jnp.take_along_axis, axis=1)
    parent, token, log_prob = at // per_beam, take(token.reshape(batch, -1), at), take(model, at)
    place = slots + loop.step
    history = jnp.take_along_axis(loop.history, parent[..., None], axis=1)
    history = jax.lax.dynamic_update_slice_in_dim(history, token[..., None], place, axis=2)
    length = jnp.full_like(token, loop.step + 1)

    def norm(score: jax.Array, length: jax.Array) -> jax.Array:
        return score / length.astype(jnp.float32) ** numbers["length_penalty"]

    # Captions that end here, beside those that ended before.
    ends = (token == spec.eos_id) & (jnp.arange(token.shape[1]) < width) & (score > NEVER / 2)
    ranked = jnp.where(ends, norm(score, length), NEVER)
    finished = _best(loop.finished, _Finished(ranked, log_prob, length, history), width)
    # Beams that go on.
    score, at = jax.lax.top_k(jnp.where(token == spec.eos_id, NEVER, score), width)
    parent, token, log_prob = take(parent, at), take(token, at), take(log_prob, at)
    history, length = jnp.take_along_axis(history, at[..., None], axis=1), take(length, at)
    limit = numbers["limit"][:, None]
    last = length >= limit
    alive = jnp.where(last & (score > NEVER / 2), norm(score, length), NEVER)
    finished = _best(finished, _Finished(alive, log_prob, length, history), width)
    # Is any beam still able to displace the captions asked for?
    reach = norm(score, length)
    if not plan.early_stop:
        reach = jnp.maximum(norm(score, length + 1), norm(score, jnp.maximum(limit, length)))
    worst = finished.score[:, plan.num_captions - 1 : plan.num_captions]
    over = last.any(1, keepdims=True) | (worst >= reach.max(1, keepdims=True))
    done = loop.done

    def keep(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(done.reshape(done.shape + (1,) * (new.ndim - 2)), old, new)

    past = jnp.take_along_axis(loop.past, parent[:, :, None, None], axis=1)
    return _Loop(
        step=loop.step + 1,
        token=token,
        caches=loop.caches,
        past=past,
        shown=loop.shown,
        history=history,
        log_prob=log_prob,
        score=score,
        done=done | over,
        length=length,
        finished=jax.tree.map(keep, loop.finished, finished),
    )


def _best(old: _Finished, new: _Finished, count: int) -> _Finished:
    """The `count` best of both along the second axis, best first; earlier ones win ties."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), old, new)
    score, at = jax.lax.top_k(both.score, count)

    def take(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, at.reshape(at.shape + (1,) * (x.ndim - 2)), axis=1)

    return jax.tree.map(take, both)._replace(score=score)
