"""The embedded data set and its tokenizer, made once for all tests of comp."""

from pathlib import Path
from typing import Any

import pytest

from comp.data.openmoji import OpenMoji, build_openmoji, load_openmoji


@pytest.fixture(scope="session")
def openmoji_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A freshly built OpenMoji file at 64 px."""
    path = tmp_path_factory.mktemp("data") / "openmoji.parquet"
    build_openmoji(path)
    return path


@pytest.fixture(scope="session")
def openmoji(openmoji_file: Path) -> OpenMoji:
    """All drawings and their pixels."""
    return load_openmoji(path=openmoji_file)


@pytest.fixture(scope="session")
def tokenizer(openmoji: OpenMoji) -> Any:
    """The tokenizer of the embedded tasks."""
    from comp.tasks import build_tokenizer

    return build_tokenizer(drawings=openmoji.drawings)
