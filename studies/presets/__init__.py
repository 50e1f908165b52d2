"""Specs that ship with the package: the same files a person would write."""

from pathlib import Path

_HERE = Path(__file__).parent


def preset_names() -> list[str]:
    """Returns the names of all presets, sorted."""
    return sorted(path.stem for path in _HERE.glob("*.yaml"))


def preset_path(name: str) -> Path:
    """Returns the file of a preset that ``preset_names`` has."""
    return _HERE / f"{name}.yaml"


def preset_summary(name: str) -> str:
    """Returns the first comment line of a preset."""
    lines = preset_path(name).read_text(encoding="utf-8").splitlines()
    return lines[0].lstrip("# ") if lines else ""
