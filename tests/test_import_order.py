"""Packages import downward only, at the top of a module and in its functions."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
# Bottom to top. Packages on one line do not import each other.
ORDER = """
config recipes
runtime
parallel
ops.cpu_kernels
ops
data.scenes data.sources models
data.vocabulary
data
checkpoints interop
evaluation.metrics inference.generation.processors
inference.generation.strategies
inference.generation
inference
evaluation.evaluators
evaluation
training.trackers
training
apps.search
apps.serve apps.recaption
apps estimate
cli
"""
LEVEL = {f"coca_jax.{name}": n for n, line in enumerate(ORDER.split("\n")) for name in line.split()}
LEVEL["coca_jax"] = len(LEVEL)


def imported(node):
    """Dotted names that a syntax tree imports, except for type checkers."""
    if isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Import):  # `import coca_jax` gives its version
        yield from (alias.name for alias in node.names if "." in alias.name)
    elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
        for child in ast.iter_child_nodes(node):
            yield from imported(child)


def package(name):
    return name if name in LEVEL else package(name.rpartition(".")[0])


def test_packages_import_downward_so_no_two_import_each_other():
    pairs, packages = {}, set()
    for path in (ROOT / "coca_jax").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        packages.add(module.rpartition(".")[0])
        for name in imported(ast.parse(path.read_text())):
            if name.startswith("coca_jax."):
                pairs.setdefault((package(module), package(name)), f"{module} imports {name}")
    assert packages == LEVEL.keys()
    assert not [found for (a, b), found in pairs.items() if a != b and LEVEL[a] <= LEVEL[b]]
