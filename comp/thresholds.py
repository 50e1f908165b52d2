"""The search for token thresholds: how far to raise them so that a given share of FLOPs goes.

All searches of a stage run on the same samples from the same start, which is measured once.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

from comp.evaluation import measure_cost
from comp.handle import PruningHandle
from comp.modes import Stream
from comp.tasks.base import Batch, Task

MAX_PROBES = 12
MAX_THRESHOLD = 64.0


class ThresholdSearch:
    """Measures what a model would cost under other thresholds than it has now.

    Args:
        handle: The model's handle; masks and thresholds must stay as they are meanwhile.
        task: Runs the passes.
        batches: Gives the probe samples, the same every time, on the model's device.
        mixed: Run in bfloat16 autocast.
    """

    def __init__(
        self,
        handle: PruningHandle,
        task: Task,
        batches: Callable[[], Iterable[Batch]],
        *,
        mixed: bool = False,
    ) -> None:
        self._handle, self._task, self._batches = handle, task, batches
        self._mixed = mixed

    @cached_property
    def start(self) -> float:
        """Mean multiply-adds of the probe samples under the thresholds of now."""
        return self._macs({})

    def obtainable(self, stream: Stream) -> float:
        """Multiply-adds that go when a stream keeps its fewest tokens."""
        return self.start - self._macs({stream: math.inf})

    def raise_by(
        self, streams: Sequence[Stream], quantum: float, *, coarse: bool = False
    ) -> tuple[dict[Stream, float], float]:
        """Searches one increment for the thresholds of some streams by bisection.

        Args:
            streams: The streams.
            quantum: Multiply-adds to remove.
            coarse: Prefer a step that overshoots by far to one that drops nothing.

        Returns:
            The new thresholds and the measured drop in mean multiply-adds, nearest to
            [quantum, 1.1 quantum] among the probes; thresholds never fall.
        """
        old = {stream: self._handle.thresholds.get(stream, 0.0) for stream in streams}
        low, high, width = 0.0, math.inf, 0.1
        best: tuple[float, float, float] | None = None
        for _ in range(MAX_PROBES):
            step = (low + high) / 2 if math.isfinite(high) else width
            drop = self.start - self._macs({stream: theta + step for stream, theta in old.items()})
            miss = max(quantum - drop, drop - 1.1 * quantum, 0.0)
            if coarse and drop <= 0:
                miss = math.inf
            if best is None or miss < best[0]:
                best = (miss, step, drop)
            if miss == 0:
                break
            if drop < quantum:
                low, width = step, 2 * step
                if not math.isfinite(high) and width > MAX_THRESHOLD:
                    break
            else:
                high = step
        assert best is not None
        return {stream: theta + best[1] for stream, theta in old.items()}, best[2]

    def settle(self, target: float, tolerance: float) -> dict[Stream, float]:
        """Searches one factor for all thresholds by bisection; they may fall as well as rise.

        Args:
            target: Mean multiply-adds that the probe samples are to cost.
            tolerance: Multiply-adds by which they may miss it.

        Returns:
            The thresholds of the probe nearest to the target.
        """
        old = self._handle.thresholds
        low, high, factor, macs = 0.0, math.inf, 1.0, self.start
        best = (abs(macs - target), factor)
        for _ in range(MAX_PROBES if any(old.values()) else 0):
            if best[0] <= tolerance:
                break
            low, high = (factor, high) if macs > target else (low, factor)
            factor = (low + high) / 2 if math.isfinite(high) else 1.5 * factor
            macs = self._macs({stream: theta * factor for stream, theta in old.items()})
            best = min(best, (abs(macs - target), factor))
        return {stream: theta * best[1] for stream, theta in old.items()}

    def _macs(self, thresholds: Mapping[Stream, float]) -> float:
        with self._handle.with_thresholds({**self._handle.thresholds, **thresholds}):
            return measure_cost(
                self._handle.model, self._task, self._batches(), mixed=self._mixed
            ).macs
