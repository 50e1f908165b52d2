"""What two runs must share so that a difference between them is their settings'."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from comp.config import PruningConfig
from orchestration.job import Job
from studies.domains import PRUNE_SHARE, STEP_BUDGET, TARGET_RATIO
from studies.space import starting_point, values_of
from studies.spec import StudySpec

NO_TERMS = ("method", "seed", "ratios", "num_stages", "stage_quantum", "max_stages", "device")
"""Keys of a config that are a setting's own, or that ``quantum`` says better."""
DENSE_TOLERANCE = 0.25
"""Points by which the dense model's test metric may differ between machines."""
_QUANTUM = {"ratios", "num_stages", "stage_quantum", TARGET_RATIO}
_STEPS = {"steps_per_stage", "fine_tune_steps"}


def terms_of(job: Job, spec: StudySpec) -> dict[str, Any]:
    """Returns the terms of a run that its study does not vary, as JSON values.

    ``quantum`` is the share of the dense FLOPs that a stage removes, and so how many stages, each
    of which trains, lie before a ratio. What is varied counts by where it starts, in trial 0:
    settings are named after what they change of that.
    """
    searched = set(spec.space)
    if searched & {PRUNE_SHARE, STEP_BUDGET}:
        searched |= _STEPS
    own = {k: v for k, v in job.config.items() if k not in searched and k not in NO_TERMS}
    if not spec.space.keys() & _QUANTUM:
        own["quantum"] = round(PruningConfig.from_dict(job.config).quantum, 4)
    own |= {f"{key} of trial 0": value for key, value in start_of(spec).items()}
    return {"model": job.model, "task": job.task, "data": job.data, **own}


def start_of(spec: StudySpec) -> dict[str, Any]:
    """Returns the values of searched keys other than the method in trial 0."""
    start = values_of(spec.space, starting_point(spec.pruning, spec.space))
    return {key: value for key, value in start.items() if key != "method"}


def differing_terms(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Returns which terms are not equal between two sets of collected points, with both values.

    The dense model is among them. Its accuracy may differ by what another processor changes.
    """
    wrong = []
    mine, other = (_terms(points) for points in (ours, theirs))
    for key in sorted(mine.keys() & other.keys()):
        if mine[key] != other[key]:
            wrong.append(f"{key} ({mine[key]} and {other[key]})")
    one, two = (sorted(_dense(points)) for points in (ours, theirs))
    params, tests = ([dense[i] for dense in one + two] for i in (0, 1))
    apart = max(tests, default=0.0) - min(tests, default=0.0)
    if len(set(params)) > 1 or apart > DENSE_TOLERANCE:
        wrong.append(f"dense model ({_told(one)} and {_told(two)})")
    return wrong


def _terms(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if any(not point.get("terms") for point in points):
        raise ValueError(
            f"study {points[0]['study']!r} was collected before terms were kept; collect it again "
            "with 'comp results collect'"
        )
    found: dict[str, Any] = json.loads(points[0]["terms"])
    return found


def _dense(points: Sequence[Mapping[str, Any]]) -> set[tuple[int, float]]:
    return {(p["params"], round(p["test"], 2)) for p in points if p["method"] == "dense"}


def _told(dense: Sequence[tuple[int, float]]) -> str:
    return ", ".join(f"{params} parameters, {test:.2f} on test" for params, test in dense)
