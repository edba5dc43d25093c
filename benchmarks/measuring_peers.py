"""Rows that are measured beside another program, in turn with it in the same run."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable

import pictures
from measuring import HERE, MIB, Given, Rows, Values
from measuring_parts import jpeg_data, jpegs


def captions(batch: int, beams: int, times: int = 1) -> Callable[[Given], Rows]:
    """Tokens a second beside open_clip's, so many runs of it."""

    def run(given: Given) -> Rows:
        found = [
            given.coca(
                *("benchmark", "caption", "--peer", "--config=finetune_open_clip"),
                *("--config.model.dtype=float32", f"--batch_size={batch}", f"--num_beams={beams}"),
                f"--repeats={1 if batch > 1 else 3}",
            )
            for _ in range(times)
        ]
        ours = [one["tokens_per_second"] for one in found]
        peer = [one["tokens_per_second"] / one["times_peer"] for one in found]
        ratio = [one["times_peer"] for one in found]
        late = [one["late_over_early"] for one in found]
        row = f"captions/{f'beams_{beams}' if beams > 1 else f'batch_{batch}'}"
        if times == 1:
            return {row: dict(ours=ours[0], peer=peer[0], ratio=ratio[0], late_over_early=late[0])}
        slowest = ratio.index(min(ratio))
        many = dict(slowest_ours=ours[slowest], slowest_peer=peer[slowest]) | {
            f"{name}_{n}": value
            for name, values in (("ours", ours), ("peer", peer), ("late", late))
            for n, value in enumerate(values, 1)
        }
        return {row: many, f"{row}_ratio": {f"run_{n}": v for n, v in enumerate(ratio, 1)}}

    return run


ALIKE = tuple(
    (row, suffix) for suffix in ("", "_bfloat16") for row in ("step_16", "step_8", "stem")
)


def alike(given: Given) -> Rows:
    """Seconds of a core of the emoji recipe's step, and of its stem, and of PyTorch's alike."""
    told = {
        "": given.script("alike.py", one_core=True),
        "_bfloat16": given.script("alike.py", "--dtype=bfloat16", one_core=True),
    }

    def one(times: Values) -> Values:
        ours, torch = times["cpu_seconds"], times["peer_cpu_seconds"]
        return dict(ours=ours, torch=torch, torch_ours=torch / ours)

    return {f"alike/{row}{suffix}": one(told[suffix][row]) for row, suffix in ALIKE}


def towers(row: str, name: str) -> Callable[[Given], Rows]:
    """How far a family's towers, of a size, are from the library's that they come from."""
    return lambda given: {f"towers/{row}": given.script("towers.py", name)}


def suites(given: Given) -> Rows:
    """Figures of five drawn sets by our suite and by CLIP_benchmark, of the demo's model."""
    return {"clip_benchmark": given.script("suite_peer.py", str(given.demo()))}


def parity(row: str, name: str) -> Callable[[Given], Rows]:
    """Outputs of a size of CoCa; of B/32 gradients too, and of L/14 what converting it takes."""

    def run(given: Given) -> Rows:
        told = given.script("parity.py", name, *(["--gradients"] if row == "b32" else []))
        keys = [f"{key}{suffix}" for key in OUTPUTS for suffix in ("", "_bfloat16")]
        found: Rows = {f"parity/{row}": {key: told[key] for key in keys}}
        if row == "b32":
            for dtype in ("float32", "float64"):
                found[f"gradients/{dtype}"] = dict(value=told[f"gradient_{dtype}"])
        if row == "l14":
            seconds, mib = told["convert_core_seconds"], told["convert_mib"]
            found["convert_l14"] = dict(seconds=seconds, gb=mib * MIB / 1e9)
        return found

    return run


OUTPUTS = ("image", "text", "logits")


def read_beside(given: Given) -> Rows:
    """Images a second of a core, ours and open_clip's webdataset pipeline over the same JPEGs."""
    recipe = f"--config={HERE}/pictures_recipe.py:{jpeg_data(given)}"
    found: Rows = {}
    for row, fast in (("plain", False), ("fast", True)):
        flags = (recipe, f"--config.data.fast_resize={fast}", "--seconds=8", "--repeats=3")
        told = given.coca("benchmark", "input", "--peer", *flags)
        values: Values = {}
        for name, key in (("ours", ""), ("peer", "peer_")):
            rate = f"{key}images_per_second_per_core"
            values |= {name: told[rate], f"{name}_low": told[f"{rate}_low"]}
            values[f"{name}_high"] = told[f"{rate}_high"]
        found[f"input/{row}"] = values | dict(ratio=told["times_peer"])
    return found


def steps_beside(given: Given) -> Rows:
    """A step of coca_ViT-B-32's sizes and open_clip's, on short captions and full ones."""
    file = given.drawn / "sentences.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(pictures.sentences(795)) + "\n")
    base = ("--config=finetune_open_clip", "--config.batch_size=16", "--peer", "--repeats=3")
    found: Rows = {}
    for dtype in ("float32", "bfloat16"):
        row: Values = {}
        for name, more in (("captions", [f"--texts={file}"]), ("full", [])):
            flags = (*base, f"--config.model.dtype={dtype}", *more)
            told = given.coca("benchmark", "train", *flags)
            row |= {name: told["times_peer"], f"memory_{name}": told["peak_over_peer"]}
        found[f"step_b32/{dtype}"] = row
    return found


def step_by_kernels(given: Given) -> Rows:
    """The same step in bfloat16 on full captions, with our kernels and without."""
    flags = ("--config=finetune_open_clip", "--config.batch_size=16", "--peer", "--repeats=3")
    values: Values = {}
    for name, wanted in (("without", "0"), ("kernels", "1")):
        told = given.coca(
            "benchmark",
            "train",
            *flags,
            "--config.model.dtype=bfloat16",
            COCA_JAX_CPU_KERNELS=wanted,
        )
        values[name] = told["times_peer"]
    return {"step_b32/by_kernels": values}


def recaptioned(given: Given) -> Rows:
    """Pictures a second of `recaption` at coca_ViT-B-32's shapes, with and without kept programs,
    and of open_clip's `generate`, in float32 and bfloat16."""
    tar = pictures.drawn("tar", given.drawn / "795.tar", 795)
    weights = given.drawn / "b32"
    if not weights.exists():
        given.script("recaption_peer.py", "weights", str(weights))
    rows: Rows = {row: {} for row in RECAPTION}
    for key, dtype in (("value", "float32"), ("bfloat16", "bfloat16")):
        with tempfile.TemporaryDirectory() as cache:
            took = []
            for number in range(2):
                out = given.runs / f"recaptioned_{time.time_ns()}_{number}"
                flags = (f"--checkpoint={weights}", f"--input={tar}", f"--out={out}", *HOW)
                start = time.perf_counter()
                told = given.coca(
                    "recaption", *flags, f"--dtype={dtype}", JAX_COMPILATION_CACHE_DIR=cache
                )
                took.append(time.perf_counter() - start)
                shutil.rmtree(out)
        ours, kept = (795 / seconds for seconds in took)
        peer = given.script("recaption_peer.py", "generate", str(tar), f"--dtype={dtype}")["rate"]
        rows["recaption/ours"][key], rows["recaption/kept"][key] = ours, kept
        rows["recaption/open_clip"][key] = peer
        rows["recaption/ratio"][key] = ours / peer
        if dtype == "float32":
            spent = told["spent"]
            for row, name in SPENT.items():
                rows[f"recaption_time/{row}"] = dict(value=spent[name])
    first = rows["recaption/open_clip"]["value"]
    rows["recaption/ratio_default"] = {k: v / first for k, v in rows["recaption/ours"].items()}
    return rows


HOW = ("--how=greedy,max_tokens=29", "--batch_size=32", "--rows=64")
SPENT = dict(decoder="decoder", scores="scores", encoder="encoder", reading="input")
RECAPTION = tuple(f"recaption/{r}" for r in ("ours", "kept", "open_clip", "ratio", "ratio_default"))


def embedded(given: Given) -> Rows:
    """Pictures a second of a core of `search index`, and of open_clip's encode_image behind its
    loader, starts left out."""
    told = given.script("search.py", "embed", jpegs(given), "--count=320", one_core=True)
    return dict(search_embed=dict(ours=told["ours"], open_clip=told["peer"], ratio=told["ratio"]))
