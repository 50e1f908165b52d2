"""Opens the pool of Ray actors that a study asks for, each of the size that its model needs."""

import contextlib
import math
from collections.abc import Iterator

from orchestration.executor import Executor, Resources
from orchestration.job import Job
from orchestration.peak import read_peak
from studies.jobs import first_job
from studies.spec import StudySpec


@contextlib.contextmanager
def on_ray(spec: StudySpec) -> Iterator[Executor]:
    """Opens a pool on the cluster that ``RAY_ADDRESS`` names, or on a Ray of this process."""
    from orchestration.cluster import check_fits, connect
    from orchestration.ray_executor import RayExecutor

    minutes = spec.stage_timeout_minutes
    timeout = 60 * minutes if minutes else None
    with connect():
        sizes = slot_sizes(spec)
        for size in sizes.values():
            check_fits(size)

        def size_of(job: Job) -> Resources:
            return sizes[job.model, job.task, job.data]

        with RayExecutor(spec.parallel, size_of, stage_timeout=timeout) as executor:
            yield executor


def slot_sizes(spec: StudySpec) -> dict[tuple[str, str, str | None], Resources]:
    """Returns what a slot for a model, a task and a data set asks of the cluster.

    Where several cells of a matrix share these three, the most of each.
    """
    from orchestration.cluster import total_gpus

    sizes: dict[tuple[str, str, str | None], Resources] = {}
    for name in spec.cells:
        there = spec.in_cell(name)
        asked, peak = there.resources, read_peak(spec.root, first_job(there))
        num_workers = spec.parallel * asked.workers
        gpus = gpu_share(total_gpus(), num_workers) if asked.gpus == "auto" else asked.gpus
        size = Resources(asked.cpus, gpus, peak.request_mib if peak else None, asked.workers)
        key = there.model, there.task, there.data
        sizes[key] = size.joined(sizes.get(key, size))
    return sizes


def gpu_share(num_gpus: float, num_workers: int) -> float:
    """Returns what each of several workers may take so that all of them run at once.

    Whole GPUs where there are enough, else equal shares of one; 0 where there is none.
    """
    return 1 / math.ceil(num_workers / num_gpus) if num_gpus >= 1 else 0.0
