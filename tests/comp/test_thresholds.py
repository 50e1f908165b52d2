"""The search for token thresholds: what it finds, and how often it measures."""

from collections.abc import Iterator

import pytest

from comp.handle import PruningHandle
from comp.models import attach
from comp.modes import Stream
from comp.tasks.base import Batch
from comp.thresholds import MAX_PROBES, ThresholdSearch
from tests.tiny import FAMILIES, TinyTask

NLVR = FAMILIES["blip-nlvr"]


class Counted:
    """A search on a tiny model, and how many times it went over the samples."""

    def __init__(self) -> None:
        self.passes = 0
        self.handle: PruningHandle = attach(NLVR.build(0))
        self.search = ThresholdSearch(self.handle, TinyTask(NLVR, samples=4), self._batches)

    def _batches(self) -> Iterator[Batch]:
        self.passes += 1
        yield NLVR.batch(4, 0)


def test_the_start_is_measured_once_for_all_searches_of_a_stage() -> None:
    counted = Counted()
    assert counted.search.start > 0
    counted.search.obtainable(Stream.VISION)
    counted.search.obtainable(Stream.TEXT)
    assert counted.passes == 3


def test_a_quantum_that_can_be_met_is_met_within_a_tenth() -> None:
    counted = Counted()
    quantum = 0.3 * counted.search.obtainable(Stream.VISION)
    before = counted.passes
    thresholds, drop = counted.search.raise_by([Stream.VISION], quantum)
    assert quantum <= drop <= 1.1 * quantum
    assert counted.passes - before <= MAX_PROBES
    counted.handle.thresholds = thresholds
    again = ThresholdSearch(counted.handle, TinyTask(NLVR, samples=4), counted._batches)
    assert again.start == counted.search.start - drop


def test_thresholds_never_fall() -> None:
    counted = Counted()
    counted.handle.thresholds = {Stream.VISION: 0.8}
    thresholds, _ = counted.search.raise_by([Stream.VISION, Stream.TEXT], 1.0)
    assert thresholds[Stream.VISION] > 0.8
    assert thresholds[Stream.TEXT] > 0


def test_searching_leaves_the_thresholds_as_they_are() -> None:
    counted = Counted()
    counted.handle.thresholds = {Stream.VISION: 0.5}
    counted.search.obtainable(Stream.VISION)
    assert counted.handle.thresholds == {Stream.VISION: 0.5}


def test_more_than_there_is_gives_what_there_is() -> None:
    counted = Counted()
    everything = counted.search.obtainable(Stream.TEXT)
    _, drop = counted.search.raise_by([Stream.TEXT], 2 * everything)
    assert drop == pytest.approx(everything)
