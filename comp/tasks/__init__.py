"""Tasks by name: each brings its data, its batches, its loss and its metric.

Names are resolved on first use, so that ``comp.tasks.names`` needs no torch.
"""

from typing import TYPE_CHECKING, Any

from comp.lazy import resolve
from comp.tasks.names import TASKS

if TYPE_CHECKING:
    from comp.tasks.base import Batch, Evaluation, SplitTask, Task
    from comp.tasks.build import build_task
    from comp.tasks.instruct import InstructTask
    from comp.tasks.nlvr import NlvrTask
    from comp.tasks.retrieval import RetrievalTask
    from comp.tasks.text import build_tokenizer
    from comp.tasks.vqa import VqaTask

_HOMES = {
    "Batch": "comp.tasks.base",
    "Evaluation": "comp.tasks.base",
    "InstructTask": "comp.tasks.instruct",
    "NlvrTask": "comp.tasks.nlvr",
    "RetrievalTask": "comp.tasks.retrieval",
    "SplitTask": "comp.tasks.base",
    "Task": "comp.tasks.base",
    "VqaTask": "comp.tasks.vqa",
    "build_task": "comp.tasks.build",
    "build_tokenizer": "comp.tasks.text",
}

__all__ = [
    "TASKS",
    "Batch",
    "Evaluation",
    "InstructTask",
    "NlvrTask",
    "RetrievalTask",
    "SplitTask",
    "Task",
    "VqaTask",
    "build_task",
    "build_tokenizer",
]


def __getattr__(name: str) -> Any:
    return resolve(__name__, name, _HOMES)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
