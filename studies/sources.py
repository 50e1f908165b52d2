"""Where compared curves come from: run directories, whole studies, MLflow tracking servers."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from comp.results import StageRecord
from comp.words import nearest
from orchestration.storage import Storage, absolute, join, parent
from orchestration.store import Run, list_runs, read_run
from orchestration.tracked import is_tracking_uri
from studies.curves import Curve, curve_of, settings_of
from studies.errors import SpecError
from studies.folder import StudyFolder
from studies.run_index import read_point_runs

if TYPE_CHECKING:
    from orchestration.tracking_reader import TrackedRun


@dataclass(frozen=True)
class Source:
    """A run, wherever it was read.

    Attributes:
        name: Its run id.
        curve: Its curve, ``None`` while it has no finished ratio.
        stages: Its stages, as far as they are known.
        run: Its directory, ``None`` if it was read from MLflow.
    """

    name: str
    curve: Curve | None
    stages: tuple[StageRecord, ...]
    run: Run | None = None

    @classmethod
    def of(cls, run: Run) -> "Source":
        """Makes a source of a run directory."""
        return cls(run.job.run_id, curve_of(run), tuple(run.stages), run)


def find_sources(
    names: Sequence[str],
    root: str | Path,
    *,
    experiments: Sequence[str] = (),
    with_stages: bool = False,
) -> list[Source]:
    """Finds runs by directory, run id, study or tracking server, each once, in the order named.

    Args:
        names: What a person typed.
        root: Where run ids and names of studies are looked up.
        experiments: On tracking servers, the only experiments to read; all if empty.
        with_stages: Read stages of whole studies and tracking servers too, a file or more a run.

    Raises:
        SpecError: If a name is none of these, or no run is found.
        TrackingError: If a tracking server cannot be read.
    """
    servers = [name for name in names if is_tracking_uri(name)]
    sources = []
    for name in names:
        if name in servers:
            sources += _from_server(name, experiments, with_stages=with_stages)
        else:
            sources += [Source.of(run) for run in find_runs([name], root, with_stages=with_stages)]
    unique = {source.run.location if source.run else source.name: source for source in sources}
    return list(unique.values())


def _from_server(uri: str, experiments: Sequence[str], *, with_stages: bool) -> list[Source]:
    from orchestration.tracking_reader import read_tracked

    tracked = read_tracked(uri, experiments, with_stages=with_stages)
    return [_of_tracked(run) for run in tracked]


def _of_tracked(run: "TrackedRun") -> Source:
    points = tuple(run.points)
    curve = None
    if any(point.method != "dense" for point in points):
        curve = Curve(run.name, points, run.study, run.trial, settings_of(run.params))
    return Source(run.name, curve, tuple(run.stages))


def find_runs(names: Sequence[str], root: str | Path, *, with_stages: bool = True) -> list[Run]:
    """Finds runs by directory, run id or study, each once and in the order named.

    Args:
        names: What a person typed.
        root: Where run ids and names of studies are looked up.
        with_stages: Read the stages of a study's runs too, from their own directories.

    Raises:
        SpecError: If a name is none of these.
    """
    found: dict[str, Run] = {}
    for name in names:
        for run in _runs(name, root, with_stages=with_stages):
            if run.job.kind == "prune":
                found.setdefault(run.location, run)
    if not found:
        raise SpecError(
            f"{', '.join(names)}: no pruning run has started there yet; name a study that has "
            "run, or run directories"
        )
    return list(found.values())


def _runs(name: str, root: str | Path, *, with_stages: bool) -> Iterator[Run]:
    for place in (name, join(root, "runs", name)):
        if Storage(place).exists("job.json"):
            yield read_run(place)
            return
    for place in (name, join(root, "studies", name)):
        if Storage(place).exists("study.json"):
            study = json.loads(Storage(place).read("study.json"))["name"]
            runs = read_point_runs(StudyFolder(absolute(parent(place, 2)), study))
            yield from (read_run(run.location) for run in runs) if with_stages else runs
            return
    if name not in ("", ".") and Storage(name).exists("runs"):
        yield from map(read_run, list_runs(join(name, "runs")))
        return
    known = [*Storage(join(root, "studies")).names(), *Storage(join(root, "runs")).names()]
    raise SpecError(
        f"{name!r} is no run directory, and no run or study under {root}{nearest(name, known)}"
    )
