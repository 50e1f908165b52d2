"""What a worker does with a job, in whatever process it runs: replay, go on, end."""

import contextlib
import copy
import functools
import gc
import importlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comp.results import CurvePoint
from orchestration.job import Failure, FailureKind, Job, JobEnd, Record
from orchestration.retry import describe_memory, kind_of
from orchestration.storage import StorageError
from orchestration.store import Fenced, RunDirectory

if TYPE_CHECKING:
    from comp.models import LoadedModel
    from comp.tasks.base import Task

Item = Record | JobEnd | Failure
Runner = Callable[[Job, RunDirectory], Iterator[Record]]


def run(job: Job, *, stop: Callable[[], FailureKind | None] = lambda: None) -> Iterator[Item]:
    """Runs a job and yields its whole stream: old records, new records, and how it ended.

    A record is yielded only after it and the checkpoint behind it are on disk. What the run itself
    raises becomes a last ``Failure`` and is noted in the run directory, so that an exception out
    of this generator always means that the worker is at fault, not the job.

    Args:
        job: The job.
        stop: Asked after every new record; a kind ends the stream with a ``Failure`` of it.

    Yields:
        ``Record`` by ascending index, then one ``JobEnd`` or ``Failure``.

    Raises:
        Fenced: If another worker took the run over.
    """
    directory: RunDirectory | None = None
    try:
        directory = RunDirectory.open(job)
        # No "yield from" here: Ray drives generators with send(), which lists do not have.
        for record in list(directory.records):
            yield record
        if not directory.finished:
            for record in _runner(job.runner)(job, directory):
                yield record
                kind = stop()
                if kind is not None:
                    yield Failure(kind, f"stopped after record {record.index}")
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
    found: Runner = getattr(importlib.import_module(module), function)
    return found


def prune(job: Job, directory: RunDirectory) -> Iterator[Record]:
    """The default runner: loads what the job names, and prunes or measures it.

    Yields:
        The records that are new.
    """
    import torch

    torch.set_num_threads(job.threads)
    loaded, task = _load(job.model, job.task, job.data)
    work = measure_dense if job.kind == "dense" else prune_loaded
    try:
        yield from work(job, directory, loaded, task)
    finally:
        gc.collect()  # hooks make cycles, and the next run in this process needs the memory


def measure_dense(
    job: Job, directory: RunDirectory, loaded: "LoadedModel", task: "Task"
) -> Iterator[Record]:
    """Yields the point of a dense model, which stays as it is, unless it is on disk already."""
    from comp.pruner import evaluate_dense

    if not directory.records:
        model = copy.deepcopy(loaded.model)
        config = job.pruning_config
        yield directory.append(evaluate_dense(model, task, config, model_name=loaded.name))


def prune_loaded(
    job: Job, directory: RunDirectory, loaded: "LoadedModel", task: "Task"
) -> Iterator[Record]:
    """Prunes a copy of a model from where ``directory`` left off.

    Args:
        job: Gives the config and the dense point.
        directory: Takes records, checkpoints and finished models.
        loaded: The dense model; stays as it is.
        task: The task.

    Yields:
        The records that are new.

    Raises:
        BudgetUnreachable: If the kept minima forbid a ratio.
        NanLoss: If the loss stops being finite.
    """
    from comp.checkpoint import save_pruned
    from comp.pruner import Pruner

    pruner = Pruner(
        copy.deepcopy(loaded.model),
        task,
        job.pruning_config,
        model_name=loaded.name,
        dense=CurvePoint.from_dict(job.dense) if job.dense else None,
        dense_model=loaded.model,
    )
    if directory.records:
        with directory.latest_state() as state:
            pruner.restore(state)
    for body in pruner.run():
        models: dict[str, Callable[[Path], None]] = {}
        if isinstance(body, CurvePoint) and body.ratio_asked > 0:
            assert pruner.finished_model is not None
            card = _card(job, loaded, body)
            models[model_name(body.ratio_asked)] = functools.partial(
                save_pruned, pruner.finished_model, tokenizer=loaded.tokenizer, card=card
            )
        yield directory.append(body, save=pruner.save, models=models)


def _card(job: Job, loaded: "LoadedModel", point: CurvePoint) -> dict[str, Any]:
    """Returns what is known of a finished model; ``comp.models.load_model`` reads it back."""
    return {
        "task": job.task,
        "license": loaded.card.get("license", ""),
        "run": job.run_id,
        "point": point.to_dict(),
        "dense": {"name": loaded.name, "source": job.model, **loaded.card},
    }


def model_name(ratio: float) -> str:
    """Returns the directory of a finished model under ``model/``: ``"ratio-700"`` for 0.7."""
    return f"ratio-{round(ratio * 1000):03d}"


@functools.lru_cache(maxsize=2)
def _load(model: str, task: str, data: str | None) -> "tuple[LoadedModel, Task]":
    """Loads a dense model and its task once per process; callers must not change either."""
    from comp.models import load_model
    from comp.tasks import build_task

    loaded = load_model(model)
    built: Any = build_task(
        task,
        tokenizer=loaded.tokenizer,
        image_size=loaded.image_size,
        data=Path(data) if data else None,
    )
    return loaded, built
