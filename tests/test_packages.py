"""What holds for every module of the packages: who imports whom, and that the examples in docstrings are true."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
MAY_IMPORT: dict[str, set[str]] = {"layers": set(), "compress": {"layers"}, "mtl": {"layers"}}
MODULES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_packages(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_go_one_way(path: Path) -> None:
    package = dotted(path).split(".")[0]
    ours = imported_packages(path) & {"layers", "compress", "mtl", "scripts", "tests", "benchmarks"}
    assert ours <= MAY_IMPORT[package] | {package}


@pytest.mark.parametrize("path", [path for path in MODULES if ">>> " in path.read_text()], ids=dotted)
def test_examples_in_docstrings(path: Path) -> None:
    names = {"torch": torch, "nn": torch.nn}  # what every reader of an example expects to be imported
    result = doctest.testmod(importlib.import_module(dotted(path)), extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0
