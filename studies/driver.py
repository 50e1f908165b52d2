"""The loop of a study: asks for configs, hands jobs to an executor, tells what came back.

A trial is told from the validation values of ``CurvePoint``s alone, and only after every one of
its jobs ended with a complete stream. The dense reference runs first; the trials get its point.
"""

import dataclasses
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from comp.results import CurvePoint
from orchestration.executor import Event, Executor, Handle
from orchestration.job import DEFAULT_RUNNER, Failure, Job, JobEnd, Record
from orchestration.store import RunMismatch, write_failure
from studies.curves import Curve
from studies.folder import StudyFolder
from studies.jobs import cell_of, dense_job, trial_jobs
from studies.objectives import judge
from studies.run_index import IndexWriter, write_index
from studies.spec import StudySpec
from studies.stage_reports import Report, StageReports
from studies.study import OpenTrial, Study

MAX_FAILURES_IN_A_ROW = 3
POLL_SECONDS = 0.5

logger = logging.getLogger(__name__)


class StudyFailed(RuntimeError):
    """A study does not go on: its dense reference failed, or trial after trial does."""


Consumer = Callable[[Event], object]  # told of every event of every job, in order


@dataclass(frozen=True)
class Outcome:
    """How one call of the driver ended.

    Attributes:
        why: ``"finished"``, ``"interrupted"`` or ``"deadline"``.
        counts: Trials by state.
    """

    why: str
    counts: dict[str, int]


def run_study(
    spec: StudySpec,
    open_executor: Callable[[], AbstractContextManager[Executor]],
    consumers: Sequence[Consumer] = (),
    *,
    should_stop: Callable[[], bool] = lambda: False,
    runner: str = DEFAULT_RUNNER,
    trust_remote_code: bool = False,
) -> Outcome:
    """Runs or continues a study as its only driver.

    Args:
        spec: The checked spec, with absolute places.
        open_executor: Called once the study is this driver's.
        consumers: Told of every event: progress lines, MLflow. ``open_executor`` may add some.
        should_stop: See ``Driver``.
        runner: See ``Job.runner``.
        trust_remote_code: See ``Job.trust_remote_code``.

    Raises:
        LockHeld: If another driver has the study.
        SpecError: If the study was started with another spec.
        StudyFailed: See ``Driver.run``.
    """
    folder = StudyFolder.of(spec)
    with folder.hold():
        folder.freeze(spec)
        with open_executor() as executor, executor.hold(spec.name):
            consumers = [*consumers, IndexWriter(folder)]
            driver = Driver(
                spec,
                executor,
                consumers,
                should_stop=should_stop,
                runner=runner,
                trust_remote_code=trust_remote_code,
            )
            outcome = driver.run()
        write_index(folder)
        return outcome


@dataclass(eq=False)
class _Running:
    """A trial under way: points by seed, and the seeds whose job has not ended.

    ``told`` is why it is over before its jobs are: ``"fail"`` or ``"pruned"``.
    """

    trial: OpenTrial
    points: dict[int, list[CurvePoint]]
    open_seeds: set[int]
    reports: StageReports
    told: str = ""


@dataclass
class Driver:
    """Runs a study to its end, to its deadline, or until it is asked to stop.

    Attributes:
        spec: The checked spec, with absolute places.
        executor: An entered executor with ``spec.parallel`` slots.
        consumers: Told of every event.
        should_stop: Asked between events; the first ``True`` stops the study softly: every job
            is cancelled after its next durable record, and its trial stays RUNNING for the next
            driver to adopt.
        clock: Seconds; for the deadline.
        runner: What the workers run, see ``Job.runner``.
        trust_remote_code: See ``Job.trust_remote_code``.
    """

    spec: StudySpec
    executor: Executor
    consumers: Sequence[Consumer] = ()
    should_stop: Callable[[], bool] = lambda: False
    clock: Callable[[], float] = time.monotonic
    runner: str = DEFAULT_RUNNER
    trust_remote_code: bool = False
    _queue: deque[tuple[_Running, Job]] = field(default_factory=deque, init=False)
    _live: dict[Handle, _Running | None] = field(default_factory=dict, init=False)
    _dense: dict[str, CurvePoint] = field(default_factory=dict, init=False)  # by cell
    _failures: int = field(default=0, init=False)
    _why: str = field(default="", init=False)

    def run(self) -> Outcome:
        """Runs until there is nothing left to do or a reason to stop.

        Raises:
            StudyFailed: If the dense reference or three trials in a row fail, or a run
                directory cannot be written or belongs to another spec.
        """
        minutes = self.spec.deadline_minutes or float("inf")
        self._deadline = self.clock() + 60 * minutes
        self._study = Study(self.spec)
        for cell in self.spec.cells:
            self._submit(None, dense_job(self.spec, self.runner, cell))
        self._loop()
        if not self._why:
            for trial in self._study.adopt():
                logger.info("trial %d of an earlier driver goes on", trial.number)
                self._enqueue(trial)
            self._fill()
            self._loop(refill=True)
        return Outcome(self._why or "finished", self._study.counts())

    def _loop(self, *, refill: bool = False) -> None:
        while self._live:
            self._check_stop()
            for event in self.executor.poll(timeout=POLL_SECONDS):
                self._take(event)
            if refill and not self._why:
                self._fill()

    def _check_stop(self) -> None:
        if self._why:
            return
        if self.should_stop():
            self._why = "interrupted"
        elif self.clock() >= self._deadline:
            self._why = "deadline"
        if self._why:
            self._queue.clear()

    def _fill(self) -> None:
        while self.executor.free_slots > 0:
            if not self._queue and (trial := self._study.ask()) is not None:
                self._enqueue(trial)
            if not self._queue:
                return
            self._submit(*self._queue.popleft())

    def _enqueue(self, trial: OpenTrial) -> None:
        spec, dense = self.spec.in_cell(trial.cell), self._dense[trial.cell]
        jobs = trial_jobs(spec, trial.number, trial.config, dense, self.runner)
        trial.note(runs=[job.run_id for job in jobs])
        seeds = [job.seed for job in jobs]
        points: dict[int, list[CurvePoint]] = {seed: [] for seed in seeds}
        running = _Running(trial, points, set(seeds), StageReports(self.spec))
        self._queue.extend((running, job) for job in jobs)

    def _submit(self, running: _Running | None, job: Job) -> None:
        job = dataclasses.replace(job, trust_remote_code=self.trust_remote_code)
        self._live[self.executor.submit(job)] = running

    def _take(self, event: Event) -> None:
        for consumer in self.consumers:
            consumer(event)
        running, body, job = self._live[event.handle], event.body, event.handle.job
        if self._why and not isinstance(body, (JobEnd, Failure)):
            self.executor.cancel(event.handle)  # its current stage is durable now
        if isinstance(body, Record):
            self._take_record(running, job, body)
        elif isinstance(body, (JobEnd, Failure)):
            del self._live[event.handle]
            if running is None:
                self._end_dense(job, body)
            else:
                self._end(running, job, body)

    def _take_record(self, running: _Running | None, job: Job, record: Record) -> None:
        if running is None:
            if record.point is not None:
                self._dense[cell_of(self.spec, job)] = record.point
            return
        if record.point is not None:
            running.points[job.seed].append(record.point)
        self._report(running, running.reports.take(job.seed, record.body))

    def _report(self, running: _Running, reports: list[Report]) -> None:
        """Passes intermediate values on, and stops the trial where the pruner says so."""
        for step, value in reports:
            if running.told:
                return
            if not math.isfinite(value):  # a pruner would stop the trial and hide the reason
                reason = (
                    f"the validation value of ratio {step / 1000:g} is {value}, which is no "
                    "number; see the stages of its runs"
                )
                self._fail(running, reason, "algorithm")
                return
            running.trial.report(step, value)
            if self.spec.pruner is not None and running.trial.should_prune():
                self._prune(running, step)

    def _prune(self, running: _Running, step: int) -> None:
        assert self.spec.pruner is not None
        is_seed = self.spec.pruner.kind == "wilcoxon"
        where = f"seed {self.spec.seeds[step]}" if is_seed else f"ratio {step / 1000:g}"
        reason = f"stopped by the {self.spec.pruner.kind} pruner at {where}"
        running.told = "pruned"
        running.trial.prune(reason)
        logger.info("trial %d %s", running.trial.number, reason)
        for handle in [handle for handle, owner in self._live.items() if owner is running]:
            write_failure(handle.job.run_dir, Failure("cancelled", reason))  # MLflow: KILLED
        self._cancel(running)
        self._failures = 0

    def _end_dense(self, job: Job, body: JobEnd | Failure) -> None:
        if self._why or (isinstance(body, JobEnd) and cell_of(self.spec, job) in self._dense):
            return
        reason = body.message if isinstance(body, Failure) else "it ended without a result"
        raise StudyFailed(f"the dense reference {job.run_id} failed: {reason}")

    def _end(self, running: _Running, job: Job, body: JobEnd | Failure) -> None:
        if running.told:
            return
        if isinstance(body, Failure):
            reason = f"run {job.run_id}: {body.message}"
            if body.kind == "storage" or body.error == RunMismatch.__name__:
                raise StudyFailed(reason)  # no fault of the trial, which stays to be adopted
            if body.kind != "cancelled":
                self._fail(running, reason, body.kind)
            return
        running.open_seeds.discard(job.seed)
        try:
            self._report(running, running.reports.end(job.seed, running.points[job.seed]))
            if not running.open_seeds and not running.told:
                self._tell(running)
        except ValueError as error:
            self._fail(running, str(error), "algorithm")

    def _tell(self, running: _Running) -> None:
        curves = {
            seed: Curve(f"seed {seed}", tuple(points)) for seed, points in running.points.items()
        }
        verdict = judge(self.spec.objective, self.spec.constraints, curves)
        running.trial.note(by_seed={str(seed): v for seed, v in verdict.by_seed.items()})
        running.trial.complete(verdict.values, verdict.excess)
        self._failures = 0

    def _cancel(self, running: _Running) -> None:
        """Ends the other jobs of a trial; what they have finished stays."""
        self._queue = deque(item for item in self._queue if item[0] is not running)
        for handle in [handle for handle, owner in self._live.items() if owner is running]:
            self.executor.cancel(handle)

    def _fail(self, running: _Running, reason: str, kind: str) -> None:
        running.told = "fail"
        running.trial.fail(reason, kind)
        logger.warning("trial %d failed: %s", running.trial.number, reason)
        self._cancel(running)
        self._failures += 1
        if self._failures >= MAX_FAILURES_IN_A_ROW:
            raise StudyFailed(
                f"{self._failures} trials in a row failed, the last one so: {reason}; mend that, "
                "and the same command goes on with the next trial"
            )
