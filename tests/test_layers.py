"""The structure in docs/architecture.md: imports go one way."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = {path.stem for path in TESTS.rglob("*.py") if path.stem.startswith(("test_", "conftest"))}
ROOT = TESTS.parent
# From the top: a layer imports itself and the ones below it. Other modules are between commands and
# training, or below all.
LAYERS = ("t2tvit.commands", "t2tvit.training", "t2tvit.data")
TREES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): (
        ast.parse(path.read_text())
    )
    for package in ("t2t_kernels", "t2tvit", "bench")
    for path in (ROOT / package).rglob("*.py")
}


def imported(node: ast.AST) -> Iterator[str]:
    """The modules that ``node`` imports, including imports in functions, except for types only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.ImportFrom) and child.module:
            for name in child.names:
                inner = f"{child.module}.{name.name}"
                yield inner if inner in TREES else child.module
        elif isinstance(child, ast.Import):
            yield from (name.name for name in child.names)
        else:
            yield from imported(child)


IMPORTS = {name: {each for each in imported(tree) if each in TREES} for name, tree in TREES.items()}


def test_no_modules_import_each_other():
    list(TopologicalSorter(IMPORTS).static_order())  # raises a CycleError that names them


@pytest.mark.parametrize("number", range(1, len(LAYERS)))
def test_no_layer_imports_a_higher_one(number):
    above = LAYERS[:number]
    modules = [name for name in IMPORTS if name.startswith(LAYERS[number])]
    wrong = {(name, each) for name in modules for each in IMPORTS[name] if each.startswith(above)}
    assert modules and not wrong


def test_training_imports_no_module_that_uses_it():
    """Not even if no two modules import each other."""
    training = {name for name in IMPORTS if name.startswith("t2tvit.training")}
    users = {name for name in IMPORTS if IMPORTS[name] & training} - training
    wrong = {(name, each) for name in training for each in IMPORTS[name] & users}
    assert users and not wrong


def test_no_test_imports_another():
    """Shared helpers are in tests/support."""
    wrong = []
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", ())]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            if isinstance(node, ast.Import | ast.ImportFrom):
                parts = {part for name in names for part in name.split(".")}
                wrong += [(path.relative_to(TESTS).as_posix(), each) for each in parts & FILES]
    assert FILES and not wrong
