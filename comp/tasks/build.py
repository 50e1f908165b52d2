"""From a task's name to the task on the embedded data set."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from comp.config import nearest
from comp.data.openmoji import OpenMoji, load_openmoji
from comp.tasks.base import Task
from comp.tasks.instruct import InstructTask, make_conversations
from comp.tasks.names import TASKS
from comp.tasks.nlvr import NlvrTask
from comp.tasks.questions import all_answers, make_questions
from comp.tasks.retrieval import RetrievalTask
from comp.tasks.scenes import make_scenes, render_scenes
from comp.tasks.statements import make_statements
from comp.tasks.text import TextTokenizer
from comp.tasks.vqa import VqaTask

_NUM_SAMPLES = {
    "vqa": {"train": 30_000, "val": 3_000, "test": 3_000},
    "nlvr2": {"train": 40_000, "val": 3_000, "test": 3_000},
    "retrieval": {"train": 20_000, "val": 1_000, "test": 1_000},
    "instruct": {"train": 30_000, "val": 3_000, "test": 3_000},  # questions
}


def build_task(
    name: str,
    *,
    tokenizer: TextTokenizer,
    image_size: int,
    data: Path | None = None,
    augment: bool = True,
    num_train: int | None = None,
    seed: int = 0,
) -> Task:
    """Builds a task on the embedded data set.

    Args:
        name: One of ``TASKS``.
        tokenizer: The model's tokenizer.
        image_size: Height and width of the images in pixels.
        data: An OpenMoji file in the Parquet layout; ``None`` means the cached one, which is
            made at the first use.
        augment: Whether training images vary a little from epoch to epoch.
        num_train: Training samples; ``None`` means the task's usual number.
        seed: Seed of the choice of samples. Results are comparable only between equal seeds.

    Raises:
        ValueError: If the name is unknown or ``data`` is another data set.
        FileNotFoundError: If ``data`` does not exist.
    """
    if name not in TASKS:
        raise ValueError(
            f"task must be one of {', '.join(TASKS)}, but got {name!r}"
            + nearest(name, list(TASKS))
        )
    openmoji = load_openmoji(image_size, path=data)
    numbers = {**_NUM_SAMPLES[name]}
    if num_train is not None:
        numbers["train"] = num_train
    if name == "vqa":
        return _vqa(openmoji, tokenizer, numbers, augment=augment, seed=seed)
    if name == "retrieval":
        return _retrieval(openmoji, tokenizer, numbers, augment=augment, seed=seed)
    if name == "instruct":
        return _instruct(openmoji, tokenizer, numbers, augment=augment, seed=seed)
    return _nlvr(openmoji, tokenizer, numbers, augment=augment, seed=seed)


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


def _retrieval(
    openmoji: OpenMoji,
    tokenizer: TextTokenizer,
    numbers: dict[str, int],
    *,
    augment: bool,
    seed: int,
) -> RetrievalTask:
    scenes = {
        split: make_scenes(openmoji.drawings, split, num_scenes=number, seed=seed)
        for split, number in numbers.items()
    }

    def images(split: str, indexes: Sequence[int]) -> Tensor:
        return render_scenes([scenes[split][index] for index in indexes], openmoji.pixels)

    captions = {split: [scene.captions for scene in made] for split, made in scenes.items()}
    return RetrievalTask(captions, images, tokenizer, augment=augment)


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
