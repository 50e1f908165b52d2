"""The names of the tasks; no torch in here, so that a command line can check them at once."""

from pathlib import Path

TASKS = ("vqa", "nlvr2", "retrieval", "captioning", "instruct")

METRIC_NAMES = {
    "vqa": "accuracy",
    "nlvr2": "accuracy",
    "retrieval": "mean R@1",
    "captioning": "CIDEr",
    "instruct": "exact match",
}
"""What the tasks call their metric (``Task.metric_name``), for axes."""

KIND_OF_ROWS = {
    "vqa": "questions",
    "nlvr2": "statements",
    "retrieval": "captions",
    "captioning": "captions",
    "instruct": "conversations",
}
"""What an imported data set must hold for a task; ``drawings`` serve all of them."""


def check_kind(task: str, kind: str, path: Path) -> None:
    """Refuses a data set whose rows are for other tasks.

    Args:
        task: One of ``TASKS``.
        kind: The data set's kind of rows.
        path: Where it lies.

    Raises:
        ValueError: If the task does not read such rows.
    """
    if kind not in ("drawings", KIND_OF_ROWS.get(task)):
        known = ", ".join(f"{name} reads {rows}" for name, rows in KIND_OF_ROWS.items())
        raise ValueError(
            f"{path} holds {kind or 'rows of no kind'}, which task {task!r} does not read; {known}"
        )
