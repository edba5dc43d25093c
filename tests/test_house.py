"""The rules that keep the code easy to find one's way in, held up over its imports and sources.

CONTRIBUTING.md says them in words, and which layer holds what.
"""

import ast
import importlib.util
import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "coca_jax"
TABLES = ROOT / "tests/mutation"

# From the top down. A module belongs to the layer with the longest name that fits it, and imports
# only what stands in its own layer or below.
LAYERS: dict[str, tuple[str, ...]] = {
    "commands": (
        *("train", "evaluate", "caption", "search", "prepare", "convert", "compile", "export"),
        *(
            "ablate",
            "blend",
            "fit",
            "report.__main__",
            "__main__",
            "config.page",
            "benchmark",
            "benchmarking",
        ),
        *("serve", "recaption"),
    ),
    "the command line": ("cli",),
    "fitting": ("fitting", "ablating"),
    "recipes": ("recipes", "inherit", "own_data_flags"),
    "a run": ("training",),
    "what it costs, what it shows": ("estimate", "report", "serving"),
    "suites": ("suites",),
    "scores and search": ("evaluators", "searching", "recaptioning"),
    "a trained model": ("", "decoding", "inference"),
    "checkpoints": ("checkpoints", "training.goodput"),
    "a step": (
        *("training.step", "training.state", "training.gradients", "training.objectives"),
        *("training.objective", "training.image_losses", "training.affinity"),
        *("training.parts", "training.text_lengths"),
    ),
    "what a run is made of": (
        *("training.lora", "training.optimizer", "run_config", "importers"),
        "data.run_vocabulary",
    ),
    "formats": ("export_format", "interop"),
    "data": ("data",),
    "models": ("models",),
    "configuration": ("config",),
    "kinds": ("models.pooler_kinds", "models.head_kinds", "models.tower_kinds"),
    "operations": ("ops",),
    "devices": ("partitioning", "machine.processes"),
    "base": (
        *("console", "files", "machine", "trackers", "configs", "data.bounded_json"),
        *("checkpoints.bucket_arrays", "checkpoints.checksums", "checkpoints.lean_saves"),
        *("checkpoints.saved_items", "checkpoints.saved_record", "checkpoints.saved_steps"),
        *("batch_readers", "engines", "extras", "image_shape", "metrics", "renamed", "text_ends"),
    ),
}


def name_of(path: pathlib.Path) -> str:
    """The module's name below coca_jax; '' for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}


def imports(name: str) -> set[str]:
    """All modules of the package that one imports, inside functions too; those that it needs for
    types alone are left out."""
    found, waiting = set(), [TREES[name]]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "coca_jax":
            folder = node.module.partition(".")[2]
            for alias in node.names:
                inside = f"{folder}.{alias.name}".lstrip(".")
                found.add(inside if inside in SOURCES else folder)
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if ours(alias.name)}
    return found - {name}


def ours(module: str) -> bool:
    return module.split(".")[0] == "coca_jax"


def layer(module: str) -> int:
    fits = [
        (len(prefix), number)
        for number, prefixes in enumerate(LAYERS.values())
        for prefix in prefixes
        if module == prefix or (prefix and module.startswith(f"{prefix}."))
    ]
    assert fits, f"coca_jax.{module} stands in no layer: add it to LAYERS"
    return max(fits)[1]


@pytest.mark.parametrize("name", SOURCES)
def test_imports_run_downwards(name):
    names = list(LAYERS)
    upwards = [
        f"{name or 'coca_jax'} ({names[layer(name)]}) imports {other} ({names[layer(other)]})"
        for other in imports(name)
        if layer(other) < layer(name)
    ]
    assert not upwards


def test_no_module_imports_itself_in_a_circle():
    finished: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in finished:
            for other in sorted(imports(name)):
                visit(other, (*above, name))
            finished.add(name)

    for name in SOURCES:
        visit(name, ())


# What belongs to the program and is no part of the package, but for configs, which is: recipes and
# measurements.
BESIDE = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text())
    for folder in ("configs", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
PROGRAM = TREES | BESIDE


def test_no_file_is_over_400_lines():
    """Nor of the tests, the pages and the kernels; what is generated and docs are no matter."""
    kinds = (".py", ".sh", ".js", ".css", ".html", ".cc", ".h")
    found = {
        str(path.relative_to(ROOT)): path
        for folder in ("coca_jax", "configs", "benchmarks", "launch", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in kinds
    }
    assert {"configs/demo.py", "benchmarks/figures.py", "launch/test.sh"} <= set(found)
    assert {"coca_jax/serving/page/serve.js", "tests/fuzz/run.py", "tests/test_house.py"} <= set(
        found
    )
    for name, path in found.items():
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{name}: {lines} lines"


def functions(tree: ast.AST):
    found = (ast.FunctionDef, ast.AsyncFunctionDef)
    return (node for node in ast.walk(tree) if isinstance(node, found))


def test_no_function_is_over_60_lines():
    for name, tree in PROGRAM.items():
        if name.startswith("ops."):  # kernels may be longer
            continue
        for node in functions(tree):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 60, f"{name}.{node.name} has {lines} lines"


def test_a_configuration_has_a_type():
    """Config, a section of it, or ConfigDict at the edge: never Any. What a run's files hold is a
    mapping of JSON, and so is what other programs wrote (`cfg`)."""
    for name, tree in PROGRAM.items():
        for node in functions(tree):
            given = node.args
            for one in (*given.posonlyargs, *given.args, *given.kwonlyargs):
                if re.search(r"(^|_)config$", one.arg):
                    kind = "" if one.annotation is None else ast.unparse(one.annotation)
                    kind = kind.removesuffix(" | None")
                    assert kind not in ("", "Any", "object", "dict"), (
                        f"{name}.{node.name}: {one.arg}"
                    )


def test_no_file_is_a_drawer_for_everything():
    assert not [
        name for name in SOURCES if re.search(r"(^|\.)(utils?|helpers?|misc|common)$", name)
    ]


def test_tests_share_no_generator():
    """What a test draws from its file's generator would depend on the tests before it."""
    made = re.compile(r"^\w+ = (?:\w+\.)*(?:default_rng|RandomState|Random)\([^()]*\)$", re.M)
    assert made.search("RNG = np.random.default_rng(0)")
    files = [path for path in (ROOT / "tests").rglob("*.py") if made.search(path.read_text())]
    assert not files


def outside(*rooms: str) -> dict[str, ast.Module]:
    """The sources that stand in none of the rooms."""
    return {
        name: tree
        for name, tree in TREES.items()
        if not any(name == room or name.startswith(f"{room}.") for room in rooms)
    }


def called(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_only_partitioning_names_the_axes_of_the_mesh():
    for name, tree in outside("partitioning").items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            if ast.unparse(node.func).split(".")[-1] not in ("P", "PartitionSpec", "Mesh"):
                continue
            words = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            assert not words & {"data", "fsdp", "tensor"}, f"{name}: {ast.unparse(node)}"


def test_only_models_and_operations_know_scan_over_layers_and_remat():
    for name, tree in outside("models", "ops").items():
        found = called(tree) & {"nn.scan", "nn.remat", "jax.checkpoint", "jax.remat"}
        assert not found, f"{name}: {found}"


def test_tensorflow_stands_at_its_door_alone():
    door = ("data.seqio_tasks", "data.tfds_source", "importers.tfds_name")
    for name, tree in outside(*door).items():
        for node in ast.walk(tree):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            roots = {module.split(".")[0] for module in modules}
            assert not roots & {"tensorflow", "seqio", "tensorflow_datasets"}, name


def test_only_models_and_formats_know_parameters_by_path():
    """Roles say what a parameter is for (models/roles.py); names of layers stand nowhere else."""
    layers = {"image_encoder", "text_decoder", "unimodal", "multimodal", "pos_embed"}
    for name, tree in outside("models", "ops", "interop", "config").items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                value = node.slice.value
                assert value not in layers, f"{name}: {ast.unparse(node)}"


@pytest.mark.parametrize("table", sorted(TABLES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_fault_of_the_mutation_table_has_its_place(table):
    """Its old text stands once in the package; else nothing would be changed."""
    spec = importlib.util.spec_from_file_location("mutations", TABLES / "run.py")
    mutations = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutations)
    module = tomllib.loads(table.read_text())
    for fault in module["fault"]:
        places = mutations.find(ROOT, fault.get("file", module["file"]), fault["old"])
        assert len(places) == 1, fault["name"]
