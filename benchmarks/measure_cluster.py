"""A cluster of several nodes with more GPUs than this machine has, all of them make-believe.

Each node is a raylet of its own on this machine (``ray.cluster_utils.Cluster``) and offers CPUs
and GPUs that are not there::

    python benchmarks/measure_cluster.py                 # 1, 4 and 8 nodes with 32 GPUs in all
    python benchmarks/measure_cluster.py --nodes 4 --gpus 64

Every GPU is a slot of the pool, and an actor, which is a real process. Jobs sleep for a second
before each of their five records, as a GPU's work takes no processor time of the driver's
machine either. There are four jobs a slot. Figures go to results/summary.json.
"""

import argparse
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from measure_orchestration import MACHINE, RecordLatency, row, rss_mib, scratch
from ray.cluster_utils import Cluster
from summary import Row, replace_rows, show

from comp.config import PruningConfig
from orchestration.cluster import _on_loopback, connect, wait_for_nodes
from orchestration.executor import Resources
from orchestration.job import Job, JobEnd, Notice, Record
from orchestration.ray_executor import RayExecutor

JOBS_A_SLOT, RECORDS = 4, 5


@contextmanager
def cluster_of(num_nodes: int, num_gpus: int) -> Iterator[float]:
    """Starts a head without room and nodes that share the GPUs; gives the seconds that took."""
    begin = time.perf_counter()
    share = num_gpus // num_nodes
    with _on_loopback(True):
        cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        try:
            for _ in range(num_nodes):
                cluster.add_node(num_cpus=share, num_gpus=share, include_dashboard=False)
            with connect(str(cluster.address)):
                wait_for_nodes(num_nodes + 1, 300)
                yield time.perf_counter() - begin
        finally:
            cluster.shutdown()


def make_job(root: Path, number: int) -> Job:
    """A job that sleeps."""
    config = PruningConfig(ratios=(0.5,), seed=number)
    return Job(
        run_id=f"sleep-{number:04d}",
        study="sleep",
        trial=number,
        model="none",
        task="vqa",
        config=config.to_dict(),
        seed=number,
        method="comp",
        run_dir=str(root / f"sleep-{number:04d}"),
        runner="orchestration_trials:sleeping",
    )


def processor_seconds() -> float:
    """Processor time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(num_nodes: int, num_gpus: int) -> list[Row]:
    """Runs all jobs on a cluster; returns its figures."""
    latency, num_jobs = RecordLatency(), JOBS_A_SLOT * num_gpus
    begun: list[float] = []
    ends: list[float] = []
    made: list[float] = []  # when each record was durable, after a second of sleep
    with scratch() as root, cluster_of(num_nodes, num_gpus) as up:
        before, begin, memory = processor_seconds(), time.time(), rss_mib()
        with RayExecutor(num_gpus, Resources(cpus=1, gpus=1), start_timeout=600) as pool:
            for number in range(num_jobs):
                pool.submit(make_job(root, number))
            for event in pool.events():
                latency(event)
                body = event.body
                if isinstance(body, Notice) and body.kind == "started":
                    begun.append(time.time())
                elif isinstance(body, Record):
                    made.append(body.time)
                elif isinstance(body, JobEnd):
                    ends.append(time.time())
                assert not isinstance(body, Notice) or body.kind == "started", body
        used, grown = processor_seconds() - before, rss_mib() - memory
        offered = sum(node["Resources"].get("GPU", 0) for node in ray.nodes())
    assert offered == num_gpus, offered
    assert len(ends) == num_jobs, ends
    full, last = sorted(begun)[num_gpus - 1], sorted(begun)[-1]
    # While every slot has a next job, whatever it does not sleep is the pool's cost.
    slept = sum(max(0.0, min(one, last) - max(one - 1.0, full)) for one in made)
    share = slept / (num_gpus * (last - full))
    how = (
        f"{num_jobs} sleeping jobs of {RECORDS} records on {num_gpus} make-believe GPUs of "
        f"{num_nodes} raylets, {MACHINE}"
    )
    seconds = sorted(latency.seconds)
    median = 1000 * seconds[len(seconds) // 2]
    figures = [
        ("nodes up", up, "s", "from nothing, one after the other"),
        ("all slots at work", full - begin, "s", "from the first submit; each slot is a process"),
        ("busy share of slots", share, "", "from then to the last job's start"),
        (
            "record latency, median",
            median,
            "ms",
            "durable to delivered",
        ),
        ("driver's processor time a record", 1000 * used / len(seconds), "ms", "submits included"),
        ("driver memory, growth", grown, "MiB", "resident, from before"),
    ]
    return [
        row(f"{num_nodes} nodes, {what}", value, unit, f"{note}; {how}")
        for what, value, unit, note in figures
    ]


def main() -> None:
    """Measures clusters of the asked numbers of nodes and writes the figures down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--gpus", type=int, default=32)
    options = parser.parse_args()
    for num_nodes in options.nodes:
        rows = measure(num_nodes, options.gpus)
        replace_rows(rows)
        print(show(rows), flush=True)


if __name__ == "__main__":
    main()
