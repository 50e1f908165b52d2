"""Writing tensors to a file that others may read."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a safetensors file with the permissions that any new file would have.

    What is there is replaced and keeps its permissions. Safetensors 0.8 by itself lets nobody but
    the owner read what it writes (its issue 782), so that a model on a shared disk loads for one.

    Args:
        tensors: Contiguous tensors on the CPU, none sharing memory with another.
        path: The file.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)
