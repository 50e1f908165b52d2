"""VQAv2's official questions and annotations; also VQA v1's, which have the same form.

Source: https://visualqa.org/download.html
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comp.data.imports.draft import Draft, hold_out, not_empty, read_json, take

KIND = "questions"
# The published validation set is what people report on, so it is the test here, and validation
# is held out of training. The answers of the test sets are secret: the server judges them.
_SPLITS = {"train2014": "train", "val2014": "test", "test2015": "server", "test-dev2015": "server"}


def read(sources: Sequence[Path], *, holdout: float) -> list[Draft]:
    """Returns one row for each question.

    Args:
        sources: Files of questions and of annotations in any order.
        holdout: Share of the training images whose questions become the validation split.

    Raises:
        ValueError: If a file is not of this format, or questions and annotations do not match.
    """
    questions: dict[str, tuple[Path, Sequence[Any]]] = {}
    answers: dict[str, tuple[Path, Sequence[Any]]] = {}
    for path in sources:
        content = read_json(path)
        is_answers = isinstance(content, dict) and "annotations" in content
        subset = take(content, "data_subtype", str, path.name)
        if subset not in _SPLITS:
            raise ValueError(
                f"{path.name}: field 'data_subtype' must be one of {', '.join(_SPLITS)}, "
                f"but got {subset!r}"
            )
        target = answers if is_answers else questions
        if subset in target:
            raise ValueError(
                f"{path.name} and {target[subset][0].name} both are of {subset}; pass one of them"
            )
        name = "annotations" if is_answers else "questions"
        target[subset] = path, not_empty(take(content, name, list, path.name), path)
    drafts = []
    for subset, (path, entries) in questions.items():
        if subset not in answers and _SPLITS[subset] != "server":
            raise ValueError(
                f"{path.name} needs its annotations; pass v2_mscoco_{subset}_annotations.json too"
            )
        given = _by_question(*answers.pop(subset)) if subset in answers else None
        drafts += _rows(path, entries, subset, given)
    for path, _ in answers.values():
        raise ValueError(f"{path.name} answers no question file; pass its questions too")
    return hold_out(drafts, holdout, "val")


@dataclass(frozen=True)
class _Given:
    """What people answered to a question, and about which image the file says they were asked."""

    answers: Counter[str]
    image: int


def _by_question(path: Path, entries: Sequence[Any]) -> tuple[Path, dict[int, _Given]]:
    found: dict[int, _Given] = {}
    for number, entry in enumerate(entries, start=1):
        where = f"{path.name}, row {number}"
        said = take(entry, "answers", list, where)
        question = take(entry, "question_id", int, where)
        if not said:
            raise ValueError(f"{where}: field 'answers' is empty; VQA has ten answers a question")
        if question in found:
            raise ValueError(
                f"{where}: question_id {question} was answered before; a question comes once"
            )
        told = Counter(take(one, "answer", str, where) for one in said)
        found[question] = _Given(told, take(entry, "image_id", int, where))
    return path, found


def _rows(
    path: Path,
    entries: Sequence[Any],
    subset: str,
    given: tuple[Path, Mapping[int, _Given]] | None,
) -> list[Draft]:
    folder = "test2015" if subset.startswith("test") else subset
    drafts = []
    for number, entry in enumerate(entries, start=1):
        where = f"{path.name}, row {number}"
        question = take(entry, "question_id", int, where)
        image = take(entry, "image_id", int, where)
        name = f"COCO_{folder}_{image:012d}.jpg"
        said: Counter[str] = Counter()
        if given is not None:
            if question not in given[1]:
                raise ValueError(
                    f"{where}: question_id {question} is not in {given[0].name}; "
                    "pass the annotations of these questions"
                )
            said = given[1][question].answers
            if given[1][question].image != image:
                raise ValueError(
                    f"{where}: question_id {question} is about image {image}, but "
                    f"{given[0].name} answers it about image {given[1][question].image}; "
                    "pass the annotations of these questions"
                )
        ranked = sorted(said.items(), key=lambda item: (-item[1], item[0]))
        drafts.append(
            Draft(
                id=str(question),
                split=_SPLITS[subset],
                where=where,
                images=[[f"{folder}/{name}", name]],
                texts=[take(entry, "question", str, where)],
                labels=[answer for answer, _ in ranked],
                counts=[count for _, count in ranked],
            )
        )
    if given is not None and len(given[1]) != len(entries):
        raise ValueError(
            f"{given[0].name} answers {len(given[1])} questions, but {path.name} has "
            f"{len(entries)}; pass the annotations of these questions"
        )
    return drafts
