"""The run directory: the truth about one run, and the interface of every later command.

While a run is going, every record is a small file of its own beside a checkpoint; at its end they
become two Parquet tables and a report. docs/results-format.md describes every file and column.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from comp.results import CurvePoint, StageRecord
from orchestration.job import Failure, Job, JobEnd, Record, digest_of
from orchestration.storage import Storage
from orchestration.store_tables import (
    FORMAT_VERSION,
    as_read_back,
    from_parquet,
    tables_of,
    to_parquet,
)

STATES_KEPT = 2
FORKS = "forks"
PROBES = "probes"

Outcome = Literal["finished", "failed", "unfinished"]


class RunMismatch(ValueError):
    """A run directory belongs to another spec."""


class Fenced(RuntimeError):
    """Another worker has taken this run over; this one must stop writing."""


@dataclass(frozen=True)
class Run:
    """A run as it lies on disk.

    Attributes:
        location: The run directory.
        uid: Made up when the directory was; tells a run from an earlier one of the same name.
        created: Unix time of that.
        job: What was asked for.
        records: Everything finished so far.
        outcome: ``"finished"``, ``"failed"`` (see ``failure``) or ``"unfinished"``: waiting,
            running or interrupted.
        failure: Why it failed.
        environment: Versions, host and git commit of the worker that started it.
    """

    location: str
    uid: str
    created: float
    job: Job
    records: tuple[Record, ...]
    outcome: Outcome
    failure: Failure | None
    environment: dict[str, str]

    @property
    def stages(self) -> list[StageRecord]:
        """The finished stages."""
        return [record.body for record in self.records if isinstance(record.body, StageRecord)]

    @property
    def points(self) -> list[CurvePoint]:
        """The dense model and the finished ratios."""
        return [record.body for record in self.records if isinstance(record.body, CurvePoint)]


class RunDirectory:
    """A run directory in the hands of the worker that fills it.

    Attributes:
        job: The job that the directory was opened for.
        records: Everything durable so far; ``append`` adds to it.
        finished: Whether the manifest is written.
    """

    def __init__(self, job: Job, storage: Storage) -> None:
        self.job = job
        self.storage = storage
        self.records: list[Record] = []
        self.finished = False
        self._token = uuid.uuid4().hex

    @classmethod
    def open(cls, job: Job) -> Self:
        """Creates a run directory or goes on with one, and takes it from any earlier owner.

        Raises:
            RunMismatch: If the directory holds the results of another spec.
            StorageError: If it cannot be written.
        """
        run = cls(job, Storage(job.run_dir))
        header = _read_json(run.storage, "job.json")
        if header is None:
            run._write_json("job.json", _header(job))
            run.storage.write("spec.yaml", job.spec_text.encode(), durable=False)
        else:
            _check_owner(job, header, run.storage.location)
        run.records, run.finished = _read_records(run.storage)
        if not run.finished:
            owner = {"token": run._token, "attempt": job.attempt, **_place()}
            run._write_json("owner.json", owner, durable=False)
            run.storage.remove("failure.json")
            for name in run.storage.names("state"):
                if int(name) >= len(run.records):  # its record never became durable
                    run.storage.remove(f"state/{name}")
        return run

    def append(
        self,
        body: StageRecord | CurvePoint,
        *,
        save: Callable[[Path], None] | None = None,
        models: Mapping[str, Callable[[Path], None]] | None = None,
    ) -> Record:
        """Makes a record durable, after the checkpoint from which a run goes on behind it.

        Args:
            body: The finished stage or point.
            save: Writes the whole state of the run into the directory it is given; ``None`` if
                the run goes on behind this record as it would have without it.
            models: By name, what writes a finished model into the directory it is given.

        Returns:
            The record, for the worker to yield.

        Raises:
            Fenced: If another worker owns the directory by now.
            StorageError: If it cannot be written.
        """
        record = Record(len(self.records), body, time.time(), self.job.attempt)
        record = as_read_back(self.job, record)
        for name, write in (models or {}).items():
            self.storage.write_tree(f"model/{name}", write)
        if save is not None:
            self.storage.write_tree(f"state/{record.index:05d}", save)
        self.check_still_owned()
        # In one line: json indents in Python, eight times as slowly.
        self._write_json(f"records/{record.index:05d}.json", record.to_dict(), indent=None)
        self.records.append(record)
        for name in self.storage.names("state")[:-STATES_KEPT] if save is not None else ():
            self.storage.remove(f"state/{name}")
        return record

    @contextlib.contextmanager
    def latest_state(self) -> Iterator[Path]:
        """Gives the newest checkpoint as a local directory.

        Raises:
            FileNotFoundError: If no record came with one.
        """
        with self.storage.tree(self.latest_state_name()) as path:
            yield path

    def latest_state_name(self) -> str:
        """Returns the name of the newest checkpoint in the directory.

        Raises:
            FileNotFoundError: If no record came with one.
        """
        names = self.storage.names("state")
        if not names:
            raise FileNotFoundError(f"{self.storage.location} has no checkpoint")
        return f"state/{names[-1]}"

    def finish(self) -> JobEnd:
        """Writes the tables and the report, the manifest last, and clears checkpoints away."""
        end = JobEnd(len(self.records), digest_of(self.records))
        if self.finished:
            return end
        self.check_still_owned()
        for name, table in tables_of(self.job, self.records).items():
            self.storage.write(f"{name}.parquet", to_parquet(table))
        self._write_json("report.json", _report(self.job, self.records))
        names = ["spec.yaml", "job.json", "stages.parquet", "curve.parquet", "report.json"]
        manifest = {
            "version": FORMAT_VERSION,
            "run_id": self.job.run_id,
            "content_id": self.job.content_id,
            "num_records": end.num_records,
            "digest": end.digest,
            "files": [*names, *self.storage.sizes("model")],
        }
        self._write_json("manifest.json", manifest)
        self.finished = True
        for name in ("records", "state", FORKS, PROBES, "owner.json"):
            self.storage.remove(name)
        return end

    def fail(self, failure: Failure) -> None:
        """Notes why the run will not go on; opening the directory again forgets it."""
        write_failure(self.job.run_dir, failure)

    def check_still_owned(self) -> None:
        """Raises ``Fenced`` if another worker owns the directory by now."""
        owner = _read_json(self.storage, "owner.json") or {}
        if owner.get("token") != self._token:
            raise Fenced(
                f"{self.storage.location} was taken over by process {owner.get('pid')} on "
                f"{owner.get('host')}; this worker stops"
            )

    def _write_json(
        self, name: str, values: Mapping[str, Any], *, durable: bool = True, indent: int | None = 1
    ) -> None:
        text = json.dumps(values, indent=indent) + "\n"
        self.storage.write(name, text.encode(), durable=durable)


def write_failure(location: str, failure: Failure) -> None:
    """Notes in a run directory why the run will not go on.

    Raises:
        StorageError: If it cannot be written.
    """
    text = json.dumps(dataclasses.asdict(failure), indent=1)
    Storage(location).write("failure.json", text.encode())


def read_run(location: str | Path) -> Run:
    """Reads a run, finished or not.

    Raises:
        FileNotFoundError: If the directory holds no run.
        ValueError: If a later version of this program wrote it.
    """
    storage = Storage(location)
    header = _read_json(storage, "job.json")
    if header is None:
        raise FileNotFoundError(f"{storage.location} is not a run directory: job.json is missing")
    if header["version"] > FORMAT_VERSION:
        raise ValueError(
            f"{storage.location} has format version {header['version']}, but this program reads "
            f"up to {FORMAT_VERSION}; update it"
        )
    spec = storage.read("spec.yaml").decode() if storage.exists("spec.yaml") else ""
    records, finished = _read_records(storage)
    failure = None if finished else _read_json(storage, "failure.json")
    return Run(
        location=storage.location,
        uid=header["uid"],
        created=header["created"],
        job=Job.from_dict(header["job"] | {"run_dir": storage.location, "spec_text": spec}),
        records=tuple(records),
        outcome="finished" if finished else "failed" if failure else "unfinished",
        failure=Failure(**failure) if failure else None,
        environment=header["environment"],
    )


def read_header(location: str | Path) -> dict[str, Any] | None:
    """Returns what a run directory says of itself (``job.json``); ``None`` if it is none."""
    return _read_json(Storage(location), "job.json")


def list_runs(root: str | Path) -> list[str]:
    """Returns the locations of the run directories directly under ``root``, sorted by name."""
    storage = Storage(root)
    return [
        storage.child(name).location
        for name in storage.names()
        if storage.exists(f"{name}/job.json")
    ]


def _read_records(storage: Storage) -> tuple[list[Record], bool]:
    """Returns the durable records and whether the run is finished."""
    if storage.exists("manifest.json"):
        return _read_tables(storage), True
    try:
        names = storage.names("records")
        found = [_read_json(storage, f"records/{name}") for name in names]
    except FileNotFoundError:
        found = [None]
    if None in found or (not found and storage.exists("manifest.json")):
        return _read_tables(storage), True  # finished, and cleared away, while we looked
    records = [Record.from_dict(values) for values in found if values is not None]
    return records, False


def _read_tables(storage: Storage) -> list[Record]:
    records: list[Record] = []
    for name, body_type in (("stages", StageRecord), ("curve", CurvePoint)):
        records += from_parquet(storage.read(f"{name}.parquet"), body_type)
    return sorted(records, key=lambda record: record.index)


def _read_json(storage: Storage, name: str) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(storage.read(name))
    except FileNotFoundError:
        return None
    return values


def _header(job: Job) -> dict[str, Any]:
    values = job.to_dict()
    del values["spec_text"], values["attempt"], values["parts"], values["probe"]
    return {
        "version": FORMAT_VERSION,
        "uid": uuid.uuid4().hex,
        "created": time.time(),
        "content_id": job.content_id,
        "job": values,
        "environment": environment(),
    }


def _check_owner(job: Job, header: Mapping[str, Any], location: str) -> None:
    theirs = Job.from_dict(header["job"])
    if (theirs.content_id, theirs.study) == (job.content_id, job.study):
        return
    pairs = [(name, getattr(theirs, name), getattr(job, name)) for name in _DECISIVE]
    pairs += [
        (f"config.{name}", theirs.config.get(name, _UNKNOWN), job.config.get(name, _UNKNOWN))
        for name in sorted(theirs.config.keys() | job.config.keys())
    ]
    what, old, new = next(pair for pair in pairs if pair[1] != pair[2])
    raise RunMismatch(
        f"{location} belongs to another spec ({what} is {old!r} there and {new!r} here); choose "
        "another name or storage root, or delete that directory"
    )


_UNKNOWN = "unknown"  # a key of a later version, which no value equals
_DECISIVE = ("study", "model", "task", "data", "kind", "ratio", "runner")


def _report(job: Job, records: Sequence[Record]) -> dict[str, Any]:
    stages = [record.body for record in records if isinstance(record.body, StageRecord)]
    modes = [stage.mode for stage in stages]
    training = sum(stage.train_seconds for stage in stages)
    evaluation = sum(stage.eval_seconds for stage in stages)
    return {
        "version": FORMAT_VERSION,
        "run_id": job.run_id,
        "study": job.study,
        "trial": job.trial,
        "kind": job.kind,
        "model": job.model,
        "task": job.task,
        "method": job.method,
        "seed": job.seed,
        "content_id": job.content_id,
        "num_stages": len(stages),
        "stage_seconds": sum(stage.seconds for stage in stages),
        "train_seconds": training,
        "eval_seconds": evaluation,
        "eval_over_train": evaluation / training if training else None,
        "attempts": 1 + max((record.attempt for record in records), default=0),
        "parts": job.parts,
        "stages_by_mode": {mode: modes.count(mode) for mode in sorted(set(modes))},
        "points": [_finite(record.body.to_dict()) for record in records if record.point],
        "environment": environment(),
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Replaces NaN and infinities, which are not JSON, by ``None``."""
    bad = [k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)]
    return values | dict.fromkeys(bad)


@functools.cache
def environment() -> dict[str, str]:
    """Returns versions, host, and the git commit if the code runs from a checkout."""
    packages = ("comp-vlm", "torch", "transformers", "ray", "pyarrow", "numpy")
    known = {"python": platform.python_version(), "host": socket.gethostname()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            known[name] = importlib.metadata.version(name)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        here = Path(__file__).parent
        git = ["git", "-C", str(here), "rev-parse", "HEAD"]
        done = subprocess.run(git, capture_output=True, text=True, timeout=5, check=True)
        known["git_commit"] = done.stdout.strip()
    return known


def _place() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}
