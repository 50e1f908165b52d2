"""A cluster of several nodes with more GPUs than this machine has, all of them make-believe.

Each node is a raylet of its own on this machine (``ray.cluster_utils.Cluster``) and offers CPUs
and GPUs that are not there::

    python benchmarks/measure_cluster.py                 # 1, 4 and 8 nodes with 32 GPUs in all
    python benchmarks/measure_cluster.py --nodes 4 --gpus 64

Every GPU is a slot of the pool, and an actor, which is a real process. Jobs sleep for a second
before each of their five records, as a GPU's work takes no processor time of the driver's
machine either. There always is a next one until half a minute after the last slot has got its
first. Figures go to results/summary.json.
"""

import argparse
import itertools
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import ray
from measure_orchestration import MACHINE, RecordLatency, row, rss_mib, scratch
from ray.cluster_utils import Cluster
from summary import Row, replace_rows, show

from comp.config import PruningConfig
from orchestration.cluster import _on_loopback, connect, wait_for_nodes
from orchestration.executor import Event, Resources
from orchestration.job import Job, JobEnd, Notice, Record
from orchestration.ray_executor import RayExecutor

RECORDS, WINDOW = 5, 30.0


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


@dataclass
class Log:
    """What happened when, in Unix time."""

    first: dict[str, float] = field(default_factory=dict)  # job of every place
    made: list[float] = field(default_factory=list)  # records, each after a second of sleep
    num_ended: int = 0

    def note(self, event: Event) -> None:
        if isinstance(event.body, Notice):
            assert event.body.kind == "started", event.body
            self.first.setdefault(event.body.message, time.time())
        elif isinstance(event.body, Record):
            self.made.append(event.body.time)
        self.num_ended += isinstance(event.body, JobEnd)

    def window(self, num_slots: int) -> tuple[float, float] | None:
        """From when to when every slot has work, once that is known."""
        if len(self.first) < num_slots:
            return None
        begin = max(self.first.values())
        return begin, begin + WINDOW


def run_jobs(pool: RayExecutor, root: Path, log: Log, latency: RecordLatency) -> None:
    """Runs jobs until all slots have been at work for long enough."""
    numbers = itertools.count()

    def fill() -> None:
        window = log.window(pool.num_slots)
        while pool.free_slots and (window is None or time.time() < window[1]):
            pool.submit(make_job(root, next(numbers)))

    fill()
    for event in pool.events():
        latency(event)
        log.note(event)
        fill()


def measure(num_nodes: int, num_gpus: int) -> list[Row]:
    """Runs jobs on a cluster; returns its figures."""
    latency, log = RecordLatency(), Log()
    with scratch() as root, cluster_of(num_nodes, num_gpus) as up:
        before, begin, memory = processor_seconds(), time.time(), rss_mib()
        with RayExecutor(num_gpus, Resources(cpus=1, gpus=1), start_timeout=600) as pool:
            run_jobs(pool, root, log, latency)
        used, grown = processor_seconds() - before, rss_mib() - memory
        offered = sum(node["Resources"].get("GPU", 0) for node in ray.nodes())
    assert offered == num_gpus, offered
    window = log.window(num_gpus)
    assert window is not None
    full, last = window
    slept = sum(max(0.0, min(one, last) - max(one - 1.0, full)) for one in log.made)
    share = slept / (num_gpus * WINDOW)
    how = (
        f"{log.num_ended} sleeping jobs of {RECORDS} records on {num_gpus} make-believe GPUs of "
        f"{num_nodes} raylets, one run, {MACHINE}"
    )
    seconds = sorted(latency.seconds)
    median = 1000 * seconds[len(seconds) // 2]
    nodes = "node" if num_nodes == 1 else "nodes"
    figures = [
        ("nodes up", up, "s", "from nothing, one after the other"),
        ("all slots at work", full - begin, "s", "from the first submit; each slot is a process"),
        ("busy share of slots", share, "", f"in the {WINDOW:g} s after that"),
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
        row(f"{num_nodes} {nodes}, {what}", value, unit, f"{note}; {how}")
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
