"""Puts a spec together with an executor, MLflow, progress lines and Ctrl-C, and runs it."""

import contextlib
import dataclasses
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from orchestration.executor import Event, Executor, InlineExecutor
from orchestration.job import DEFAULT_RUNNER, Failure, Job, JobEnd, Record
from orchestration.lock import LockHeld, hold_location
from orchestration.progress import Progress
from orchestration.storage import Storage, last_name
from orchestration.store import Run, list_runs, read_run
from orchestration.tracked import SCORES, TrackingError
from orchestration.tracking import PLOTS, UNSYNCED, MlflowTracker, NullTracker, Tracker
from studies.curves import area, curve_of
from studies.driver import Consumer, Outcome, run_study
from studies.folder import StudyFolder
from studies.jobs import SINGLE_RUNS, prune_job
from studies.objectives import measure_curve
from studies.pool import on_ray
from studies.pulse import leaving_pulse
from studies.spec import PruneSpec, RunSpec, StudySpec
from studies.specfile import tracking_uri
from studies.stopping import StopSwitch, stop_on_signals

_log = logging.getLogger(__name__)

CLOSE_SECONDS = 30.0  # without any progress, after which MLflow is left as it is


def conduct_study(
    spec: StudySpec,
    *,
    inline: bool = False,
    runner: str = DEFAULT_RUNNER,
    trust_remote_code: bool = False,
) -> Outcome:
    """Runs or continues a study with all that a person expects around it.

    Args:
        spec: The checked spec, with absolute places.
        inline: Run one trial after the other in this process instead of on Ray.
        runner: See ``Job.runner``.
        trust_remote_code: See ``Job.trust_remote_code``.

    Raises:
        LockHeld: If another driver has the study.
        SpecError: If the study was started with another spec.
        StudyFailed: If the study cannot go on.
        ClusterError: If there is no Ray to run on.
    """
    switch = StopSwitch()

    @contextlib.contextmanager
    def open_executor() -> Iterator[Executor]:
        folder, pool = StudyFolder.of(spec), InlineExecutor() if inline else on_ray(spec)
        with (  # while the study is ours, so that MLflow has one writer
            leaving_pulse(folder, _no_cluster if inline else _cluster),
            contextlib.closing(Mirror(spec, spec.name)) as mirror,
        ):
            mirror.catch_up(folder)
            consumers.append(mirror)
            with pool as executor, stop_on_signals(switch, progress.print):
                yield executor

    with showing_progress() as progress:
        consumers: list[Consumer] = [progress.update]
        return run_study(
            spec,
            open_executor,
            consumers,
            should_stop=switch.is_pressed,
            runner=runner,
            trust_remote_code=trust_remote_code,
        )


def _no_cluster() -> dict[str, tuple[float, float]]:
    return {}


def _cluster() -> dict[str, tuple[float, float]]:
    from orchestration.cluster import use_of_resources

    return use_of_resources()


def conduct_run(
    spec: PruneSpec, *, runner: str = DEFAULT_RUNNER, trust_remote_code: bool = False
) -> JobEnd | Failure:
    """Runs or continues a single run in this process.

    Args:
        spec: The checked spec, with absolute places.
        runner: See ``Job.runner``.
        trust_remote_code: See ``Job.trust_remote_code``.

    Raises:
        LockHeld: If another process has the run.
    """
    switch = StopSwitch()
    job = dataclasses.replace(prune_job(spec, runner), trust_remote_code=trust_remote_code)
    with (
        hold_location(job.run_dir, spec.name),
        showing_progress() as progress,
        contextlib.closing(Mirror(spec, SINGLE_RUNS)) as mirror,
        stop_on_signals(switch, progress.print),
        InlineExecutor() as executor,
    ):
        handle = executor.submit(job)
        for event in executor.events():
            progress.update(event)
            mirror(event)
            if switch.is_pressed():
                executor.cancel(handle)
            if isinstance(event.body, (JobEnd, Failure)):
                return event.body
    raise RuntimeError(f"run {job.run_id} ended without a last word")


@contextlib.contextmanager
def showing_progress() -> Iterator[Progress]:
    """Gives progress lines on standard error and erases the live ones at the end."""
    progress = Progress()
    try:
        yield progress
    finally:
        progress.close()


class Mirror:
    """A consumer of events that keeps MLflow up to date.

    Args:
        spec: Says where MLflow is, if anywhere.
        experiment: Its name there.

    Raises:
        ValueError: If MLflow could not keep runs at its address.
    """

    def __init__(self, spec: RunSpec, experiment: str) -> None:
        self._spec = spec
        self._tracker: Tracker = NullTracker()
        if spec.tracking.enabled:
            self._tracker = MlflowTracker(
                tracking_uri(spec),
                experiment,
                study=isinstance(spec, StudySpec),
                system_metrics=spec.tracking.system_metrics,
            )
        # A plot would take half a second of the driver's loop.
        self._scorer = ThreadPoolExecutor(1, "scores")

    def __call__(self, event: Event) -> None:
        """Takes one event in."""
        job = event.handle.job
        if isinstance(event.body, JobEnd) and job.kind == "prune":
            self._scorer.submit(self._score, job)
        elif isinstance(event.body, (Record, JobEnd, Failure)):
            self._tracker.touch(job.run_dir)

    def _score(self, job: Job) -> None:
        try:
            add_scores(job, self._spec)
        except Exception as error:
            _log.warning("run %s has no scores and no plot: %s", job.run_id, error)
        self._tracker.touch(job.run_dir)

    def catch_up(self, folder: StudyFolder) -> None:
        """Sends what an earlier driver did not: it was killed, or MLflow was down.

        Without this a run whose trial was told stays "running" in MLflow, since nobody touches
        it again.
        """
        if self._spec.tracking.enabled:
            for run in unsent_runs(folder):
                self._take_up(run)

    def _take_up(self, run: Run) -> None:
        is_whole = run.outcome == "finished" and run.job.kind == "prune"
        if is_whole and not Storage(run.location).exists(SCORES):
            self._scorer.submit(self._score, run.job)
        else:
            self._tracker.touch(run.location)

    def close(self) -> None:
        """Sends what is left, or gives up after a while without progress."""
        self._scorer.shutdown()
        self._tracker.close(timeout=CLOSE_SECONDS)


def send_missed(spec: StudySpec) -> None:
    """Sends what MLflow lacks of a study that needs no driver any more; waits a bounded time."""
    folder = StudyFolder.of(spec)
    if spec.tracking.enabled and unsent_runs(folder):
        mirror = contextlib.closing(Mirror(spec, spec.name))
        with contextlib.suppress(LockHeld), folder.hold(), mirror as sender:
            sender.catch_up(folder)


REPORT_FILES = ("spec.yaml", "report.md", "report.json", "curves.png", "curves.parquet")


def send_report(folder: StudyFolder, metrics: Mapping[str, float]) -> None:
    """Puts a study's report into its own run in MLflow, or says in one line why it is not there.

    Args:
        folder: The study, its report written.
        metrics: Numbers by name.
    """
    spec = folder.read_spec()
    if not spec.tracking.enabled:
        return
    tracker = MlflowTracker(tracking_uri(spec), spec.name)
    with tempfile.TemporaryDirectory() as scratch:
        files = []
        for name in REPORT_FILES:
            if folder.storage.exists(name):
                files.append(Path(scratch) / name)
                files[-1].write_bytes(folder.storage.read(name))
        try:
            tracker.send_study(files, metrics)
        except TrackingError as error:
            _log.warning("%s; the study's report is on disk only", error)


def add_scores(job: Job, spec: RunSpec) -> None:
    """Puts what only the whole curve tells beside a finished run: scores and a plot."""
    from studies.plots import plot_runs

    curve = curve_of(read_run(job.run_dir))
    if curve is None:
        return
    scores = {"curve_auc": area(curve, curve.ratios[0], curve.ratios[-1])}
    if isinstance(spec, StudySpec):
        with contextlib.suppress(ValueError):  # the trial fails and says so
            scores["objective"] = measure_curve(spec.objective[0], curve)
    storage = Storage(job.run_dir)
    storage.write(SCORES, (json.dumps(scores) + "\n").encode())

    def draw(target: Path) -> None:
        target.mkdir(parents=True)
        plot_runs([curve], target / "curve", title=f"{job.run_id}: {job.model} on {job.task}")

    storage.write_tree(PLOTS, draw)


def sync_study(folder: StudyFolder, *, everything: bool = False) -> tuple[list[str], int]:
    """Sends what MLflow lacks of a study's runs, now.

    Args:
        folder: The study.
        everything: Send all runs, as to an MLflow that was emptied; what is there stays single.

    Returns:
        The run ids that were sent, and the number of runs that the study has.

    Raises:
        LockHeld: If a driver has the study, which sends by itself.
        TrackingError: If MLflow does not take it.
        ValueError: If its address is wrong.
    """
    spec = folder.read_spec()
    tracker = MlflowTracker(tracking_uri(spec), spec.name)
    sent = []
    with folder.hold():  # MLflow has one writer a study
        mine = runs_of(folder)
        for location in mine:
            if everything or Storage(location).exists(UNSYNCED):
                tracker.sync(location)
                sent.append(last_name(location))
    return sent, len(mine)


def unsent_runs(folder: StudyFolder) -> list[Run]:
    """Returns a study's runs of which MLflow may lack something."""
    marked = [path for path in list_runs(folder.runs) if Storage(path).exists(UNSYNCED)]
    return [run for run in map(read_run, marked) if run.job.study == folder.name]


def runs_of(folder: StudyFolder) -> Sequence[str]:
    """Returns the locations of a study's runs, the dense reference included."""
    locations = list_runs(folder.runs)
    return [path for path in locations if read_run(path).job.study == folder.name]
