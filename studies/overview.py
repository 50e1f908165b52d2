"""What a running study looks like from another terminal; read from files (and the database)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from orchestration.lock import owner_of
from orchestration.progress import show_seconds
from orchestration.store import read_run
from studies.folder import StudyFolder
from studies.goals import objective_name
from studies.pulse import Pulse, read_pulse
from studies.report import params_text, value_text
from studies.spec import StudySpec
from studies.summary import StudyReader, StudySummary, TrialSummary


@dataclass(frozen=True)
class LiveRun:
    """A run under way.

    Attributes:
        trial: Number of its trial.
        run: Run id.
        stage: Its last finished stage, 0 before the first.
        planned: Stages planned.
        mode: What that stage pruned.
        ratio: FLOPs ratio reached.
        target: The largest ratio asked for.
        val: Validation metric after that stage; ``None`` before the first.
        since: Unix time of its last record; ``None`` before the first.
    """

    trial: int
    run: str
    stage: int
    planned: int
    mode: str
    ratio: float
    target: float
    val: float | None
    since: float | None


@dataclass(frozen=True)
class View:
    """A study at one moment.

    Attributes:
        spec: What was asked.
        summary: The trials.
        live: The runs of trials that are not over.
        owner: Host and process id of whoever holds the study; ``None`` if nobody does.
        pulse: The driver's last sign of life.
    """

    spec: StudySpec
    summary: StudySummary
    live: tuple[LiveRun, ...]
    owner: tuple[str, int] | None
    pulse: Pulse | None

    @property
    def is_driven(self) -> bool:
        """Whether a driver is at work.

        From another host nobody can tell whether it still holds the study, so that one that has
        fallen silent counts as dead; one that just began has not spoken yet.
        """
        if self.owner is None:
            return False
        is_of_owner = self.pulse is not None and (self.pulse.host, self.pulse.pid) == self.owner
        return not is_of_owner or (self.pulse is not None and self.pulse.is_fresh)

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the trials that are over; ``None`` before the first or without one."""
        minutes = [t.minutes for t in self.summary.trials if t.minutes and not t.copied_from]
        left = self.spec.n_trials - self.summary.num_ended
        if not minutes or left <= 0:
            return None
        return 60 * sum(minutes) / len(minutes) * left / self.spec.parallel

    @property
    def seconds_to_deadline(self) -> float | None:
        """Time until the driver stops by itself; ``None`` without a deadline or a driver."""
        if self.pulse is None or self.spec.deadline_minutes is None:
            return None
        return max(0.0, self.pulse.began + 60 * self.spec.deadline_minutes - time.time())


class Watcher:
    """Looks at a study again and again.

    Args:
        folder: Where it was started.
    """

    def __init__(self, folder: StudyFolder) -> None:
        self._folder = folder
        self._reader = StudyReader(folder)

    def look(self) -> View:
        """Returns the study as it is now.

        Raises:
            StorageUnreachable: If its storage cannot be read.
        """
        summary = self._reader.read()
        running = [trial for trial in summary.trials if trial.state == "running"]
        found = [_live_run(self._folder, t, run) for t in running for run in t.runs]
        live = tuple(run for run in found if run is not None)
        owner = owner_of(self._folder.location)
        return View(self._reader.spec, summary, live, owner, read_pulse(self._folder))


def _live_run(folder: StudyFolder, trial: TrialSummary, run_id: str) -> LiveRun | None:
    try:
        run = read_run(folder.run(run_id))
    except FileNotFoundError:
        return None  # it waits for a worker
    if run.outcome == "finished":
        return None
    config, last = run.job.pruning_config, run.stages[-1] if run.stages else None
    return LiveRun(
        trial=trial.number,
        run=run_id,
        stage=last.stage if last else 0,
        planned=max(config.num_stages, last.stage if last else 0),
        mode=last.mode.replace("_", " ") if last else "",
        ratio=last.ratio if last else 0.0,
        target=config.ratios[-1],
        val=last.val if last else None,
        since=run.records[-1].time if run.records else None,
    )


def headline(view: View) -> str:
    """Returns how far a study is, in one line."""
    summary = view.summary
    counts = ", ".join(f"{number} {state}" for state, number in summary.counts.items())
    parts = [f"{summary.num_ended} of {summary.n_trials} trials over ({counts or 'none yet'})"]
    if view.seconds_left is not None and view.is_driven:
        parts.append(f"about {show_seconds(view.seconds_left)} left")
    if view.seconds_to_deadline is not None and view.is_driven:
        parts.append(f"deadline in {show_seconds(view.seconds_to_deadline)}")
    return "; ".join(parts)


def driver_line(view: View) -> str:
    """Returns who drives a study and what the cluster has, in one line."""
    name = view.spec.name
    if not view.is_driven:
        go_on = f"'comp study resume {name}' goes on"
        return "finished" if view.summary.is_finished else f"no driver is at work; {go_on}"
    assert view.owner is not None
    have = view.pulse.resources if view.pulse else {}
    used = [f"{n} {use:g} of {total:g}" for n, (use, total) in have.items()]
    place = f"driver: process {view.owner[1]} on {view.owner[0]}"
    return "; ".join([place, *(["in use: " + ", ".join(used)] if used else [])])


def best_line(view: View) -> str:
    """Returns the best trial so far, in one line."""
    best = view.summary.best
    if best is None:
        return view.summary.why_no_best
    values = ", ".join(
        f"{measure.label} {value_text(best, index)}"
        for index, measure in enumerate(view.spec.objective)
    )
    return f"best: trial {best.number}, {values} ({params_text(best)})"


def opening(view: View) -> list[str]:
    """Returns the lines that a log begins with."""
    spec = view.spec
    title = f"{spec.name}: {spec.model} on {spec.task}, {objective_name(spec.objective)}"
    head = [title, headline(view), driver_line(view), best_line(view)]
    return [*head, *map(run_line, view.live)]


def changes(before: View, after: View) -> list[str]:
    """Returns a line for everything that happened between two looks."""
    old = {trial.number: trial.state for trial in before.summary.trials}
    lines = []
    for trial in after.summary.trials:
        if old.get(trial.number) != trial.state and trial.state != "waiting":
            lines.append(_trial_line(trial, after))
    stages = {run.run: run.stage for run in before.live}
    for run in after.live:
        if run.stage and run.stage != stages.get(run.run, 0):
            lines.append(run_line(run))
    if lines and after.summary.best != before.summary.best:
        lines.append(best_line(after))
    if after.is_driven != before.is_driven:
        lines.append(driver_line(after))
    return lines


def _trial_line(trial: TrialSummary, view: View) -> str:
    text = f"trial {trial.number} {trial.state}"
    if trial.values:
        text += " " + ", ".join(value_text(trial, i) for i in range(len(trial.values)))
    if trial.reason:
        text += f": {trial.reason}"
    ended = trial.state not in ("running", "waiting")
    return f"{text} [{headline(view)}]" if ended else f"{text} ({params_text(trial)})"


def run_line(run: LiveRun) -> str:
    """Returns how far a run is, in one line."""
    return "  ".join(run_cells(run))


def run_cells(run: LiveRun) -> Sequence[str]:
    """Returns how far a run is, as the cells of a table."""
    return (
        f"trial {run.trial}",
        f"stage {run.stage}/{run.planned}",
        run.mode or "dense model",
        f"ratio {run.ratio:.2f}/{run.target:.2f}",
        "" if run.val is None else f"val {run.val:.2f}",
    )
