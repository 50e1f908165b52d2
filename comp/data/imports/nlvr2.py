"""NLVR2's official JSON lines: ``identifier``, ``label``, ``sentence``.

Source: https://github.com/lil-lab/nlvr/tree/master/nlvr2
"""

from collections.abc import Sequence
from pathlib import Path

from comp.data.imports.draft import Draft, not_empty, read_json_lines, take

KIND = "statements"
_SPLITS = {"train": "train", "dev": "val", "test1": "test", "test2": "test"}


def read(sources: Sequence[Path], *, holdout: float) -> list[Draft]:
    """Returns the rows of ``train.json``, ``dev.json`` and ``test1.json``.

    Args:
        sources: The files in any order.
        holdout: Not used: NLVR2 brings a validation split.

    Raises:
        ValueError: If a file is not of this format.
    """
    drafts, tests = [], set()
    for path in sources:
        for where, entry in not_empty(list(read_json_lines(path)), path):
            identifier = take(entry, "identifier", str, where)
            parts = identifier.split("-")
            if len(parts) != 4 or parts[0] not in _SPLITS:
                raise ValueError(
                    f"{where}: field 'identifier' must be split-set-pair-sentence with a split "
                    f"of {', '.join(_SPLITS)}, but got {identifier!r}"
                )
            tests |= {parts[0]} & {"test1", "test2"}
            if len(tests) == 2:
                raise ValueError(f"{where} is of another test set; import test1 or test2 alone")
            label = str(entry.get("label")).lower()
            if label not in ("true", "false"):
                raise ValueError(
                    f"{where}: field 'label' must be True or False, but got {entry.get('label')!r}"
                )
            names = [f"{'-'.join(parts[:3])}-img{side}.png" for side in (0, 1)]
            folders = _folders(parts[0], str(entry.get("directory", "")))
            drafts.append(
                Draft(
                    id=identifier,
                    split=_SPLITS[parts[0]],
                    where=where,
                    images=[[folder + name for folder in folders] for name in names],
                    texts=[take(entry, "sentence", str, where)],
                    labels=[label],
                )
            )
    return drafts


def _folders(split: str, directory: str) -> list[str]:
    """Flat, by split, or by split and the row's ``directory``, as the archives unpack."""
    homes = ["", f"{split}/", f"images/{split}/"]
    return [*homes, *(f"{home}{directory}/" for home in homes if directory)]
