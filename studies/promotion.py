"""Registering a pruned model of a study, so that others find it by name."""

from dataclasses import dataclass

from orchestration.store import Run, read_run
from orchestration.tracking import MlflowTracker
from studies.errors import SpecError
from studies.folder import StudyFolder
from studies.specfile import tracking_uri
from studies.summary import TrialSummary, summarize


@dataclass(frozen=True)
class Promotion:
    """A registered model.

    Attributes:
        name: Its name in the registry.
        version: Its version there.
        run: The run it is from.
        ratio: The FLOPs ratio that was asked for.
        val: Its validation metric.
    """

    name: str
    version: str
    run: str
    ratio: float
    val: float

    @property
    def uri(self) -> str:
        """What MLflow loads it by."""
        return f"models:/{self.name}/{self.version}"


def promote(
    folder: StudyFolder, *, trial: int | None = None, ratio: float | None = None, name: str = ""
) -> Promotion:
    """Registers the model of a trial at a ratio; of several seeds the best by validation.

    Args:
        folder: The study.
        trial: Optuna's number; the best trial if ``None``.
        ratio: One of the ratios that were asked for; the largest if ``None``.
        name: In the registry; the study's if empty.

    Raises:
        SpecError: If there is no such trial or ratio, or the study does not use MLflow.
        TrackingError: If MLflow does not take it.
    """
    spec = folder.read_spec()
    if not spec.tracking.enabled:
        raise SpecError(
            f"study {folder.name!r} has tracking.enabled: false, so it has no registry"
        )
    chosen = _trial(folder, trial)
    runs = [read_run(folder.run(run_id)) for run_id in chosen.runs]
    finished = [run for run in runs if run.outcome == "finished"]
    if not finished:
        raise SpecError(f"trial {chosen.number} of study {folder.name!r} has no finished run")
    asked = sorted({p.ratio_asked for run in finished for p in run.points if p.ratio_asked > 0})
    at = asked[-1] if ratio is None else ratio
    able = [(value, run) for run in finished if (value := _val(run, at)) is not None]
    if not able:
        shown = ", ".join(f"{one:g}" for one in asked)
        raise SpecError(f"trial {chosen.number} has no model at ratio {at:g}; it has {shown}")
    val, run = max(able, key=lambda pair: pair[0])
    tracker = MlflowTracker(tracking_uri(spec), spec.name)
    name = name or folder.name
    version = tracker.register(run.location, at, name)
    return Promotion(name, version, run.job.run_id, at, val)


def _trial(folder: StudyFolder, number: int | None) -> TrialSummary:
    summary = summarize(folder)
    if number is None:
        if summary.best is None:
            raise SpecError(summary.why_no_best)
        return summary.best
    for trial in summary.trials:
        if trial.number == number and trial.runs:
            return trial
    raise SpecError(f"study {folder.name!r} has no trial {number} with runs")


def _val(run: Run, ratio: float) -> float | None:
    values = [p.val for p in run.points if p.ratio_asked and abs(p.ratio_asked - ratio) < 5e-4]
    return values[0] if values else None
