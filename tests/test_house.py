"""What may be in the repository: small files, no leftovers, nothing of one person's machine."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_BYTES = 250_000
MAX_ZOO_BYTES = 5_000_000

MACHINE_PATH = re.compile(r"(?<![\w.$}/:-])/(?:home/(?!ray\b)\w|root\b|Users/|work\b)")
LEFTOVER = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b|raise Not" r"Implemented")
TEXT = {".cfg", ".csv", ".md", ".py", ".sh", ".svg", ".toml", ".tsv", ".txt", ".yaml", ".yml", ""}


def tracked() -> list[Path]:
    """The files in git that are still there.

    Skips where this is no git checkout, such as in an unpacked source archive.
    """
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so there is no list of what belongs to the repository")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def texts() -> list[tuple[str, str]]:
    return [
        (str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
        for path in tracked()
        if path.suffix in TEXT
    ]


def lines_with(pattern: re.Pattern[str], *, but: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts()
        if name not in but
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def test_files_are_small() -> None:
    large = [p for p in tracked() if p.stat().st_size > MAX_BYTES]
    assert [p for p in large if ROOT / "comp" / "zoo" not in p.parents] == []


def test_shipped_weights_stay_under_5_megabytes_a_model() -> None:
    weights = [p for p in tracked() if ROOT / "comp" / "zoo" in p.parents]
    assert [p for p in weights if p.stat().st_size > MAX_ZOO_BYTES] == []


def test_nothing_is_left_for_later() -> None:
    assert lines_with(LEFTOVER) == []


def test_no_path_of_one_machine_is_named() -> None:
    assert lines_with(MACHINE_PATH) == []


def test_text_ends_with_one_newline_and_has_no_trailing_spaces() -> None:
    assert [n for n, text in texts() if text and not re.search(r"[^\n]\n\Z", text)] == []
    tables = tuple(name for name, _ in texts() if name.endswith(".tsv"))  # empty last cells
    assert lines_with(re.compile(r"[ \t]+$"), but=tables) == []


def test_no_module_is_named_for_nothing_in_particular() -> None:
    vague = {"utils", "helpers", "common", "core", "misc"}
    assert [p for p in tracked() if p.suffix == ".py" and p.stem in vague] == []


def test_every_package_folder_has_an_init() -> None:
    folders = {
        path.parent
        for path in tracked()
        if path.suffix == ".py"
        and path.relative_to(ROOT).parts[0] in ("comp", "orchestration", "studies")
    }
    assert [f for f in sorted(folders) if not (f / "__init__.py").exists()] == []


def test_data_of_the_packages_is_installed_with_them() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    package_data = pyproject["tool"]["setuptools"]["package-data"]
    installed = {
        path
        for package, patterns in package_data.items()
        for pattern in patterns
        for path in (ROOT / package).glob(pattern)
    }
    data = {
        path
        for path in tracked()
        if path.relative_to(ROOT).parts[0] in package_data and path.suffix != ".py"
    }
    assert sorted(data - installed) == []


def test_constraints_name_a_release_of_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + [
        line for extra in project["optional-dependencies"].values() for line in extra
    ]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    names = {re.split(r"\[|>=", line)[0] for line in asked if ">=" in line}
    assert sorted(names - pinned) == []


def test_dependencies_have_lower_bounds_only() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bound = re.compile(r"[\w-]+(\[\w+\])?>=[\d.]+")
    assert [line for line in project["dependencies"] if not bound.fullmatch(line)] == []
