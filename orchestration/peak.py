"""How much memory a run takes at most, measured once so that schedulers need not guess.

A stage and a fine-tuning step with the run's own batches are done in a fresh process; the figure
goes to ``peaks.json`` under the storage root, where ``read_peak`` finds it for every run that
must take the same memory.
"""

import contextlib
import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from orchestration.job import Job, canonical_json
from orchestration.storage import Storage

PEAKS = "peaks.json"
RAY_MIB = 128  # what Ray adds to a process
MARGIN = 1.1

_DECISIVE = (
    "method",
    "batch_size",
    "accumulate",
    "eval_batch_size",
    "gradient_checkpointing",
    "autocast",
    "device",
)


@dataclasses.dataclass(frozen=True)
class Peak:
    """The most memory that a run held at a time.

    Attributes:
        host_mib: Resident host memory of its process, mapped files included.
        device_mib: Memory that torch had allocated on the GPU; ``None`` without one.
    """

    host_mib: int
    device_mib: int | None = None

    @property
    def request_mib(self) -> int:
        """Host memory to ask a scheduler for: with Ray's own and a tenth on top."""
        return round(MARGIN * self.host_mib) + RAY_MIB

    def __str__(self) -> str:
        device = f", {self.device_mib:,} MiB on the GPU" if self.device_mib is not None else ""
        return f"{self.host_mib:,} MiB of host memory{device}"


class PeakError(RuntimeError):
    """The measuring process failed."""


def memory_key(job: Job) -> str:
    """Returns 16 hexadecimal digits that runs of equal memory share."""
    config = {name: job.config.get(name) for name in _DECISIVE}
    facts = [job.model, job.task, job.data, job.threads, job.parts, config]
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:16]


def measure_peak(job: Job) -> Peak:
    """Does a stage and a fine-tuning step of a job in a process of its own.

    Raises:
        PeakError: With that process's last line, if it fails.
    """
    command = [sys.executable, "-m", "orchestration.peak"]
    text = json.dumps(job.to_dict())
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
        reason = last or f"it ended with {done.returncode}"
        raise PeakError(f"the memory of {job.model} on {job.task} was not measured: {reason}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def write_peak(root: str, job: Job, peak: Peak) -> None:
    """Keeps a figure under a storage root.

    Raises:
        StorageError: If it cannot be written.
    """
    facts = {"model": job.model, "task": job.task, "batch_size": job.config.get("batch_size")}
    known = _read(root) | {memory_key(job): dataclasses.asdict(peak) | facts}
    Storage(root).write(PEAKS, (json.dumps(known, indent=1) + "\n").encode())


def read_peak(root: str, job: Job) -> Peak | None:
    """Returns the figure for a job, ``None`` if nobody has measured it."""
    found = _read(root).get(memory_key(job))
    return Peak(found["host_mib"], found["device_mib"]) if found else None


def _read(root: str) -> dict[str, Any]:
    with contextlib.suppress(FileNotFoundError):
        known: dict[str, Any] = json.loads(Storage(root).read(PEAKS))
        return known
    return {}


# --- the fresh process -------------------------------------------------------------------------


def _shortened(job: Job) -> Job:
    """One stage and one fine-tuning step; batches, and so memory, stay those of the job."""
    size = job.config["eval_batch_size"]
    sample_counts = ("eval_samples", "test_samples", "calibration_samples", "probe_samples")
    short = {name: min(job.config[name] or size, size) for name in sample_counts}
    steps = {"steps_per_stage": 2, "fine_tune_steps": 1, "fine_tune_checks": 1}
    return dataclasses.replace(job, config=job.config | short | steps)


def _run(job: Job) -> Peak:
    import torch

    from comp.results import StageRecord
    from orchestration.worker import load, new_pruner

    torch.set_num_threads(job.threads)
    loaded, task = load(job.model, job.task, job.data, job.trust_remote_code)
    pruner = new_pruner(_shortened(job), loaded, task)
    for body in pruner.trajectory():
        if isinstance(body, StageRecord):
            pruner.finish(job.config["ratios"][-1])
            break
    is_gpu = pruner.device.type == "cuda"
    allocated = torch.cuda.max_memory_allocated(pruner.device) if is_gpu else 0
    return Peak(_most_resident_mib(), round(allocated / 2**20) if is_gpu else None)


def _most_resident_mib() -> int:
    """``ru_maxrss`` would not do: a process inherits it from the one that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) / 1024)
    raise PeakError("/proc/self/status has no VmHWM; measuring memory needs Linux")


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(_run(Job.from_dict(json.load(sys.stdin))))))
