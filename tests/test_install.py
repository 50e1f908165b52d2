"""tools/install.sh and the Makefile, run for real against small stand-ins for Python and df."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("awk", "bash", "dirname", "env", "grep", "make", "mkdir", "rm", "sh", "tail", "touch")

PYTHON = """#!/bin/sh
case "$*" in
  *version_info*) echo {version} ;;
  *ensurepip*) exit {ensurepip} ;;
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip "*) echo "pip $*"; echo "{says}"; exit {pip} ;;
  "-c import comp;"*) echo "{says}"; exit {imports} ;;
  "-c import mlflow,"*) ;;
  *) exit 64 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in a folder with a space in its name, and a PATH without any Python."""
    checkout = tmp_path / "my checkout"
    (checkout / "tools").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "tools/install.sh"):
        shutil.copy(ROOT / name, checkout / name)
    (tmp_path / "bin").mkdir()
    for name in (*TOOLS, "cp"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    add_df(tmp_path / "bin", free_mib=50_000)
    return checkout


def add_program(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
    return folder / name


def add_df(folder: Path, *, free_mib: int) -> None:
    text = f"#!/bin/sh\necho header\necho disk 1 1 {free_mib * 1024} 1% /\n"
    add_program(folder, "df", text)


def add_python(
    folder: Path,
    name: str = "python3",
    *,
    version: str = "3.11.7",
    ensurepip: int = 0,
    pip: int = 0,
    imports: int = 0,
    says: str = "",
) -> Path:
    text = PYTHON.format(version=version, ensurepip=ensurepip, pip=pip, imports=imports, says=says)
    return add_program(folder, name, text)


def make(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = str(checkout.parent / "bin")
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=checkout,
        env={"PATH": path, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_an_old_python_is_named_with_the_version_that_is_needed(checkout: Path) -> None:
    add_python(checkout.parent / "bin", version="3.9.18")
    done = make(checkout, "install")
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed, but found 3.9.18" in done.stderr
    assert not (checkout / ".venv").exists()


def test_no_python_at_all_is_said_so(checkout: Path) -> None:
    done = make(checkout, "install")
    assert "Python 3.11 or newer is needed, but found none" in done.stderr


def test_a_newer_python_further_down_the_path_is_taken(checkout: Path) -> None:
    add_python(checkout.parent / "bin", version="3.9.18")
    add_python(checkout.parent / "bin", "python3.12", version="3.12.1")
    done = make(checkout, "install")
    assert done.returncode == 0, done.stderr


def test_the_person_names_the_python(checkout: Path) -> None:
    (checkout.parent / "own").mkdir()
    own = add_python(checkout.parent / "own", "my-python", version="3.13.0")
    done = make(checkout, "install", f"PYTHON={own}")
    assert done.returncode == 0, done.stderr


def test_a_missing_venv_module_is_named_with_the_package_that_brings_it(checkout: Path) -> None:
    add_python(checkout.parent / "bin", ensurepip=1)
    done = make(checkout, "install")
    assert "has no venv module" in done.stderr
    assert "apt install python3.11-venv" in done.stderr


def test_a_full_disk_is_found_before_anything_is_written(checkout: Path) -> None:
    add_python(checkout.parent / "bin")
    add_df(checkout.parent / "bin", free_mib=100)
    done = make(checkout, "install")
    assert f"{checkout} has 100 MiB free, but the environment needs 3072 MiB" in done.stderr
    assert not (checkout / ".venv").exists()


def test_a_disk_that_fills_up_on_the_way_is_named(checkout: Path) -> None:
    add_python(checkout.parent / "bin", pip=1, says="OSError: No space left on device")
    done = make(checkout, "install")
    assert "the disk is full (50000 MiB free in" in done.stderr
    assert not (checkout / ".venv" / ".installed-base").exists()


def test_an_unreachable_package_index_is_named(checkout: Path) -> None:
    add_python(checkout.parent / "bin", pip=1, says="NewConnectionError: no route")
    done = make(checkout, "install")
    assert "the package index was not reached" in done.stderr


def test_any_other_failure_of_pip_shows_the_end_of_its_log(checkout: Path) -> None:
    add_python(checkout.parent / "bin", pip=1, says="ERROR: No matching distribution for x")
    done = make(checkout, "install")
    assert "No matching distribution for x" in done.stderr
    assert "its whole output is in .venv/install.log" in done.stderr


def test_packages_that_do_not_import_are_not_called_installed(checkout: Path) -> None:
    add_python(checkout.parent / "bin", imports=1, says="ImportError: libgomp.so.1 is missing")
    done = make(checkout, "install")
    assert "the packages are installed, but do not work" in done.stderr
    assert "ImportError: libgomp.so.1 is missing" in done.stderr
    assert not (checkout / ".venv" / ".installed-base").exists()


def test_an_environment_of_an_old_python_is_not_silently_replaced(checkout: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    add_python(checkout / ".venv" / "bin", "python", version="3.8.18")
    done = make(checkout, "install")
    assert ".venv holds 3.8.18, but 3.11 or newer is needed" in done.stderr
    assert (checkout / ".venv" / "bin" / "python").exists()


def test_the_second_install_says_nothing(checkout: Path) -> None:
    add_python(checkout.parent / "bin")
    assert "installed in" in make(checkout, "install").stdout
    again = make(checkout, "install")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_changed_requirements_are_installed_again(checkout: Path) -> None:
    add_python(checkout.parent / "bin")
    make(checkout, "install")
    stamp = (checkout / ".venv" / ".installed-base").stat().st_mtime
    os.utime(checkout / "constraints.txt", (stamp + 5, stamp + 5))
    assert "installed in" in make(checkout, "install").stdout


def test_an_environment_for_the_tests_serves_the_demo_too(checkout: Path) -> None:
    add_python(checkout.parent / "bin")
    make(checkout, ".venv/.installed-test")
    assert "pip install" in (checkout / ".venv" / "install.log").read_text()
    assert make(checkout, "install").stdout == ""


def test_every_install_keeps_to_the_constraints(checkout: Path) -> None:
    add_python(checkout.parent / "bin")
    make(checkout, ".venv/.installed-dev")
    assert "-c constraints.txt -e .[dev]" in (checkout / ".venv" / "install.log").read_text()
