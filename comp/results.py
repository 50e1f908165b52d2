"""What a pruning run yields: one record per stage, one point per ratio. No torch in here."""

import base64
import sys
import zlib
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self


def _plain(record: Any) -> dict[str, Any]:
    """``dataclasses.asdict`` for fields that are flat, at a tenth of its time."""
    return {k: dict(v) if isinstance(v, dict) else v for k, v in vars(record).items()}


def pack_outcomes(values: Iterable[float]) -> str:
    """Returns numbers as text: float32, little-endian, zlib, Base64; 300 bytes for 1,000."""
    numbers = array("f", values)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(zlib.compress(numbers.tobytes(), 9)).decode()


def unpack_outcomes(text: str) -> list[float]:
    """Returns the numbers that ``pack_outcomes`` was given, in single precision.

    Raises:
        ValueError: If the text is none of its.
    """
    numbers = array("f")
    try:
        numbers.frombytes(zlib.decompress(base64.b64decode(text, validate=True)) if text else b"")
    except (ValueError, zlib.error) as error:
        raise ValueError(f"outcomes must be text from pack_outcomes, but got {text!r}") from error
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


@dataclass(frozen=True)
class StageRecord:
    """One finished stage.

    Attributes:
        stage: 1 for the first stage.
        mode: The mode that was pruned (a ``PruningMode`` value, or several joined with ``+``).
        choice: Why: ``sweep``, ``explore``, ``greedy`` or ``fixed``.
        ratio: FLOPs ratio measured after the stage, in [0, 1).
        macs: Mean multiply-adds per validation sample after the stage.
        params: Parameters of the physically smaller model.
        val: Task metric on the fixed validation subset, higher is better.
        val_loss: Loss on the same subset.
        train_loss: Mean training loss of the stage.
        cost: Accuracy lost per share of dense FLOPs removed (r of Eq. 8).
        mode_cost: The smoothed cost of the mode after this stage (R of Eq. 10).
        threshold: The mode's new threshold: theta of a token mode, or the standard score of the
            last pruned unit.
        units: Heads and channels that the stage selected, less those that came back (``regrow``).
        tokens: Mean tokens that leave the last layer, by stream.
        seconds: Wall time of the stage.
        snapshot: The asked ratio that this stage reached, else ``None``.
        layers: What is left in every layer, see ``CurvePoint``.
        train_seconds: Wall time of the stage's training steps, a part of ``seconds``.
        eval_seconds: Wall time of the evaluation behind ``val`` and ``cost``, another part. The
            rest is the search for what to prune.
        refreshed: New costs of modes that had been idle for ``refresh_after`` stages, measured
            before this stage's mode was chosen.
    """

    stage: int
    mode: str
    choice: str
    ratio: float
    macs: float
    params: int
    val: float
    val_loss: float
    train_loss: float
    cost: float
    mode_cost: float
    threshold: float
    units: int
    tokens: dict[str, float]
    seconds: float
    snapshot: float | None = None
    layers: dict[str, float] = field(default_factory=dict)
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    refreshed: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; ``from_dict`` is the inverse."""
        return _plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuilds a record from ``to_dict``'s output."""
        return cls(**values)


@dataclass(frozen=True)
class CurvePoint:
    """One point of an accuracy-versus-ratio curve, or the dense model at ratio 0.

    Attributes:
        model: Name of the model preset or checkpoint.
        task: Name of the task.
        method: Method id, ``"dense"`` for the dense model.
        seed: Seed of the run.
        ratio_asked: The FLOPs ratio that was asked for.
        ratio_reached: The FLOPs ratio measured on the validation subset.
        gmacs: Mean giga multiply-adds per sample (what the field's papers call GFLOPs).
        params: Parameters of the shrunk model.
        val: Task metric on the validation subset.
        test: Task metric on the test split, read once.
        val_before_tuning: Validation metric after the shrink and before fine-tuning.
        latency_ms: Median latency of one evaluation batch.
        dense_latency_ms: The same for the dense model, interleaved in the same process.
        fine_tuned: Steps of fine-tuning behind the point.
        fine_tune_seconds: Wall time of that fine-tuning with its validations.
        test_ratio: The FLOPs ratio measured on the test split.
        layers: What is left in every layer: heads, channels, cross-attention heads and the mean
            tokens that leave it, by ``encoder.layer.part``, for example ``vision.3.heads``.
        details: What else papers report of the test split, by name.
        outcomes: The metric of every test sample, each in [0, 1] and in the order of the split, as
            ``unpack_outcomes`` reads it; empty where ``test`` is not their mean. With it two
            models are compared sample by sample.
    """

    model: str
    task: str
    method: str
    seed: int
    ratio_asked: float
    ratio_reached: float
    gmacs: float
    params: int
    val: float
    test: float
    val_before_tuning: float
    latency_ms: float
    dense_latency_ms: float
    fine_tuned: int
    test_ratio: float
    layers: dict[str, float] = field(default_factory=dict)
    details: dict[str, float] = field(default_factory=dict)
    outcomes: str = field(default="", repr=False)
    fine_tune_seconds: float = 0.0

    @property
    def speed_up(self) -> float:
        """Dense latency over this point's latency."""
        return self.dense_latency_ms / self.latency_ms

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; ``from_dict`` is the inverse."""
        return _plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuilds a point from ``to_dict``'s output."""
        return cls(**values)


@dataclass(frozen=True)
class Snapshot:
    """A place on a trajectory: an asked ratio is reached, and its fine-tuning may begin.

    Attributes:
        ratio: The asked ratio.
    """

    ratio: float


@dataclass
class PruningResult:
    """Everything that ``comp.prune`` returns.

    Attributes:
        model: The most pruned model, shrunk and fine-tuned; ``save_pretrained`` writes it.
        stages: One record per stage.
        points: The dense model first, then one point per asked ratio.
    """

    model: Any
    stages: list[StageRecord] = field(default_factory=list)
    points: list[CurvePoint] = field(default_factory=list)

    def __str__(self) -> str:
        return format_points(self.points)


_COLUMNS: tuple[tuple[str, Callable[[CurvePoint], str]], ...] = (
    ("ratio", lambda p: f"{p.ratio_reached:.3f}"),
    ("GFLOPs*", lambda p: f"{p.gmacs:.4g}"),
    ("params", lambda p: f"{p.params / 1e6:.3g} M"),
    ("val", lambda p: f"{p.val:.2f}"),
    ("test", lambda p: f"{p.test:.2f}"),
    ("latency", lambda p: f"{p.dense_latency_ms:.1f} -> {p.latency_ms:.1f} ms"),
    ("speed-up", lambda p: f"{p.speed_up:.2f}x"),
)


def format_points(points: list[CurvePoint]) -> str:
    """Formats points as a text table, with the counting convention below it."""
    rows = [[name for name, _ in _COLUMNS]]
    rows += [[show(point) for _, show in _COLUMNS] for point in points]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, "* multiply-add = 1"])
