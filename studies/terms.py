"""What two runs must share so that a difference between them is their settings'."""

from typing import Any

from comp.config import PruningConfig
from orchestration.job import Job
from studies.domains import PRUNE_SHARE, STEP_BUDGET, TARGET_RATIO
from studies.spec import StudySpec

NO_TERMS = ("method", "seed", "ratios", "num_stages", "stage_quantum", "max_stages", "device")
"""Keys of a config that are a setting's own, or that ``quantum`` says better."""
_QUANTUM = {"ratios", "num_stages", "stage_quantum", TARGET_RATIO}
_STEPS = {"steps_per_stage", "fine_tune_steps"}


def terms_of(job: Job, spec: StudySpec) -> dict[str, Any]:
    """Returns the terms of a run that its study does not vary, as JSON values.

    ``quantum`` is the share of the dense FLOPs that a stage removes, and so how many stages, each
    of which trains, lie before a ratio.
    """
    searched = set(spec.space)
    if searched & {PRUNE_SHARE, STEP_BUDGET}:
        searched |= _STEPS
    own = {k: v for k, v in job.config.items() if k not in searched and k not in NO_TERMS}
    if not spec.space.keys() & _QUANTUM:
        own["quantum"] = round(PruningConfig.from_dict(job.config).quantum, 4)
    return {"model": job.model, "task": job.task, "data": job.data, **own}
