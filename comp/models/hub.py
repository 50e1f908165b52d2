"""From a name to a directory on this disk: a directory, or a repository of the Hugging Face hub.

Local first: a repository that is in the hub's cache is read from there and the network is not
asked. Only data is ever fetched, no code.
"""

import re
from pathlib import Path

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DATA = ("*.json", "*.safetensors", "*.txt", "*.model")
_PICKLES = ("*.bin",)


def is_repository(source: str) -> bool:
    """Whether a text names a repository of the hub, ``owner/name``, and nothing on this disk."""
    return _REPOSITORY.fullmatch(source) is not None and not Path(source).exists()


def find_repository(source: str, *, files: tuple[str, ...] = _DATA) -> Path:
    """Returns the directory of a repository in the hub's cache, after fetching it if need be.

    Weights that are there as pickles only are fetched too; they are read as data.

    Args:
        source: ``owner/name``.
        files: Patterns of the files that are needed.

    Raises:
        ValueError: If it is neither in the cache nor to be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        path = Path(snapshot_download(source, allow_patterns=list(files)))
        if files == _DATA and not list(path.glob("*.safetensors")):
            path = Path(snapshot_download(source, allow_patterns=[*files, *_PICKLES]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{source!r} is not in the cache of the Hugging Face hub and could not be fetched "
            f"({reason}); download it on a machine with a network and pass its directory"
        ) from error
    return path
