"""What is sent to a worker and what comes back: plain values, picklable, without torch.

A worker's answer to a :class:`Job` is a stream: every record that is already on disk under the
job's run directory (the replay), then new ones, and last one :class:`JobEnd`. The order and the
number are the same in every attempt, so a retried, a resumed and an undisturbed job look alike to
the driver, and a stream without a ``JobEnd`` is known to be cut off.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from comp.config import PruningConfig
from comp.results import CurvePoint, StageRecord

JobKind = Literal["prune", "dense", "fine_tune", "probe"]
FineTune = Literal["inline", "fork"]
_CHOICES = {"kind": get_args(JobKind), "fine_tune": get_args(FineTune)}
FailureKind = Literal[
    "algorithm", "memory", "infrastructure", "timeout", "storage", "cancelled", "preempted"
]

DEFAULT_RUNNER = "orchestration.worker:prune"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def canonical_json(values: Any) -> str:
    """Returns JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def check_name(what: str, name: str) -> str:
    """Returns ``name`` if it can be a directory of its own under the storage root.

    Raises:
        ValueError: If it could climb out of the root or upset a file system.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{what} must be 1 to 128 letters, digits, '.', '_' or '-' and start with a letter "
            f"or digit, but got {name!r}"
        )
    return name


@dataclass(frozen=True)
class Job:
    """One pruning run, or one evaluation of a dense model.

    Attributes:
        run_id: Name of the run directory, for example ``"demo-0003"``. Unique under the root.
        study: Name of the study; one MLflow experiment.
        trial: Optuna's trial number; -1 for the dense reference.
        model: Model preset or directory, as ``comp.models.load_model`` takes it.
        task: Task name, as ``comp.tasks.build_task`` takes it.
        config: ``PruningConfig.to_dict()``; a plain dict, so that a job can be JSON.
        seed: ``config["seed"]``, beside it because every table has this column.
        method: ``config["method"]``, or ``"dense"``.
        run_dir: Where the run's files live: an absolute path, or a URI that ``pyarrow.fs`` knows.
        data: Data set directory, ``None`` for the embedded one.
        dense: ``CurvePoint.to_dict()`` of the dense reference, so that a study measures it once;
            ``None`` lets the run measure its own.
        kind: ``"prune"``; ``"dense"`` for a run whose only record is the dense point;
            ``"fine_tune"`` for one that is forked off a pruning and has one point, see
            ``orchestration/forks.py``; or ``"probe"`` for a trial of a stage, which has no record,
            see ``orchestration/probes.py``.
        fine_tune: Whether a pruning fine-tunes at each ratio itself (``"inline"``) or forks a job
            off for it and goes on (``"fork"``); then free workers take over trials of its stages,
            too. Results are the same.
        ratio: What a fork fine-tunes at; ``None`` for the other kinds.
        probe: What a probe tries and from which state; ``None`` for the other kinds.
        spec_text: The YAML a person could run again; written to ``spec.yaml`` as it is.
        threads: CPU threads of torch in the worker.
        sharded: Whether several workers of the job each keep only a shard of weights, gradients
            and moments.
        attempt: 0 at first; raised by the executor each time the job is tried again.
        parts: Into how many parts every batch is split beyond what the config says: 1 at first,
            more once a worker ran out of memory. Saves memory and decides no result but by
            rounding, except where a loss compares the samples of a batch.
        runner: ``"module:function"`` that does the work: called with the job and its
            ``store.RunDirectory``, it goes on behind ``directory.records`` and yields what
            ``directory.append`` returns. Benchmarks and tests put a trial of their own here.
        trust_remote_code: Whether a tokenizer's own code may be run, see ``load_model``. Only the
            command line says so: nothing that is read from a disk is ever trusted for it.
    """

    run_id: str
    study: str
    trial: int
    model: str
    task: str
    config: dict[str, Any]
    seed: int
    method: str
    run_dir: str
    data: str | None = None
    dense: dict[str, Any] | None = None
    kind: JobKind = "prune"
    fine_tune: FineTune = "inline"
    ratio: float | None = None
    probe: dict[str, Any] | None = None
    spec_text: str = ""
    threads: int = 1
    sharded: bool = False
    attempt: int = 0
    parts: int = 1
    runner: str = DEFAULT_RUNNER
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_name("run_id", self.run_id)
        check_name("study", self.study)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                known = ", ".join(choices)
                raise ValueError(f"{name} must be one of {known}, but got {getattr(self, name)!r}")
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, but got {self.threads}")

    @property
    def content_id(self) -> str:
        """16 hexadecimal digits that two jobs share exactly if they must give the same result.

        Names, places, attempts, parts, threads, shards, where fine-tunes run and whose code is
        trusted do not count; model, task, data, config, kind and ratio do.
        """
        decisive = {
            "model": self.model,
            "task": self.task,
            "data": self.data,
            "config": self.config,
            "kind": self.kind,
            "ratio": self.ratio,
            "runner": self.runner,
        }
        return hashlib.sha256(canonical_json(decisive).encode()).hexdigest()[:16]

    @property
    def pruning_config(self) -> PruningConfig:
        """The config as the dataclass that ``comp`` takes, with ``parts`` applied."""
        config = PruningConfig.from_dict(self.config)
        return dataclasses.replace(
            config,
            accumulate=config.accumulate * self.parts,
            eval_batch_size=max(1, config.eval_batch_size // self.parts),
        )

    def next_attempt(self) -> Self:
        """Returns the same job, to be sent to another worker."""
        return dataclasses.replace(self, attempt=self.attempt + 1)

    def split_further(self, factor: int) -> Self | None:
        """Returns the job with smaller parts; ``None`` if they cannot be ``factor`` times so."""
        if self.pruning_config.part_size % factor:
            return None
        return dataclasses.replace(self, parts=self.parts * factor)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; ``from_dict`` is the inverse."""
        return vars(self) | {"config": dict(self.config)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuilds a job from ``to_dict``'s output."""
        return cls(**values)


@dataclass(frozen=True)
class Record:
    """One durable result of a job and its place in the stream.

    Attributes:
        index: 0 for the job's first record, without gaps.
        body: A finished stage, or a point of the curve (the dense one first).
        time: Unix time in seconds when the body was finished; a replay keeps it.
        attempt: The attempt that computed it.
    """

    index: int
    body: StageRecord | CurvePoint
    time: float
    attempt: int = 0

    @property
    def stage(self) -> StageRecord | None:
        """The body if it is a stage."""
        return self.body if isinstance(self.body, StageRecord) else None

    @property
    def point(self) -> CurvePoint | None:
        """The body if it is a point of the curve."""
        return self.body if isinstance(self.body, CurvePoint) else None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; ``from_dict`` is the inverse."""
        return {
            "index": self.index,
            "kind": "stage" if isinstance(self.body, StageRecord) else "point",
            "time": self.time,
            "attempt": self.attempt,
            "body": self.body.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuilds a record from ``to_dict``'s output."""
        body_type = StageRecord if values["kind"] == "stage" else CurvePoint
        return cls(
            index=values["index"],
            body=body_type.from_dict(values["body"]),
            time=values["time"],
            attempt=values["attempt"],
        )


@dataclass(frozen=True)
class Fork:
    """A job that may run beside the one that yields this, from now on.

    Attributes:
        job: The fork. Naming one twice, also after it has ended, does no harm.
    """

    job: Job


@dataclass(frozen=True)
class Suspended:
    """The last item of a stream that goes on once the job's forks have ended.

    The worker is free meanwhile; the same job sent again, to any worker, takes it from here.
    """


@dataclass(frozen=True)
class JobEnd:
    """The last item of a complete stream.

    Attributes:
        num_records: How many records came before.
        digest: ``digest_of`` those records.
    """

    num_records: int
    digest: str


@dataclass(frozen=True)
class Failure:
    """Why a job will give no more records. What it has given stays on disk.

    Attributes:
        kind: ``"algorithm"``: the run itself raised (NaN loss, unreachable budget, bad input);
            ``"infrastructure"``: workers were lost more often than the budget allows;
            ``"timeout"``: stages took longer than the limit more often than that;
            ``"memory"``: host or GPU memory ran out, also with smaller parts of batches;
            ``"storage"``: the run directory cannot be written; ``"cancelled"``: somebody asked;
            ``"preempted"``: the worker's machine is taken away (executors retry that themselves).
        message: One sentence for a person.
        error: Name of the exception class, ``""`` if there was none.
        traceback: The worker's traceback, ``""`` if there was none; for logs, not for terminals.
        attempts: Attempts that were made.
    """

    kind: FailureKind
    message: str
    error: str = ""
    traceback: str = ""
    attempts: int = 1


@dataclass(frozen=True)
class Notice:
    """Something a person may want to know while a job goes on.

    Attributes:
        kind: ``"started"`` (a worker took the job), ``"forked"`` (one took a fork of it) or
            ``"retrying"`` (a worker was lost).
        message: One sentence.
        attempt: The attempt that starts now.
    """

    kind: Literal["started", "forked", "retrying"]
    message: str
    attempt: int = 0


def digest_of(records: Iterable[Record]) -> str:
    """Returns 16 hexadecimal digits over the records in their order."""
    sha = hashlib.sha256()
    for record in records:
        sha.update(canonical_json(record.to_dict()).encode())
    return sha.hexdigest()[:16]
