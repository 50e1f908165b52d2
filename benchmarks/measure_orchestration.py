"""Orchestration: what a trial costs beside its work, against Ray Tune, and how busy slots are.

Five parts, each named on the command line or all in turn::

    python benchmarks/measure_orchestration.py throughput   # 2,000 no-op trials, 32 actors
    python benchmarks/measure_orchestration.py tune         # 200 of them, beside Ray Tune
    python benchmarks/measure_orchestration.py utilisation  # a real study on two slots
    python benchmarks/measure_orchestration.py warm         # 50 real trials in one actor
    python benchmarks/measure_orchestration.py simulated    # a driver of 1,000 simulated slots

No-op trials have five records, each durable on disk before it is handed on, and are proposed by
Optuna's TPE over two parameters from a journal. Ray Tune gets the same trials: OptunaSearch with
the same sampler and space, a class trainable with ``reuse_actors=True``, five reports a trial,
as many concurrent trials and the same CPUs each. Figures go to results/summary.json.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simulated_slots import SimulatedSlots
from summary import Row, replace_rows, show

from orchestration.cluster import connect
from orchestration.executor import Event, Resources
from orchestration.job import Failure, Notice, Record
from orchestration.ray_executor import RayExecutor
from studies.driver import run_study
from studies.spec import StudySpec
from studies.specfile import override, spec_of

NUM_ACTORS = 32
CPUS = 0.05
SIMULATED_SLOTS, NUM_SIMULATED = 1000, 2000
NUM_TRIALS, NUM_TUNE_TRIALS, NUM_WARM, RECORDS = 2000, 200, 50, 5
# In memory where that is possible: a disk that is asked to sync twelve times a trial would be all
# that is measured, and Ray Tune, which never asks, would be compared with it.
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves workers beside other work
PLACE = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
MACHINE = (
    f"{os.cpu_count()} cores shared with other work, files in {PLACE or 'the temporary directory'}"
    f", {platform.machine()}, Python {platform.python_version()}"
)

NOOP_STUDY: dict[str, Any] = {
    "kind": "study",
    "model": "blip-tiny-vqa",
    "task": "vqa",
    "pruning": {"ratios": [0.5]},
    "space": {
        "exploration": {"kind": "float", "low": 0.0, "high": 0.5},
        "temperature": {"kind": "float", "low": 1.0, "high": 20.0},
    },
    "objective": {"val_at": 0.5},
    "parallel": NUM_ACTORS,
    "tracking": {"enabled": False},
}

REAL_STUDY: dict[str, Any] = {
    "kind": "study",
    "model": "blip-tiny-vqa",
    "task": "vqa",
    "pruning": {
        "ratios": [0.3],
        "num_stages": 3,
        "steps_per_stage": 3,
        "fine_tune_steps": 6,
        "fine_tune_checks": 1,
        "batch_size": 16,
        "quantum_cap": 0.5,
        "eval_samples": 128,
        "test_samples": 128,
        "calibration_samples": 32,
        "probe_samples": 16,
    },
    "space": {"exploration": {"kind": "float", "low": 0.0, "high": 0.5}},
    "objective": {"val_at": 0.3},
    "n_trials": 10,
    "parallel": 2,
    "tracking": {"enabled": False},
}


SHORT = {
    "ratios": [0.1],
    "num_stages": 2,
    "steps_per_stage": 2,
    "fine_tune_steps": 2,
    "batch_size": 4,
    "eval_samples": 16,
    "test_samples": 16,
    "eval_batch_size": 16,
    "calibration_samples": 8,
    "probe_samples": 4,
}


def make_spec(values: dict[str, Any], root: Path, *overrides: str) -> StudySpec:
    spec = spec_of(override({**values, "root": str(root)}, overrides))
    assert isinstance(spec, StudySpec)
    return spec


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="comp-bench-", dir=PLACE) as directory:
        yield Path(directory)


class RecordLatency:
    """Consumer of events: seconds from a record being durable to the driver having it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event.body, Record):
            self.seconds.append(time.time() - event.body.time)
        assert not isinstance(event.body, Failure), event.body


def run_noops(root: Path, n_trials: int, *consumers: Any) -> float:
    """Runs a no-op study as a user would, actors' start included; returns its seconds."""
    spec = make_spec(NOOP_STUDY, root, f"n_trials={n_trials}", f"name=noop-{n_trials}")
    begin = time.perf_counter()
    outcome = run_study(
        spec,
        lambda: RayExecutor(NUM_ACTORS, Resources(cpus=CPUS)),
        consumers,
        runner="orchestration_trials:noop",
    )
    seconds = time.perf_counter() - begin
    assert outcome.counts == {"complete": n_trials}, outcome
    return seconds


def rss_mib() -> float:
    """This process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure_throughput() -> list[Row]:
    latency, memory = RecordLatency(), [rss_mib()]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            memory.append(rss_mib())

    with scratch() as root, connect():
        thread = threading.Thread(target=watch)
        thread.start()
        seconds = run_noops(root, NUM_TRIALS, latency)
        done.set()
        thread.join()
    p50, p99 = (statistics.quantiles(latency.seconds, n=100)[i] for i in (49, 98))
    how = f"{NUM_TRIALS} no-op trials of {RECORDS} records, up to {NUM_ACTORS} actors, {MACHINE}"
    return [
        row("no-op trial", 1000 * seconds / NUM_TRIALS, "ms", f"{how}; start of actors included"),
        row("records through the driver", len(latency.seconds) / seconds, "1/s", how),
        row("record latency, median", 1000 * p50, "ms", f"durable to delivered; {how}"),
        row("record latency, 99th percentile", 1000 * p99, "ms", f"durable to delivered; {how}"),
        row("driver memory, peak", max(memory), "MiB", f"resident, once a second; {how}"),
        row("driver memory, growth", max(memory) - memory[0], "MiB", f"from before; {how}"),
    ]


def tune_noops(root: Path, n_trials: int) -> float:
    """The same trials through Ray Tune's OptunaSearch with reused actors; returns its seconds."""
    import optuna
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    class Trainable(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.settings, self.step_number = config, 0

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.setup(new_config)
            return True

        def step(self) -> dict[str, Any]:
            self.step_number += 1
            val = 80.0 - 5 * (1 + (self.settings["exploration"] - 0.25) ** 2)
            return {"val": val, "done": self.step_number == RECORDS}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            pass

        def load_checkpoint(self, checkpoint: Any) -> None:
            pass

    space = {
        "exploration": optuna.distributions.FloatDistribution(0.0, 0.5),
        "temperature": optuna.distributions.FloatDistribution(1.0, 20.0),
    }
    search = OptunaSearch(
        space,
        metric="val",
        mode="max",
        sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=10),
    )
    begin = time.perf_counter()
    tuner = tune.Tuner(
        tune.with_resources(Trainable, {"cpu": CPUS}),
        tune_config=tune.TuneConfig(
            search_alg=search,
            num_samples=n_trials,
            max_concurrent_trials=NUM_ACTORS,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=str(root), name="tune", verbose=0),
    )
    results = tuner.fit()
    seconds = time.perf_counter() - begin
    assert len(results) == n_trials
    assert results.num_errors == 0
    assert all(len(result.metrics_dataframe) == RECORDS for result in list(results)[:5])
    return seconds


def measure_against_tune() -> list[Row]:
    with scratch() as root, connect():
        ours = run_noops(root, NUM_TUNE_TRIALS)
        theirs = tune_noops(root, NUM_TUNE_TRIALS)
    how = f"{NUM_TUNE_TRIALS} no-op trials, up to {NUM_ACTORS} actors, one run of each, {MACHINE}"
    return [
        row("no-op trial beside Tune: comp", 1000 * ours / NUM_TUNE_TRIALS, "ms", how),
        row("no-op trial beside Tune: Ray Tune", 1000 * theirs / NUM_TUNE_TRIALS, "ms", how),
        row("throughput over Ray Tune's", theirs / ours, "x", f"reuse_actors=True; {how}", 5.0),
    ]


def measure_utilisation() -> list[Row]:
    given: dict[str, float] = {}
    ended: list[float] = []

    def note(event: Event) -> None:
        if event.handle.job.kind == "dense":
            return
        if isinstance(event.body, Notice):
            given.setdefault(event.handle.job.run_id, time.time())
        elif not isinstance(event.body, Record):
            assert not isinstance(event.body, Failure), event.body
            ended.append(time.time())

    with scratch() as root, connect():
        spec = make_spec(REAL_STUDY, root, "name=real")
        pool = RayExecutor(2, Resources(cpus=1.0))
        run_study(spec, lambda: pool, [note], runner="orchestration_trials:timed_prune")
        notes = sorted((root / "runs").glob("busy-real-0*.json"))
        spans = [json.loads(path.read_text()) for path in notes]
    # After start-up: both slots have loaded the model, which their first trials do. Before the
    # end: there still was a trial for whoever was free.
    begin, end = ended[1], max(given.values())
    busy = sum(max(0.0, min(b, end) - max(a, begin)) for a, b in spans)
    share = busy / (2 * (end - begin))
    how = (
        f"{len(given)} prunings of blip-tiny-vqa, fine-tunes forked, on 2 slots, {len(spans)} "
        f"spans by the workers' own clocks, from the second trial's end to "
        f"the last one's start ({end - begin:.0f} s), {MACHINE}"
    )
    return [row("utilisation of a real study", share, "busy / slot time", how, 0.95)]


def measure_warm() -> list[Row]:
    sent: dict[str, float] = {}

    def note(event: Event) -> None:
        assert not isinstance(event.body, Failure), event.body
        if isinstance(event.body, Notice):
            sent[event.handle.job.run_id] = time.time()

    overrides = ["name=warm", f"n_trials={NUM_WARM}", "parallel=1", "fine_tune=inline"]
    overrides += [f"pruning.{key}={value}" for key, value in SHORT.items()]
    with scratch() as root, connect():
        spec = make_spec(REAL_STUDY, root, "objective={val_at: 0.1}", *overrides)
        pool = RayExecutor(1, max_growth_mib=None)
        run_study(spec, lambda: pool, [note], runner="orchestration_trials:warm_prune")
        found = {
            path.stem.removeprefix("warm-"): json.loads(path.read_text())
            for path in sorted((root / "runs").glob("warm-warm-0*.json"))
        }
    assert len(found) == NUM_WARM
    assert len({one["pid"] for one in found.values()}) == 1
    starts = [one["ready"] - sent[run] for run, one in found.items()][1:]
    kept = [one["memory"] for one in found.values()]
    middle, high = statistics.median(starts), statistics.quantiles(starts, n=20)[-1]
    how = (
        f"{NUM_WARM} prunings of blip-tiny-vqa one after the other in one actor, load average "
        f"{os.getloadavg()[0]:.1f}, {MACHINE}"
    )
    steps = ", ".join(f"{kept[i - 1]:.0f}" for i in (1, 10, 20, 30, 40, NUM_WARM))
    begin = "from sent to ready to train, after the first"
    return [
        row("start-up of a trial, median", middle, "s", f"{begin}; {how}", 1.0, at_least=False),
        row("start-up of a trial, 95th percentile", high, "s", f"{begin}; {how}"),
        row(
            "memory kept by an actor, growth",
            kept[-1] - kept[0],
            "MiB",
            f"from after the first trial to after the last; after trials 1, 10, ..., {NUM_WARM}: "
            f"{steps} MiB of its own; {how}",
        ),
    ]


def measure_simulated() -> list[Row]:
    rows = []
    for sampler in ("tpe", "random"):
        pool = SimulatedSlots(SIMULATED_SLOTS)
        with scratch() as root:
            overrides = (
                f"name={sampler}",
                f"n_trials={NUM_SIMULATED}",
                f"sampler={{kind: {sampler}}}",
            )
            slots = f"parallel={SIMULATED_SLOTS}"
            spec = make_spec(NOOP_STUDY, root, *overrides, slots)
            memory, begin = rss_mib(), time.process_time()
            outcome = run_study(spec, lambda pool=pool: pool, runner="orchestration_trials:noop")
            seconds = time.process_time() - begin - pool.worker_seconds
        assert outcome.counts == {"complete": NUM_SIMULATED}, outcome
        assert pool.most_at_once == SIMULATED_SLOTS
        how = (
            f"processor time of the driver without its jobs', {NUM_SIMULATED} no-op trials of "
            f"{RECORDS} records on {SIMULATED_SLOTS} simulated slots, sampler {sampler}, journal; "
            f"memory grew by {rss_mib() - memory:.0f} MiB; {MACHINE}"
        )
        figure = f"driver of {SIMULATED_SLOTS} slots, {sampler}"
        rows.append(row(figure, 1000 * seconds / NUM_SIMULATED, "ms a trial", how))
    return rows


def row(
    figure: str,
    value: float,
    unit: str,
    how: str,
    goal: float | None = None,
    *,
    at_least: bool = True,
) -> Row:
    return Row(
        figure=f"orchestration: {figure}",
        value=round(value, 4),
        goal=goal,
        at_least=at_least,
        unit=unit,
        how=how,
    )


PARTS = {
    "throughput": measure_throughput,
    "tune": measure_against_tune,
    "utilisation": measure_utilisation,
    "warm": measure_warm,
    "simulated": measure_simulated,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    # Workers find orchestration_trials.py through the driver's path.
    sys.path.insert(0, str(Path(__file__).parent))
    for name in parser.parse_args().parts or PARTS:
        rows = PARTS[name]()
        replace_rows(rows)
        print(show(rows), flush=True)


if __name__ == "__main__":
    main()
