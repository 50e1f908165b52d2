"""LLaVA's instructions: conversations of ``human`` and ``gpt``, most of them about an image.

Source: https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comp.data.imports.draft import Draft, hold_out, not_empty, read_json, take

KIND = "conversations"
MARKER = "<image>"


def read(sources: Sequence[Path], *, holdout: float) -> list[Draft]:
    """Returns one row for each conversation; ``val`` and ``test`` are held out of it.

    The marker goes, as LLaVA puts the image first wherever it stood.

    Args:
        sources: The files.
        holdout: Share of the images (or texts without one) for validation, and for the test.

    Raises:
        ValueError: If a file is not of this format.
    """
    drafts, seen = [], Counter[str]()
    for path in sources:
        content = read_json(path)
        if not isinstance(content, list):
            raise ValueError(
                f"{path.name} must hold a list of conversations, but is {type(content).__name__}; "
                "is it the right file?"
            )
        for number, entry in enumerate(not_empty(content, path), start=1):
            where = f"{path.name}, row {number}"
            turns = [_turn(one, where) for one in take(entry, "conversations", list, where)]
            if turns and turns[0][0] == "gpt":
                turns = turns[1:]  # LLaVA drops it too: nobody asked for it
            image = take(entry, "image", str, where) if entry.get("image") else ""
            asked = [text for speaker, text in turns if speaker == "human"]
            name = str(entry.get("id", number))
            seen[name] += 1
            drafts.append(
                Draft(
                    id=name if seen[name] == 1 else f"{name}#{seen[name]}",
                    split="train",
                    where=where,
                    images=[[image]] if image else [],
                    texts=[text.replace(MARKER, "").strip() for text in asked],
                    labels=[text for speaker, text in turns if speaker == "gpt"],
                    fault=_fault(turns, bool(image)),
                )
            )
    return hold_out(drafts, holdout, "val", "test")


def _turn(turn: Any, where: str) -> tuple[str, str]:
    speaker = take(turn, "from", str, where)
    if speaker not in ("human", "gpt"):
        raise ValueError(f"{where}: field 'from' must be human or gpt, but got {speaker!r}")
    return speaker, take(turn, "value", str, where).strip()


def _fault(turns: Sequence[tuple[str, str]], has_image: bool) -> str:
    speakers = [speaker for speaker, _ in turns]
    if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
        return "its turns must be human and gpt by turns and end with gpt"
    markers = sum(text.count(MARKER) for speaker, text in turns if speaker == "human")
    if markers != has_image:
        return f"it has {markers} {MARKER} markers for {int(has_image)} images"
    return ""
