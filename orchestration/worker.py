"""What a worker does with a job, in whatever process it runs: replay, go on, end."""

import contextlib
import copy
import functools
import gc
import importlib
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comp.lazy import without_collection
from comp.results import CurvePoint, Snapshot, StageRecord
from orchestration import forks, probes
from orchestration.job import (
    Failure,
    FailureKind,
    Fork,
    Job,
    JobEnd,
    Record,
    Suspended,
    digest_of,
)
from orchestration.retry import describe_memory, kind_of
from orchestration.storage import Storage, StorageError, last_name
from orchestration.store import FORKS, Fenced, RunDirectory

if TYPE_CHECKING:
    from comp.models import LoadedModel
    from comp.pruner import Pruner
    from comp.tasks.base import Task

Item = Record | Fork | Suspended | JobEnd | Failure
Runner = Callable[[Job, RunDirectory], Iterator[Record | Fork | Suspended]]


def run(job: Job, *, stop: Callable[[], FailureKind | None] = lambda: None) -> Iterator[Item]:
    """Runs a job and yields its whole stream: old records, new records, and how it ended.

    A record is yielded only after it and the checkpoint behind it are on disk. What the run itself
    raises becomes a last ``Failure`` and is noted in the run directory, so that an exception out
    of this generator always means that the worker is at fault, not the job.

    Args:
        job: The job.
        stop: Asked after every new record; a kind ends the stream with a ``Failure`` of it.

    Yields:
        ``Record`` by ascending index with ``Fork`` between them, then one ``JobEnd``, ``Failure``
        or ``Suspended``.

    Raises:
        Fenced: If another worker took the run over.
    """
    directory: RunDirectory | None = None
    if job.kind == "probe":
        yield follow(job) or JobEnd(0, digest_of(()))
        return
    try:
        directory = RunDirectory.open(job)
        # No "yield from" here: Ray drives generators with send(), which lists do not have.
        replay: list[Item] = [*directory.records]
        for item in replay:
            yield item
        if not directory.finished:
            for item in _runner(job.runner)(job, directory):
                yield item
                if isinstance(item, Suspended):
                    return
                kind = stop()
                if kind is not None:
                    yield Failure(kind, f"stopped after record {len(directory.records) - 1}")
                    return
        yield directory.finish()
    except Fenced:
        raise
    except Exception as error:
        failure = _failure(job, error)
        if directory is not None:
            with contextlib.suppress(StorageError):
                directory.fail(failure)
        yield failure


def follow(job: Job, *, stop: Callable[[], FailureKind | None] = lambda: None) -> Failure | None:
    """Does what has no records of its own: a peer's part of a job, or a probe.

    Args:
        job: The probe, or the job that the first worker runs.
        stop: Asked between two records; a kind ends a peer's part.

    Returns:
        Why it left; ``None`` if there is nothing left to do.
    """
    # Nobody's until it is opened: whatever would write into it raises.
    directory = RunDirectory(job, Storage(job.run_dir))
    try:
        for _ in _runner(job.runner)(job, directory):
            kind = stop()
            if kind is not None:
                return Failure(kind, "stopped between two records")
    except Exception as error:
        return _failure(job, error)
    return None


def _failure(job: Job, error: Exception) -> Failure:
    kind = kind_of(error)
    plain = str(error) or type(error).__name__
    return Failure(
        kind=kind,
        message=describe_memory(error) if kind == "memory" else plain,
        error=type(error).__name__,
        traceback="".join(traceback.format_exception(error)),
        attempts=job.attempt + 1,
    )


def _runner(name: str) -> Runner:
    """Finds ``"module:function"``.

    Raises:
        ValueError: If it is not of that form.
        ImportError: If there is no such module.
        AttributeError: If the module has no such function.
    """
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"runner must be 'module:function', but got {name!r}")
    with without_collection():
        found: Runner = getattr(importlib.import_module(module), function)
    return found


def prune(job: Job, directory: RunDirectory) -> Iterator[Record | Fork | Suspended]:
    """The default runner: loads what the job names, and prunes, fine-tunes or measures it.

    Yields:
        The records that are new, and what ``orchestration/forks.py`` adds.
    """
    with without_collection():
        import torch

        from comp.workers import Workers

    torch.set_num_threads(job.threads)
    if job.kind == "prune" and Workers.here().is_first and forks.is_over(directory):
        yield from _wait_for_forks(directory)
        return
    loaded, task = load(job.model, job.task, job.data, job.trust_remote_code)
    try:
        yield from work_on(job, directory, loaded, task)
    finally:
        gc.collect()  # hooks make cycles, and the next run in this process needs the memory


def work_on(
    job: Job, directory: RunDirectory, loaded: "LoadedModel", task: "Task"
) -> Iterator[Record | Fork | Suspended]:
    """Does what ``prune`` does with a model and a task that are loaded; both stay as they are."""
    from comp.workers import Workers

    if job.kind == "probe":
        probes.try_mode(job, new_pruner(job, loaded, task))
    elif not Workers.here().is_first:
        yield from work_along(job, directory, loaded, task)
    elif job.kind == "dense":
        yield from measure_dense(job, directory, loaded, task)
    elif job.kind == "fine_tune":
        yield from fine_tune_snapshot(job, directory, loaded, task)
    else:
        yield from prune_loaded(job, directory, loaded, task)


def work_along(
    job: Job, directory: RunDirectory, loaded: "LoadedModel", task: "Task"
) -> Iterator[Record]:
    """Shares the work of the job's first worker: the same loop, of which nothing is kept.

    Yields:
        A record wherever the first worker may have one.

    Raises:
        WorkerLost: If the first worker has ended, or another is gone.
    """
    if job.kind == "dense":
        bodies: Iterator[StageRecord | CurvePoint] = iter([_dense_point(job, loaded, task)])
    else:
        bodies = _shared_bodies(job, directory, loaded, task)
    for index, body in enumerate(bodies):
        yield Record(index, body, time.time(), job.attempt)


def _shared_bodies(
    job: Job, directory: RunDirectory, loaded: "LoadedModel", task: "Task"
) -> Iterator[StageRecord | CurvePoint]:
    pruner = new_pruner(job, loaded, task)
    if job.kind == "fine_tune":
        yield _finish_snapshot(job, pruner)
        return
    _take_up(pruner, directory.storage)
    for body in pruner.trajectory():
        if isinstance(body, Snapshot) and job.fine_tune == "fork":
            pruner.lend(optimizer=False)
            continue
        record = pruner.finish(body.ratio) if isinstance(body, Snapshot) else body
        pruner.lend()
        yield record


def _take_up(pruner: "Pruner", storage: Storage, state: str | None = None) -> None:
    """Lets all workers of a run go on from the state that the first one names, if it does."""
    state = pruner.handle.workers.first(state)
    if state is not None:
        with storage.tree(state) as path:
            pruner.restore(path)


def measure_dense(
    job: Job, directory: RunDirectory, loaded: "LoadedModel", task: "Task"
) -> Iterator[Record]:
    """Yields the point of a dense model, which stays as it is, unless it is on disk already."""
    if not directory.records:
        yield directory.append(_dense_point(job, loaded, task))


def _dense_point(job: Job, loaded: "LoadedModel", task: "Task") -> CurvePoint:
    from comp.pruner import evaluate_dense
    from comp.workers import Workers

    return evaluate_dense(
        copy.deepcopy(loaded.model),
        task,
        job.pruning_config,
        model_name=loaded.name,
        workers=Workers.here(sharded=job.sharded),
    )


def prune_loaded(
    job: Job, directory: RunDirectory, loaded: "LoadedModel", task: "Task"
) -> Iterator[Record | Fork | Suspended]:
    """Prunes a copy of a model from where ``directory`` left off.

    Args:
        job: Gives the config, the dense point and where fine-tunes run.
        directory: Takes records, checkpoints and finished models.
        loaded: The dense model; stays as it is.
        task: The task.

    Yields:
        The records that are new, and forks.

    Raises:
        BudgetUnreachable: If the kept minima forbid a ratio.
        NanLoss: If the loss stops being finite.
    """
    if not forks.is_over(directory):
        pruner = new_pruner(job, loaded, task)
        state = directory.latest_state_name() if directory.records else None
        _take_up(pruner, directory.storage, state)
        yield from forks.go_on_with(directory)
        if job.fine_tune == "fork" and pruner.handle.workers.size == 1:
            pruner.trials = probes.SharedTrials(directory)
        trajectory = pruner.trajectory()
        while True:
            yield from probes.announce(directory, pruner)
            body = next(trajectory, None)
            if body is None:
                break
            if not isinstance(body, Snapshot):
                yield directory.append(body, save=pruner.save)
            elif job.fine_tune == "fork":
                yield forks.leave_snapshot(directory, body.ratio, pruner)
            else:
                point = pruner.finish(body.ratio)
                models = {forks.ratio_name(body.ratio): _saver(job, loaded, pruner, point)}
                yield directory.append(point, save=pruner.save, models=models)
            yield from forks.adopt(directory)
    yield from _wait_for_forks(directory)


def _wait_for_forks(directory: RunDirectory) -> Iterator[Record | Fork | Suspended]:
    yield from forks.go_on_with(directory)
    yield from forks.suspend_if_incomplete(directory)


def fine_tune_snapshot(
    job: Job, directory: RunDirectory, loaded: "LoadedModel", task: "Task"
) -> Iterator[Record]:
    """Makes the point of a forked job, and puts the finished model beside its trajectory's.

    Raises:
        NanLoss: If the loss stops being finite.
    """
    if directory.records:
        return
    pruner = new_pruner(job, loaded, task)
    point = _finish_snapshot(job, pruner)
    save = _saver(job, loaded, pruner, point)
    directory.check_still_owned()
    name = f"model/{forks.ratio_name(point.ratio_asked)}"
    Storage(forks.trajectory_of(job)).write_tree(name, save)
    yield directory.append(point)


def _finish_snapshot(job: Job, pruner: "Pruner") -> CurvePoint:
    assert job.ratio is not None
    name = f"{FORKS}/{forks.ratio_name(job.ratio)}/{forks.SNAPSHOT}"
    with Storage(forks.trajectory_of(job)).tree(name) as state:
        pruner.restore(state)
    return pruner.finish(job.ratio)


def new_pruner(job: Job, loaded: "LoadedModel", task: "Task") -> "Pruner":
    """Returns a pruner of a copy of a loaded model, at its beginning."""
    from comp.pruner import Pruner
    from comp.workers import Workers

    return Pruner(
        copy.deepcopy(loaded.model),
        task,
        job.pruning_config,
        model_name=loaded.name,
        dense=CurvePoint.from_dict(job.dense) if job.dense else None,
        dense_model=loaded.model,
        workers=Workers.here(sharded=job.sharded),
    )


def _saver(
    job: Job, loaded: "LoadedModel", pruner: "Pruner", point: CurvePoint
) -> Callable[[Path], None]:
    """Returns what writes the model behind a point into a directory."""
    from comp.checkpoint import save_pruned

    assert pruner.finished_model is not None
    card = _card(job, loaded, point)
    return functools.partial(
        save_pruned, pruner.finished_model, tokenizer=loaded.tokenizer, card=card
    )


def _card(job: Job, loaded: "LoadedModel", point: CurvePoint) -> dict[str, Any]:
    """Returns what is known of a finished model; ``comp.models.load_model`` reads it back."""
    return {
        "task": job.task,
        "license": loaded.card.get("license", ""),
        "run": last_name(forks.trajectory_of(job) if job.kind == "fine_tune" else job.run_dir),
        "point": point.to_dict(),
        "dense": {"name": loaded.name, "source": job.model, **loaded.card},
    }


@functools.lru_cache(maxsize=2)
def load(
    model: str, task: str, data: str | None, trust_remote_code: bool = False
) -> "tuple[LoadedModel, Task]":
    """Loads a dense model and its task once per process; callers must not change either.

    Weights and decoded pictures are mapped from files, so that a machine holds them once for all
    its workers.
    """
    from comp.models import load_model
    from comp.tasks import build_task

    loaded = load_model(model, shared=True, trust_remote_code=trust_remote_code)
    built: Any = build_task(
        task,
        tokenizer=loaded.tokenizer,
        image_size=loaded.image_size,
        transform=loaded.transform,
        data=Path(data) if data else None,
    )
    return loaded, built
