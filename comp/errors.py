"""Errors that a caller would want to catch by name."""

from collections.abc import Sequence


class UnsupportedModelError(ValueError):
    """The model's class has no adapter under ``comp/models``."""


class BudgetUnreachable(ValueError):
    """The asked ratio cannot be reached with the kept minima.

    Attributes:
        highest: The highest FLOPs ratio that was reached.
    """

    def __init__(self, message: str, highest: float) -> None:
        super().__init__(message)
        self.highest = highest


class NanLoss(RuntimeError):
    """The training loss stopped being a finite number.

    Attributes:
        stage: The stage in which it happened; the one before is the last good one. ``None`` while
            fine-tuning, which leaves the trajectory as it was.
    """

    def __init__(self, message: str, stage: int | None) -> None:
        super().__init__(message)
        self.stage = stage


class CheckpointMismatch(ValueError):
    """Saved files do not belong together or to this model."""


def misfit(
    model_class: str, missing: Sequence[str], unexpected: Sequence[str], wrong: Sequence[str]
) -> str:
    """Says how the tensors of a file differ from those of a model, the first few by name."""
    parts = []
    for what, names in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", wrong),
    ):
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            parts.append(f"{len(names)} {what} ({shown})")
    return (
        f"does not fit the model, a {model_class}: of its tensors are {', '.join(parts)}; pass "
        "weights of that class"
    )


class WorkerLost(RuntimeError):
    """Another process that prunes the same model is gone, so that this one cannot go on."""
