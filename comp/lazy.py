"""Names that are imported on first use, and quickly."""

import contextlib
import gc
from collections.abc import Iterator
from importlib import import_module
from typing import Any


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Keeps Python from looking for garbage where all objects stay, as those of an import do.

    It saves an eighth of the time of importing torch and transformers, and a fifth of reading a
    large study. Also a decorator.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def resolve(package: str, name: str, homes: dict[str, str]) -> Any:
    """What a package's ``__getattr__`` returns.

    Args:
        package: Name of the package.
        name: The attribute that was asked for.
        homes: The module in which each public name is defined.

    Raises:
        AttributeError: If the name is not public.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    with without_collection():
        return getattr(import_module(homes[name]), name)
