"""Checks of a run's configuration, before any long work; config.json and what may change in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from coca_jax.config import Config, read
from coca_jax.config.base import flatten
from coca_jax.config.data import PLACES
from coca_jax.data import batch_schedule
from coca_jax.data.sources import files
from coca_jax.runtime import json_files, storage

# What may differ when a run is resumed: it changes where and how often, not what is computed.
FREE = (
    *(
        "mesh",
        "checkpoint",
        "faults",
        "eval",
        "log",
        "remat",
        "accumulate_steps",
        "data.num_threads",
        "data.max_bad_fraction",  # only how much damage a run accepts, and when it stops
        "data.features",
        "data.features_gib",
    ),
    *("data.loader", "model.implementation", "model.image.onnx", "text_lengths", "text_parts"),
)
PATHS = ("init_from", "data.vocabulary")  # the same place however it is spelled
LENGTH = ("steps", "epochs", "stage_steps")  # see `continue_longer`


def check_batch(config: Config, parts: int) -> None:
    """Raises ValueError when the batch does not split over `parts` shards and micro-batches."""
    micro, sizes = config.accumulate_steps, batch_schedule.sizes(config)
    for number, size in enumerate(sizes):
        last = number == len(sizes) - 1
        name = f"config.batch_size={size}" if last else f"config.batch_sizes: {size}"
        if size % (parts * micro):
            raise ValueError(
                f"{name} is not a multiple of {parts} batch shards (mesh.data x "
                f"mesh.fsdp) x accumulate_steps={micro}; choose a multiple of {parts * micro}"
            )
        if size % (parts * micro * config.text_parts):
            raise ValueError(
                f"{name} is not a multiple of {parts * micro} batch shards and "
                f"micro-batches x text_parts={config.text_parts}; choose a multiple of "
                f"{parts * micro * config.text_parts}"
            )


def remarks(config: Config, num_examples: int) -> list[str]:
    """Warnings of what can be, and is hardly meant. num_examples: of the run's data."""
    found = [remark_batch(config, num_examples), remark_losses(config)]
    found += [remark_augmentations(config), remark_start(config), remark_unread(config)]
    found.append(remark_dropout(config))
    return [one for one in found if one]


def remark_batch(config: Config, num_examples: int) -> str:
    """A warning where a batch has more rows than the data have examples, else ''."""
    largest = max(batch_schedule.sizes(config))
    if largest <= num_examples:
        return ""
    return (
        f"warning: config.batch_size={largest} is more than all {num_examples} examples: "
        "each is in a batch several times, as a negative of itself; lower it"
    )


def remark_losses(config: Config) -> str:
    """A warning where losses beside a head, or of the image encoder alone, have nothing that they
    could train, else ''."""
    given = {k: v for k, v in config.loss.to_dict().items() if k.endswith("_weight") and v}
    if config.head.kind:
        rate, left = "encoder_learning_rate", "leaves the head alone"
    else:
        rate, left = "image_learning_rate", "locks the image encoder"
        given = {k: v for k, v in given.items() if k in ("bag_weight", "hidden_weight")}
    if getattr(config.optimizer, rate) != 0 or not given:
        return ""
    named = " and ".join(f"loss.{name}={value}" for name, value in given.items())
    return f"warning: {named} cost time and train nothing, as optimizer.{rate}=0 {left}; set 0"


def remark_start(config: Config) -> str:
    """A warning where a part that is drawn at random stays as it is, else ''."""
    optimizer = config.optimizer
    if config.head.kind and optimizer.encoder_learning_rate == 0 and not config.init_from:
        return (
            "warning: optimizer.encoder_learning_rate=0 without init_from: the head learns from a "
            "model that is drawn at random and stays so; give init_from, the weights that it has"
        )
    few = {"lora_rank": optimizer.lora_rank, "keep_embeddings": optimizer.keep_embeddings}
    given = [f"optimizer.{name}={value}" for name, value in few.items() if value]
    if config.init_parts == "all" or not given:
        return ""
    return (
        f"warning: init_parts={config.init_parts!r} leaves all but the image encoder as it is "
        f"drawn at random, and {given[0]} trains a part of that alone; set 'all'"
    )


def remark_dropout(config: Config) -> str:
    """A warning where a run that begins from weights hides a share of an image, as recipes have it
    of weights that were trained so, or a frozen image encoder does, else ''."""
    share, hidden = config.model.image.patch_dropout, config.model.pooler.token_dropout
    if share and config.frozen_encoder:
        return (
            f"warning: model.image.patch_dropout={share} hides patches from a frozen image "
            "encoder: what is trained on its tokens sees others than in use; set 0, unless it is "
            "meant"
        )
    captions = not config.head.kind and config.loss.captioning_weight
    settings = [f"model.image.patch_dropout={share}"] if share else []
    settings += [f"model.pooler.token_dropout={hidden}"] if hidden and captions else []
    if not settings or not config.init_from:
        return ""
    verb = "hide" if len(settings) > 1 else "hides"
    return (
        f"warning: {' and '.join(settings)} {verb} so much of each image while the run trains on from "
        "its weights, and in use nothing is hidden; set 0, unless it is meant"
    )


def remark_augmentations(config: Config) -> str:
    """A warning where so many augmentations of an image are all the same, else ''."""
    count = config.data.augmentations
    if not count or config.data.varies:
        return ""
    return (
        f"warning: data.augmentations={count} has no effect, as data.augment='none' and data.flip="
        "False leave images as they are; set 0, or another data.augment"
    )


def remark_unread(config: Config) -> str:
    """A warning where keys are set that say how something is done which the run does not, else
    ''."""
    optimizer, loss, data = config.optimizer, config.loss, config.data
    plain, unread = Config().to_dict(), []
    for read_by, keys in (
        ("" if optimizer.lora_rank else "optimizer.lora_rank above 0", ("lora", "lora_alpha")),
        ("" if optimizer.schedule == "wsd" else "optimizer.schedule='wsd'", ("decay_share",)),
        ("" if loss.hidden_weight else "loss.hidden_weight above 0", ("hidden_share",)),
        ("" if loss.affinity_weight else "loss.affinity_weight above 0", ("teacher_scale",)),
        ("" if loss.contrastive == "global" else "loss.contrastive='global'", ("global_rate",)),
        ("" if data.augment == "randaugment" else "data.augment='randaugment'", ("randaugment",)),
    ):
        section = read_by.partition(".")[0]
        for key in keys if read_by else ():
            value = getattr(getattr(config, section), key)
            if value != plain[section][key]:
                unread.append(f"{section}.{key}={value!r} without {read_by}")
    return f"warning: no effect has {', and none '.join(unread)}" if unread else ""


def num_steps(config: Config, num_examples: int) -> int:
    """Optimizer steps of the run: config.steps, or config.epochs passes over the data.

    Raises ValueError when the epochs amount to no step, or the warm-up or a profile outlasts them.
    """
    steps = batch_schedule.steps_of(config, num_examples)
    if steps < 1:
        raise ValueError(
            f"config.epochs={config.epochs} of {num_examples} examples is no step of "
            f"batch_size={config.batch_size}; raise the one or lower the other"
        )
    try:
        config.check_length(steps)
    except ValueError as error:
        if not config.epochs:
            raise
        raise ValueError(
            f"{error} (config.epochs={config.epochs} of {num_examples} examples in batches of "
            f"{config.batch_size}: more epochs or a smaller batch_size make more steps)"
        ) from None
    return steps


def contents(
    config: Config,
    workdir: str,
    vocabulary: Any,
    class_names: Sequence[str] = (),
    data_digests: Sequence[Mapping[str, Any] | None] = (),
) -> dict[str, Any]:
    """What config.json holds: the config, the workdir as it is spelled in the config's paths, the
    vocabulary's checksum, what tells each source's data (`Mixture.data_digests`) and the head's
    classes, in the order of its outputs."""
    data = config.to_dict()
    data |= {"workdir": str(workdir), "vocabulary_checksum": vocabulary.checksum}
    if class_names:
        data["class_names"] = list(class_names)
    if any(data_digests):
        data["data_digests"] = list(data_digests)
    return _json(data)


def write(run: dict[str, Any], workdir: str) -> None:
    """Writes workdir/config.json. run: from `contents`."""
    json_files.write_sealed(storage.place(workdir) / "config.json", run)


def check_before_data(config: Config, workdir: str) -> None:
    """`check_resumable`, where there is such a run, of all but what the data will tell: before they
    are indexed. The config's sources are where they will be read."""
    file = storage.place(workdir) / "config.json"
    if not file.exists():
        return
    try:
        old = json_files.read_sealed(file)
    except ValueError:  # damaged: a checkpoint has it too, which is read with the run
        return
    check_resumable(config, old, workdir, whole=False)


def check_resumable(
    config: Config,
    old: dict[str, Any],
    workdir: str,
    class_names: Sequence[str] = (),
    *,
    whole: bool = True,
) -> None:
    """Raises ValueError naming what differs from the run that `workdir` already holds.

    old: the contents of its config.json. Data inside the workdir are the same wherever that lies
    now and however it is spelled; others are by their whole path. whole=False: of the sources the
    places alone are compared, and neither classes nor how many examples there are.
    """
    new = flatten(_json(read(Config, config.to_dict()).to_dict()))
    # A run from before a key was there has its default; keys of today as they are written today.
    old = flatten(old) | flatten(_json(read(Config, old, f"{workdir}/config.json", True).to_dict()))
    old.pop("data_digests", None)  # by `check_data`
    classes = old.pop("class_names", [])
    before = old.pop("workdir", workdir)
    changed = [
        difference
        for key in sorted(old.keys() | new.keys())
        if key != "vocabulary_checksum"
        and key not in LENGTH
        and not any(key == free or key.startswith(free + ".") for free in FREE)
        for difference in _differences(key, old.get(key), before, new.get(key), workdir, whole)
    ]
    if changed:
        remedy = "use a new --workdir or the same config"
        if len(changed) == 1 and (gone := _gone(old.get("data.sources"), before)):
            remedy += f"; if {gone} was moved, a link there to where it is now lets the run go on"
        raise ValueError(
            f"{workdir} holds a run of another config ({'; '.join(changed[:4])}); {remedy}"
        )
    if whole and classes != list(class_names):
        raise ValueError(
            f"{workdir} holds a head over {len(classes)} classes ({', '.join(classes[:3])}, ...), "
            f"the data now give {len(class_names)} ({', '.join(class_names[:3])}, ...); use a new "
            "--workdir or the same classes"
        )


def check_data(
    data_digests: Sequence[Mapping[str, Any] | None],
    config: Config,
    old: Mapping[str, Any],
    workdir: str,
) -> None:
    """Raises ValueError naming the first prepared source that has other data than the run of
    `workdir` began with, whose config.json holds `old`. Runs from before that was kept pass."""
    for number, (before, now) in enumerate(zip(old.get("data_digests", ()), data_digests)):
        if before and now and before != now:
            there, here = (
                f"{one['examples']} examples (sha256 {one['sha256'][:12]})" for one in (before, now)
            )
            raise ValueError(
                f"data.sources[{number}], {config.data.sources[number].path}, was prepared anew "
                f"since the run of {workdir} began: {there} then, {here} now; put the data of then "
                f"back, or use a new --workdir, with --config.init_from={workdir} to train on from "
                "its weights"
            )


def within(path: str, before: str, workdir: str) -> str:
    """A source's path, which lies in `workdir` now where it lay in it when that was `before`."""
    folder = storage.whole_path(before).rstrip("/") + "/"
    whole = storage.whole_path(path) if path else ""
    return (
        f"{workdir.rstrip('/')}/{whole.removeprefix(folder)}" if whole.startswith(folder) else path
    )


def compared(key: str, value: Any, workdir: str, whole: bool = True) -> Any:
    """The value of a key with the paths of sources whole, or (path,) within their workdir, and
    those of PATHS whole."""
    if key == "loss.global_examples" and not whole:
        return None
    if key in PATHS and value:
        return storage.whole_path(value).rstrip("/")
    if key != "data.sources":
        return value
    folder = storage.whole_path(str(workdir)).rstrip("/") + "/"
    found = []
    for source in value:
        path: Any = storage.whole_path(source["path"]) if source.get("path") else ""
        if path.startswith(folder):
            path = (path.removeprefix(folder),)
            if not whole:  # of several of one name, each has its number when all are known
                path = (re.sub(r"-\d+$", "", path[0]),)
        source = {**source, "path": path}
        found.append(source if whole else {name: source.get(name, "") for name in PLACES})
    if whole:
        return found
    # Data of questions may be several sources, by their answers, which the data will tell.
    return [source for n, source in enumerate(found) if source not in found[:n]]


def _differences(
    key: str, there: Any, before: str, here: Any, workdir: str, whole: bool
) -> Iterator[str]:
    """'KEY: VALUE there, VALUE here' for each part of a key's value that differs."""
    if key != "data.sources":
        if compared(key, there, before, whole) != compared(key, here, workdir, whole):
            yield f"{key}: {there!r} there, {here!r} here"
        return
    old, new = (
        compared(key, value, folder, whole) for value, folder in ((there, before), (here, workdir))
    )
    if len(old) != len(new):
        # Without their kinds and weights, which are not known before the data are read.
        places = ([_place(one) for one in sources] for sources in (old, new))
        yield "{}: {!r} there, {!r} here".format(key, *places)
        return
    # The data of a copied workdir may still be those of the original: the same absolute path.
    same = [compared(key, value, "", whole) for value in (there, here)]
    for number, pair in enumerate(zip(old, new)):
        for name in sorted(pair[0].keys() | pair[1].keys()):
            values = [one.get(name) for one in pair]
            if values[0] == values[1]:
                continue
            if name == "path" and len(same[0]) == len(same[1]) == len(old):
                if same[0][number][name] == same[1][number][name]:
                    continue
            shown = [
                f"{v[0]!r} in the workdir" if isinstance(v, tuple) else repr(v) for v in values
            ]
            yield f"{key}[{number}].{name}: {shown[0]} there, {shown[1]} here"


def _place(source: Mapping[str, Any]) -> str:
    """What an entry of data.sources reads, for messages."""
    place = next((source[name] for name in PLACES if source.get(name)), "")
    return f"{place[0]} in the workdir" if isinstance(place, tuple) else str(place)


def continue_longer(
    config: Config, old: Mapping[str, Any], num_examples: int, workdir: str
) -> tuple[Config, int]:
    """(The config with which the run in `workdir` continues, the steps it had until now).

    A longer run keeps the steps at which its stages of batch and image sizes begin; only the last
    stage gets longer. The examples that are already read then stay the same. The schedule of the
    learning rate is that of the new length.

    Args:
        old: the contents of the run's config.json.
        num_examples: of the run's data.

    Raises:
        ValueError: the run has fewer steps than before.
    """
    there = read(Config, old, f"{workdir}/config.json", True)
    before, now = (batch_schedule.steps_of(one, num_examples) for one in (there, config))
    if now < before:
        raise ValueError(
            f"{workdir} holds a run of {before} steps, more than the {now} of this one; give "
            f"--config.steps={before} to continue it, or more to train longer"
        )
    stage_steps = there.stage_steps
    if now > before and (config.batch_sizes or config.image_sizes):
        stage_steps = stage_steps or before
    if config.stage_steps not in (0, stage_steps):
        raise ValueError(
            f"config.stage_steps={config.stage_steps}: the run in {workdir} has {stage_steps}; "
            "leave it out"
        )
    return config.change({"stage_steps": stage_steps}), before


def _gone(sources: Any, workdir: str) -> str:
    """The first local path of a run's sources, outside its workdir, at which nothing lies; ''."""
    folder = storage.whole_path(str(workdir)).rstrip("/") + "/"
    for source in sources or ():
        path = source.get("path") or ""
        whole = storage.whole_path(path) if path else ""
        if path and "://" not in whole and not whole.startswith(folder):
            if not files.is_pattern(path) and not files.exists(path):
                return str(path)
    return ""


def _json(tree: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(tree, default=list))
