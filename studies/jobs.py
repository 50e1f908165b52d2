"""Turns specs into jobs. The same spec and trial give the same run ids in every driver."""

import dataclasses

from comp.config import PruningConfig
from comp.results import CurvePoint
from orchestration.job import DEFAULT_RUNNER, Job
from orchestration.storage import absolute, join
from studies.spec import PruneSpec, RunSpec, StudySpec
from studies.specfile import write_spec

DENSE_TRIAL = -1
SINGLE_RUNS = "single-runs"  # the study, and so the MLflow experiment, of `comp prune`


def dense_job(spec: StudySpec, runner: str = DEFAULT_RUNNER, cell: str = "") -> Job:
    """Returns the job that measures a dense model once for all trials of a study.

    Args:
        spec: The study.
        runner: See ``Job.runner``.
        cell: The cell of the study's matrix whose model it is, ``""`` without one.
    """
    there = spec.in_cell(cell)
    config = dataclasses.replace(there.pruning, seed=spec.seeds[0])
    run_id = f"{spec.name}-dense" + (f"-{cell}" if cell else "")
    job = _job(there, run_id, config, study=spec.name, runner=runner)
    return dataclasses.replace(job, kind="dense", method="dense", trial=DENSE_TRIAL)


def cell_of(spec: StudySpec, job: Job) -> str:
    """Returns the cell of a study's matrix that a dense job is for, ``""`` without one."""
    return job.run_id.removeprefix(f"{spec.name}-dense").removeprefix("-")


def trial_jobs(
    spec: StudySpec,
    number: int,
    config: PruningConfig,
    dense: CurvePoint | None,
    runner: str = DEFAULT_RUNNER,
) -> list[Job]:
    """Returns the jobs of a trial, one for each of the study's seeds."""
    jobs = []
    for seed in spec.seeds:
        suffix = f"-s{seed}" if len(spec.seeds) > 1 else ""
        run_id = f"{spec.name}-{number:04d}{suffix}"
        seeded = dataclasses.replace(config, seed=seed)
        job = _job(spec, run_id, seeded, study=spec.name, runner=runner)
        point = dense.to_dict() if dense else None
        jobs.append(dataclasses.replace(job, trial=number, dense=point))
    return jobs


def first_job(spec: StudySpec | PruneSpec) -> Job:
    """Returns the job of a spec's own config, which tells what its runs ask of a machine."""
    if isinstance(spec, PruneSpec):
        return prune_job(spec)
    return trial_jobs(spec, 0, spec.pruning, None)[0]


def prune_job(spec: PruneSpec, runner: str = DEFAULT_RUNNER) -> Job:
    """Returns the job of a single run, whose id is the spec's name."""
    return _job(spec, spec.name, spec.pruning, study=SINGLE_RUNS, runner=runner)


def _job(spec: RunSpec, run_id: str, config: PruningConfig, *, study: str, runner: str) -> Job:
    again = PruneSpec(
        kind="prune",
        name=run_id,
        model=spec.model,
        task=spec.task,
        data=spec.data,
        pruning=config,
        resources=spec.resources,
        tracking=spec.tracking,
        root=spec.root,
    )
    return Job(
        run_id=run_id,
        study=study,
        trial=DENSE_TRIAL,
        model=spec.model,
        task=spec.task,
        data=spec.data,
        config=config.to_dict(),
        seed=config.seed,
        method=config.method,
        fine_tune=spec.fine_tune,
        run_dir=join(absolute(spec.root), "runs", run_id),
        spec_text=write_spec(again),
        threads=spec.resources.threads,
        sharded=spec.resources.shard,
        runner=runner,
    )
