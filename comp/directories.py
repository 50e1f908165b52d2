"""Directories that are there when they are complete, or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def refuse_existing(out: Path) -> None:
    """Refuses to write into what is there already.

    Raises:
        FileExistsError: If ``out`` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or name another directory")


@contextmanager
def complete_directory(out: Path) -> Iterator[Path]:
    """Gives a hidden directory beside ``out`` that takes its name when the block ends well.

    Args:
        out: The directory to make; its parents are made too.

    Raises:
        FileExistsError: If ``out`` exists.
    """
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        part.chmod(0o755)
        yield part
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
