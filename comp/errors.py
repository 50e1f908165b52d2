"""Errors that a caller would want to catch by name."""


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


class WorkerLost(RuntimeError):
    """Another process that prunes the same model is gone, so that this one cannot go on."""
