"""From a task's name to the task on the embedded data set, or on an imported one."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from comp.data.images import ImageTransform
from comp.data.imports.draft import read_json
from comp.data.layout import DataSet
from comp.data.openmoji import OpenMoji, load_openmoji
from comp.tasks.base import Task
from comp.tasks.batching import Images, Streamed
from comp.tasks.captioning import CaptioningTask
from comp.tasks.captions import CaptionedImage, stored_captions
from comp.tasks.instruct import InstructTask, make_conversations, stored_conversation
from comp.tasks.names import TASKS, check_kind
from comp.tasks.nlvr import NlvrTask, stored_statement
from comp.tasks.questions import all_answers, make_questions
from comp.tasks.retrieval import RetrievalTask
from comp.tasks.scenes import make_scenes, render_scenes
from comp.tasks.statements import make_statements
from comp.tasks.text import TextTokenizer
from comp.tasks.vqa import VqaTask, stored_question
from comp.words import nearest

_NUM_SAMPLES = {
    "vqa": {"train": 30_000, "val": 3_000, "test": 3_000},
    "nlvr2": {"train": 40_000, "val": 3_000, "test": 3_000},
    "retrieval": {"train": 40_000, "val": 1_000, "test": 1_000},
    "captioning": {"train": 20_000, "val": 1_000, "test": 1_000},
    "instruct": {"train": 30_000, "val": 3_000, "test": 3_000},  # questions
}


def build_task(
    name: str,
    *,
    tokenizer: TextTokenizer,
    image_size: int,
    transform: ImageTransform | None = None,
    data: Path | None = None,
    answers: Sequence[str] | None = None,
    augment: bool = True,
    num_train: int | None = None,
    seed: int = 0,
) -> Task:
    """Builds a task on the embedded data set, or on one that ``comp data import`` wrote.

    An imported set is streamed; it is never whole in memory. It may hold any split alone: only
    ``train_batches`` needs ``train``.

    Args:
        name: One of ``TASKS``.
        tokenizer: The model's tokenizer.
        image_size: Height and width of the images in pixels.
        transform: How the model's images are made; squares with CLIP's mean by default.
        data: A data set in the Parquet layout, a file or a directory; ``None`` means the
            embedded OpenMoji, which is made at the first use.
        answers: Candidate answers of task ``vqa`` on an imported set, instead of the frequent ones
            of its training questions; see ``read_answers``.
        augment: Whether training images vary a little from epoch to epoch.
        num_train: Training samples of the embedded set; ``None`` means the task's usual number.
        seed: Seed of the choice of samples. Results are comparable only between equal seeds.

    Raises:
        ValueError: If the name is unknown, ``data`` holds rows for other tasks, or candidate
            answers are missing or given where none are chosen among.
        FileNotFoundError: If ``data`` does not exist.
    """
    if name not in TASKS:
        raise ValueError(
            f"task must be one of {', '.join(TASKS)}, but got {name!r}"
            + nearest(name, list(TASKS))
        )
    if tokenizer is None:
        raise ValueError(
            f"task {name!r} needs the model's tokenizer, but the model has none; save it in the "
            "model's directory"
        )
    transform = transform or ImageTransform(image_size)
    stored = None if data is None else DataSet(data)
    imported = stored is not None and stored.kind != "drawings"
    if answers is not None and (name != "vqa" or not imported):
        raise ValueError(
            f"answers are the candidates of task 'vqa' on an imported data set, but the task is "
            f"{name!r} on {data or 'the embedded one'}; leave them out"
        )
    if stored is not None and imported:
        images = Images(transform=transform, root=stored.image_root)
        return _stored(
            name, stored, tokenizer, images, answers=answers, augment=augment, limit=num_train
        )
    openmoji = load_openmoji(image_size, path=data)
    openmoji = replace(openmoji, pixels=transform.restated(openmoji.pixels))
    numbers = {**_NUM_SAMPLES[name]}
    if num_train is not None:
        numbers["train"] = num_train
    if name == "vqa":
        return _vqa(openmoji, tokenizer, numbers, augment=augment, seed=seed)
    if name == "retrieval":
        scenes = _scenes(openmoji, numbers, seed)
        return RetrievalTask(*scenes, tokenizer, augment=augment, queue=2_048)
    if name == "captioning":
        return CaptioningTask(*_scenes(openmoji, numbers, seed), tokenizer, augment=augment)
    if name == "instruct":
        return _instruct(openmoji, tokenizer, numbers, augment=augment, seed=seed)
    return _nlvr(openmoji, tokenizer, numbers, augment=augment, seed=seed)


def _stored(
    name: str,
    stored: DataSet,
    tokenizer: TextTokenizer,
    images: Images,
    *,
    answers: Sequence[str] | None,
    augment: bool,
    limit: int | None,
) -> Task:
    """Builds a task on an imported data set; nothing is mirrored, as texts may say left."""
    check_kind(name, stored.kind, stored.path)
    if limit is not None:
        raise ValueError(f"num_train is for the embedded data set, but got {limit} with data")

    def streams(convert: Callable[..., Any]) -> dict[str, Streamed[Any]]:
        return {split: Streamed(rows, convert) for split, rows in stored.splits.items()}

    if name == "nlvr2":
        return NlvrTask(streams(stored_statement), images, tokenizer, augment=augment)
    if name == "retrieval":
        top = 128 if "flickr" in stored.facts.get("source", "").lower() else 256  # BLIP's numbers
        return RetrievalTask(streams(stored_captions), images, tokenizer, augment=augment, top=top)
    if name == "captioning":
        return CaptioningTask(
            streams(stored_captions), images, tokenizer, prompt="a picture of", augment=augment
        )
    if name == "instruct":
        return InstructTask(
            streams(stored_conversation), images, tokenizer, augment=augment, flip=False
        )
    answers = answers or list(json.loads(stored.facts.get("answers", "{}")))
    if not answers:
        raise ValueError(
            f"{stored.path} has no training questions, whose frequent answers would be the "
            "candidates; name candidates (--answers) or import the training files too"
        )
    return VqaTask(
        streams(stored_question), images, answers, tokenizer, augment=augment, flip=False
    )


def read_answers(path: Path) -> list[str]:
    """Returns candidate answers for ``build_task``.

    Args:
        path: A JSON list of answers, as BLIP's ``answer_list.json``, or a data set of questions
            with a training split, whose frequent answers they are.

    Raises:
        ValueError: If it is neither, or an answer is empty or comes twice.
        FileNotFoundError: If there is nothing.
    """
    if path.suffix == ".json":
        answers = read_json(path)
    else:
        answers = list(json.loads(DataSet(path).facts.get("answers", "{}")))
    if not isinstance(answers, list) or not answers:
        raise ValueError(
            f"{path} must hold candidate answers, as a JSON list or as a data set with training "
            "questions, but has none; name such a file"
        )
    seen: set[str] = set()
    for row, answer in enumerate(answers, start=1):
        if not isinstance(answer, str) or not answer.strip() or answer in seen:
            raise ValueError(
                f"{path}, row {row}: an answer must be a text that comes once, "
                f"but got {answer!r:.60}"
            )
        seen.add(answer)
    return answers


def _vqa(
    openmoji: OpenMoji,
    tokenizer: TextTokenizer,
    numbers: dict[str, int],
    *,
    augment: bool,
    seed: int,
) -> VqaTask:
    questions = {
        split: make_questions(openmoji.drawings, split, num_questions=number, seed=seed)
        for split, number in numbers.items()
    }
    answers = all_answers(openmoji.drawings)
    return VqaTask(questions, openmoji.pixels, answers, tokenizer, augment=augment)


def _nlvr(
    openmoji: OpenMoji,
    tokenizer: TextTokenizer,
    numbers: dict[str, int],
    *,
    augment: bool,
    seed: int,
) -> NlvrTask:
    statements = {
        split: make_statements(openmoji.drawings, split, num_statements=number, seed=seed)
        for split, number in numbers.items()
    }
    return NlvrTask(statements, openmoji.pixels, tokenizer, augment=augment)


def _scenes(
    openmoji: OpenMoji, numbers: dict[str, int], seed: int
) -> tuple[dict[str, list[CaptionedImage]], Callable[[Sequence[Any]], Tensor]]:
    """Scenes as captioned images, and what draws them."""
    samples = {
        split: [
            CaptionedImage(scene, scene.captions, index)
            for index, scene in enumerate(
                make_scenes(openmoji.drawings, split, num_scenes=number, seed=seed)
            )
        ]
        for split, number in numbers.items()
    }

    def images(scenes: Sequence[Any]) -> Tensor:
        return render_scenes(scenes, openmoji.pixels)

    return samples, images


def _instruct(
    openmoji: OpenMoji,
    tokenizer: TextTokenizer,
    numbers: dict[str, int],
    *,
    augment: bool,
    seed: int,
) -> InstructTask:
    conversations = {
        split: make_conversations(
            make_questions(openmoji.drawings, split, num_questions=number, seed=seed)
        )
        for split, number in numbers.items()
    }
    return InstructTask(conversations, openmoji.pixels, tokenizer, augment=augment)
