"""Follows a study that another process runs, from its files alone and without disturbing it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from orchestration.executor import Event, Handle
from orchestration.job import JobEnd
from orchestration.lock import owner_of
from orchestration.progress import Progress
from orchestration.store import Run, list_runs, read_run
from studies.folder import StudyFolder
from studies.summary import StudySummary, summarize


@dataclass
class _Watched:
    """What of a run has been shown."""

    handle: Handle
    num_records: int = 0


@dataclass
class Watch:
    """Shows what a study's driver shows, one look after the other.

    Attributes:
        folder: The study.
        progress: Where to show it.
    """

    folder: StudyFolder
    progress: Progress
    _open: dict[str, _Watched] = field(default_factory=dict, init=False)
    _ended: set[str] = field(default_factory=set, init=False)

    def look(self, *, quietly: bool = False) -> None:
        """Shows what is new.

        Args:
            quietly: Leave out runs that have ended; for the first look.
        """
        for location in list_runs(self.folder.runs):
            if location in self._ended:
                continue
            run = read_run(location)
            if run.job.study != self.folder.name or (quietly and run.outcome != "unfinished"):
                self._ended.add(location)
            else:
                self._show(location, run)

    def _show(self, location: str, run: Run) -> None:
        watched = self._open.setdefault(location, _Watched(Handle(run.job)))
        for record in run.records[watched.num_records :]:
            self.progress.update(Event(watched.handle, record))
        watched.num_records = len(run.records)
        if run.outcome != "unfinished":
            end = run.failure or JobEnd(len(run.records), "")
            self.progress.update(Event(watched.handle, end))
            self._ended.add(location)


def watch(
    folder: StudyFolder,
    progress: Progress,
    *,
    seconds: float = 1.0,
    sleep: Callable[[float], object] = time.sleep,
) -> StudySummary:
    """Shows a study's progress until no driver runs it any more.

    Args:
        folder: The study.
        progress: Where to show it.
        seconds: Between two looks.
        sleep: Waits.

    Returns:
        Where the study stands then.
    """
    view = Watch(folder, progress)
    view.look(quietly=True)
    while owner_of(folder.location) is not None:
        sleep(seconds)
        view.look()
    return summarize(folder)
