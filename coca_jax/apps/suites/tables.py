"""Which data sets a suite has, the figure that counts of each, and the columns of its row.

DataComp's 38 (Gadre et al. 2023, table 14): the key is the data set's, the title the column of
open_clip's docs/openclip_results.csv.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import yaml

from coca_jax.apps.suites import folders, metrics, pairs
from coca_jax.data.sources import files
from coca_jax.runtime import storage

ACC, MEAN = "acc1", "mean_per_class_recall"
DATACOMP: dict[str, tuple[str, str]] = {
    "imagenet1k": ("ImageNet 1k", ACC),
    "vtab/caltech101": ("Caltech-101", MEAN),
    "cifar10": ("CIFAR-10", ACC),
    "vtab/cifar100": ("CIFAR-100", ACC),
    "vtab/clevr_count_all": ("CLEVR Counts", ACC),
    "vtab/clevr_closest_object_distance": ("CLEVR Distance", ACC),
    "country211": ("Country211", ACC),
    "vtab/dtd": ("Describable Textures", ACC),
    "vtab/eurosat": ("EuroSAT", ACC),
    "fgvc_aircraft": ("FGVC Aircraft", MEAN),
    "food101": ("Food-101", ACC),
    "gtsrb": ("GTSRB", ACC),
    "imagenet_sketch": ("ImageNet Sketch", ACC),
    "imagenetv2": ("ImageNet v2", ACC),
    "imagenet-a": ("ImageNet-A", ACC),
    "imagenet-o": ("ImageNet-O", ACC),
    "imagenet-r": ("ImageNet-R", ACC),
    "vtab/kitti_closest_vehicle_distance": ("KITTI Vehicle Distance", ACC),
    "mnist": ("MNIST", ACC),
    "objectnet": ("ObjectNet", ACC),
    "vtab/flowers": ("Oxford Flowers-102", MEAN),
    "vtab/pets": ("Oxford-IIIT Pet", MEAN),
    "voc2007": ("Pascal VOC 2007", ACC),
    "vtab/pcam": ("PatchCamelyon", ACC),
    "renderedsst2": ("Rendered SST2", ACC),
    "vtab/resisc45": ("RESISC45", ACC),
    "cars": ("Stanford Cars", ACC),
    "stl10": ("STL-10", ACC),
    "sun397": ("SUN397", ACC),
    "vtab/svhn": ("SVHN", ACC),
    "retrieval/flickr_1k_test_image_text_retrieval": ("Flickr", "mean_recall@1"),
    "retrieval/mscoco_2014_5k_test_image_text_retrieval": ("MSCOCO", "mean_recall@1"),
    "misc/winogavil": ("WinoGAViL", "jaccard_10_12"),
    "wilds/iwildcam": ("iWildCam", "F1-macro_all"),
    "wilds/camelyon17": ("Camelyon17", ACC),
    "wilds/fmow": ("FMoW", "acc_worst_group"),
    "fairness/dollar_street": ("Dollar Street", "acc5_worst_group"),
    "fairness/geode": ("GeoDE", "acc_worst_group"),
}
# Names of DataComp's tasklist.yml for figures that have another here.
RENAMED = {
    "acc_avg": ACC,
    "acc_worst_region": "acc_worst_group",
    "acc_wg": "acc_worst_group",
    "acc_top5_wg": "acc5_worst_group",
    "avg_jaccard_score": "jaccard",
    "jaccard_score_10-12": "jaccard_10_12",
}
MAIN = {  # of a set whose figure nobody names
    "classification": ACC,
    "multilabel": "mean_average_precision",
    "retrieval": "mean_recall@1",
    "selection": "acc",
}
NAMES = ("clip_benchmark", "datacomp")


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set of a suite: its key, title, folder and the figure that counts ('': by kind)."""

    key: str
    title: str
    folder: folders.Folder
    main: str = ""

    @property
    def metric(self) -> str:
        """The figure that counts."""
        return self.main or MAIN[self.folder.kind]


def slug(key: str) -> str:
    """A data set's name in files and scores."""
    return key.replace("/", "-")


def tasks(suite: str, root: str, split: str = "test") -> tuple[list[Task], list[str]]:
    """(the tasks of a suite whose data lie below `root`, keys of those that do not; of
    'clip_benchmark' those that lie there without the tars of the split).

    suite: 'datacomp'; 'clip_benchmark', every set in its layout below root; or a file, a tasklist
    as DataComp's (`key: {name, main_metric}`) or a key a line. Raises ValueError where no data are
    there, a set is not as it should be, or two have one name in the scores.
    """
    if suite == "clip_benchmark":
        sets = _sets(root, split)
        found = [(key, path) for key, path in sorted(sets.items()) if path]
        wanted = {key: (key, "") for key in sorted(sets)}
    else:
        wanted = DATACOMP if suite == "datacomp" else _listed(suite)
        found = [(key, path) for key in wanted if (path := _find(root, key))]
    if not found:
        some = f"none of {', '.join([*wanted][:3])} ..."
        if suite == "clip_benchmark":
            some = f"no {split}/nshards.txt in any"
        raise ValueError(f"--root={root} holds no data set of --suite={suite}: {some}")
    here = [_task(key, *wanted[key], folders.read(path, split)) for key, path in found]
    there = {key for key, _ in found}
    called: dict[str, str] = {}
    for key in sorted(there):
        if (other := called.setdefault(slug(key), key)) != key:
            raise ValueError(
                f"--suite={suite}: {other} and {key} would both be {slug(key)} in the "
                "scores; rename one, or name one of them in a file for --suite"
            )
    return here, [key for key in wanted if key not in there]


def _task(key: str, title: str, main: str, folder: folders.Folder) -> Task:
    """The task of a data set: lists of cues have no figure in common with other pairs."""
    if not main and folder.layout == "pairs" and pairs.have_cues(folder.path):
        main = "jaccard"
    return Task(key, title, folder, main)


def _sets(root: str, split: str) -> dict[str, str]:
    """Folders below root, at most two down, that hold a set; by their name below it. '' for one
    that has files of a set, and not the tars of the split."""
    place = storage.place(root)
    if not place.is_dir():
        raise FileNotFoundError(f"--root={root}: no such folder")
    if folders.is_set(root, split):
        return {place.name: root}
    found: dict[str, str] = {}
    for one in place.iterdir():
        inside = [one, *one.iterdir()] if one.is_dir() else []
        for folder in inside:
            if not folder.is_dir():
                continue
            if folders.is_set(str(folder), split):
                found[str(folder.relative_to(place))] = str(folder)
            elif any((folder / name).exists() for name in folders.ABOUT):
                found[str(folder.relative_to(place))] = ""
    return found


def _listed(file: str) -> dict[str, tuple[str, str]]:
    """{key: (title, main metric)} of a file."""
    place = storage.place(file)
    if not place.exists():
        raise ValueError(f"--suite={file}: choose {', '.join(NAMES)}, or give a file of names")
    lines = files.read_lines(file)
    if not file.endswith((".yml", ".yaml")):
        keys = [line.strip().removeprefix("wds/") for line in lines if line.strip()]
        return {key: (key, "") for key in keys}
    try:
        found: Any = yaml.safe_load("\n".join(lines))
    except yaml.YAMLError as error:
        raise ValueError(f"--suite={file} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
        raise ValueError(f"--suite={file}: a tasklist is a mapping of key: {{name, main_metric}}")
    listed = {}
    for key, one in found.items():
        known = str(one.get("main_metric") or DATACOMP.get(key, ("", ""))[1])
        main = RENAMED.get(known, known)
        if main and main not in metrics.METRICS:
            choose = ", ".join([*metrics.METRICS, *RENAMED])
            raise ValueError(f"--suite={file}, {key}: main_metric {main!r}; choose from {choose}")
        listed[str(key)] = (str(one.get("name") or key), main)
    return listed


def _find(root: str, key: str) -> str:
    """The folder of a data set: its key, with '/' as '-' or '_', or as DataComp names it."""
    flat = re.sub("[/]", "-", key)
    names = (key, flat, key.replace("/", "_"), f"wds_{flat}_test", f"wds_{flat}", f"{key}.json")
    for name in names:
        path = f"{root.rstrip('/')}/{name}"
        if storage.place(path).exists():
            return path
    return ""
