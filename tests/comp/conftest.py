"""The embedded data set and its tokenizer, made once for all tests of comp."""

from pathlib import Path
from typing import Any

import pytest

from comp.data.openmoji import OpenMoji, load_openmoji, openmoji_path


@pytest.fixture(scope="session")
def openmoji_file() -> Path:
    """OpenMoji at 64 px, built by this version of the code (its number is in the name)."""
    return openmoji_path()


@pytest.fixture(scope="session")
def openmoji(openmoji_file: Path) -> OpenMoji:
    """All drawings and their pixels."""
    return load_openmoji(path=openmoji_file)


@pytest.fixture(scope="session")
def tokenizer(openmoji: OpenMoji) -> Any:
    """The tokenizer of the embedded tasks."""
    from comp.tasks import build_tokenizer

    return build_tokenizer(drawings=openmoji.drawings)
