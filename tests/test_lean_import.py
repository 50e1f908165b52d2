"""Start-up stays light: heavy libraries are imported where they are used, not before."""

import gc
import subprocess
import sys
from types import ModuleType

import pytest

import comp
import comp.models
import comp.tasks

HEAVY = ("mlflow", "optuna", "ray", "torch", "transformers")

LOADED_BY_HELP = """
import sys
from studies.cli import main
sys.argv = ["comp", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("loaded:", *sorted({name.split(".")[0] for name in sys.modules}))
"""

SECONDS_BEYOND_TORCH = """
import time, torch
start = time.process_time()
import comp
print(time.process_time() - start)
"""


def run(program: str) -> str:
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(statement: str) -> set[str]:
    return set(run(f"{statement}; import sys; print(*sys.modules)").split())


@pytest.mark.parametrize(
    "module",
    [
        "comp",
        "comp.config",
        "comp.errors",
        "comp.models.presets",
        "comp.modes",
        "comp.results",
        "comp.strategy",
        "comp.tasks.names",
        "orchestration.job",
        "studies.spec",
    ],
)
def test_checking_a_study_needs_no_heavy_library(module: str) -> None:
    assert not loaded_by(f"import {module}") & set(HEAVY)


def test_help_needs_no_heavy_library() -> None:
    loaded = run(LOADED_BY_HELP).splitlines()[-1].split()
    assert loaded[0] == "loaded:"
    assert not set(loaded) & set(HEAVY)


def test_import_comp_takes_a_tenth_of_a_second_beyond_torch() -> None:
    # Processor time and up to three attempts, so that a busy machine does not fail it.
    assert any(float(run(SECONDS_BEYOND_TORCH)) <= 0.1 for _ in range(3))


@pytest.mark.parametrize("package", [comp, comp.models, comp.tasks])
def test_public_names_are_found_on_first_use(package: ModuleType) -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package.__all__) <= set(dir(package))


def test_an_import_leaves_the_collection_of_garbage_as_it_was() -> None:
    for was_on in (True, False):
        (gc.enable if was_on else gc.disable)()
        try:
            assert comp.load_model
            assert gc.isenabled() == was_on
        finally:
            gc.enable()


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    program = "import comp\ntry: comp.prnue\nexcept AttributeError as error: print(error)"
    assert "prnue" in run(program)
