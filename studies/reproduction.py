"""The tables of docs/results.md: every setting of a study, against the best baseline.

Everything is made from the two small files of ``studies.collection``, so that whoever has the
repository can make the tables again without running anything.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from comp.results import unpack_outcomes
from studies.collection import Collected, key_of
from studies.curves import Spread, spread
from studies.paired import Difference, paired_difference, sampled_difference

Settings = dict[str, list[dict[str, Any]]]
"""Points by setting."""


@dataclass(frozen=True)
class ResultRow:
    """One setting at one ratio.

    Attributes:
        study: Name of the study.
        data: What it was measured on.
        model: What was pruned.
        task: Name of the task.
        method: The setting: method id, or the switches that the study varies.
        is_own: Whether the setting is what is put to the test and so no baseline: CoMP, CIM
            without MPS, or ``comp_plus``.
        ratio_asked: The FLOPs ratio that was asked for.
        ratio_reached: Mean of the ratios reached.
        seeds: The seeds behind it, ascending.
        stages: Mean stages of whole runs, each of which trains for the same steps.
        val: Validation metric over the seeds.
        test: Test metric over the seeds.
        baseline: The setting that it is compared with: trial 0 where a study lists changes to
            that, else of all that are not the paper's own the best by mean validation metric at
            this ratio.
        difference: Test metric minus the baseline's, over shared seeds and test samples, or over
            seeds alone where the metric is no mean over samples; ``None`` for the baseline itself.
    """

    study: str
    data: str
    model: str
    task: str
    method: str
    is_own: bool
    ratio_asked: float
    ratio_reached: float
    seeds: tuple[int, ...]
    stages: float
    val: Spread
    test: Spread
    baseline: str
    difference: Difference | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the row of ``docs/results.json``."""
        return {
            "study": self.study,
            "data": self.data,
            "model": self.model,
            "task": self.task,
            "method": self.method,
            "ratio_asked": self.ratio_asked,
            "ratio_reached": round(self.ratio_reached, 4),
            "seeds": len(self.seeds),
            "stages": round(self.stages, 2),
            "val_mean": round(self.val.mean, 3),
            "val_std": round(self.val.std, 3),
            "test_mean": round(self.test.mean, 3),
            "test_std": round(self.test.std, 3),
            "baseline": self.baseline,
            **_interval(self.difference),
        }


def _interval(difference: Difference | None) -> dict[str, float | None]:
    names = {"diff_to_best_baseline": "mean", "diff_ci_low": "low", "diff_ci_high": "high"}
    return {key: _rounded(getattr(difference, name, None)) for key, name in names.items()}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def rows_of(collected: Collected) -> list[ResultRow]:
    """Compares what was collected: rows by study, ratio and setting."""
    groups = settings_by_ratio(collected.points, collected.stages)
    return [row for key in sorted(groups) for row in compare_settings(groups[key])]


def settings_by_ratio(
    points: Iterable[Mapping[str, Any]], stages: Iterable[Mapping[str, Any]]
) -> dict[tuple[str, float], Settings]:
    """Sorts points by study and asked ratio, each with the number of stages of its run.

    Args:
        points: Points of a collection; dense ones are passed over.
        stages: All stages of these runs.
    """
    num_stages = Counter(key_of(stage) for stage in stages)
    groups: dict[tuple[str, float], Settings] = {}
    for point in points:
        if point["method"] == "dense":
            continue
        at = groups.setdefault((point["study"], point["ratio_asked"]), {})
        own = {**point, "stages": num_stages[key_of(point)]}
        at.setdefault(point["setting"], []).append(own)
    return groups


def compare_settings(settings: Settings, baseline: str | None = None) -> list[ResultRow]:
    """Compares settings at one ratio with their baseline, see ``ResultRow``, or with a given one.

    Raises:
        ValueError: If the given one is not among them.
    """
    if baseline is not None and baseline not in settings:
        raise ValueError(f"no setting is {baseline!r}; there are {', '.join(settings)}")
    others = [name for name, points in settings.items() if not points[0]["is_own"]]
    changed = [name for name, points in settings.items() if points[0].get("is_reference")]

    def height(name: str) -> float:
        return float(np.mean([point["val"] for point in settings[name]]))

    baseline = baseline or max(changed or others or settings, key=height)
    return [_row(name, settings[name], baseline, settings[baseline]) for name in settings]


def _row(
    name: str,
    points: Sequence[Mapping[str, Any]],
    baseline: str,
    baseline_points: Sequence[Mapping[str, Any]],
) -> ResultRow:
    first = points[0]
    return ResultRow(
        study=first["study"],
        data=first["data"],
        model=first["model"],
        task=first["task"],
        method=name,
        is_own=first["is_own"],
        ratio_asked=first["ratio_asked"],
        ratio_reached=float(np.mean([point["ratio_reached"] for point in points])),
        seeds=tuple(sorted(point["seed"] for point in points)),
        stages=float(np.mean([point["stages"] for point in points])),
        val=spread([point["val"] for point in points]),
        test=spread([point["test"] for point in points]),
        baseline=baseline,
        difference=None if name == baseline else _difference(points, baseline_points),
    )


def _difference(
    ours: Iterable[Mapping[str, Any]], theirs: Iterable[Mapping[str, Any]]
) -> Difference | None:
    """Pairs by seed and test sample; ``None`` if no seed is shared."""
    mine, other = ({point["seed"]: point for point in side} for side in (ours, theirs))
    seeds = sorted(mine.keys() & other.keys())
    if not seeds:
        return None
    pairs = [(mine[seed], other[seed]) for seed in seeds]
    if not all(point["outcomes"] for pair in pairs for point in pair):
        return paired_difference([our["test"] - their["test"] for our, their in pairs])
    sides = [
        [unpack_outcomes(point["outcomes"]) for point in side] for side in zip(*pairs, strict=True)
    ]
    return sampled_difference(*sides)
