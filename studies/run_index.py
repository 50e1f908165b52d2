"""The points of a study's finished runs in one file, so that thousands are read in seconds.

The run directories stay the truth: an entry counts only while the run's manifest has the size and
the time that it had then, and runs without an entry are read from their own directories. The
study's driver adds a line to the file, ``runs.jsonl``, whenever a run ends; roots that are URIs
have none.

Most of the time of reading goes into parsing, and the jobs of a study differ in little. So a line
that names another one with ``like`` holds only what its job has of its own.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from orchestration.executor import Event
from orchestration.job import Job, JobEnd, Record
from orchestration.storage import Storage, is_remote
from orchestration.store import Run, read_header, read_run
from studies.folder import StudyFolder

INDEX = "runs.jsonl"
_MAY_BE_EMPTY = ("layers", "details", "outcomes")  # fields of a point with an empty default


def read_point_runs(folder: StudyFolder) -> list[Run]:
    """Returns the runs of a study by name, with their points, without stages and specs."""
    return list(_read(folder)[0].values())


class IndexWriter:
    """A consumer of events that adds runs that end to the file; only the study's driver may.

    Args:
        folder: The study.
    """

    def __init__(self, folder: StudyFolder) -> None:
        self._path = None if is_remote(folder.root) else folder.path / INDEX
        self._lines = _Lines()

    def __call__(self, event: Event) -> None:
        """Takes one event in."""
        if self._path is None or not isinstance(event.body, JobEnd):
            return
        with contextlib.suppress(OSError):  # the file only saves time, and the end mends it
            line = self._lines.of(_with_points_alone(read_run(event.handle.job.run_dir)))
            with self._path.open("ab") as stream:
                stream.write(line.encode())


def write_index(folder: StudyFolder) -> None:
    """Brings the file up to date; only the study's driver may.

    Raises:
        StorageError: If the folder cannot be written.
    """
    runs, is_current = _read(folder)
    if is_remote(folder.root) or is_current:
        return
    lines = _Lines()
    text = "".join(lines.of(run) for run in runs.values() if run.outcome == "finished")
    folder.storage.write(INDEX, text.encode())


def _read(folder: StudyFolder) -> tuple[dict[str, Run], bool]:
    """Returns the runs by name, and whether the file had all that are finished."""
    known, is_current = _entries(folder), True
    runs, place = {}, folder.runs
    for name in _names(folder):
        location = f"{place}/{name}"  # ten thousand times; ``join`` takes a tenth of a millisecond
        entry, stamp = known.get(name), _stamp(location)
        if entry is not None and entry["stamp"] == stamp:
            runs[name] = _run_of(location, entry)
            continue
        header = read_header(location)
        if header is None or header["job"]["study"] != folder.name:
            continue
        runs[name] = _with_points_alone(read_run(location))
        is_current = is_current and runs[name].outcome != "finished"
    return runs, is_current


def _with_points_alone(run: Run) -> Run:
    points = tuple(record for record in run.records if record.point is not None)
    return dataclasses.replace(run, records=points, job=dataclasses.replace(run.job, spec_text=""))


def _names(folder: StudyFolder) -> Iterable[str]:
    """Returns what may be runs of the study: a driver names them after it."""
    return [name for name in Storage(folder.runs).names() if name.startswith(f"{folder.name}-")]


def _stamp(location: str) -> list[int] | None:
    if is_remote(location):
        return None
    try:
        found = os.stat(f"{location}/manifest.json")  # noqa: PTH116 - a Path takes as long again
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [found.st_mtime_ns, found.st_size]


def _entries(folder: StudyFolder) -> dict[str, dict[str, Any]]:
    if is_remote(folder.root) or not folder.storage.exists(INDEX):
        return {}
    entries: dict[str, dict[str, Any]] = {}
    whole: dict[str, dict[str, Any]] = {}
    for line in folder.storage.read(INDEX).splitlines():
        # A line that is being written, or never was, and those that are like it.
        with contextlib.suppress(ValueError, KeyError):
            entry = json.loads(line)
            if "key" in entry:
                whole[entry["key"]] = entry
            if "like" in entry:
                entry |= _shared(entry, whole[entry["like"]])
            entries[entry["name"]] = entry
    return entries


def _shared(entry: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Returns job and environment of a line that leaves out what the other line says too."""
    job = other["job"] | entry["job"]
    job["config"] = other["job"]["config"] | entry["job"].get("config", {})
    return {"job": job, "environment": other["environment"] | entry["environment"]}


class _Lines:
    """Writes lines, each kind of job as it differs from the first one of its kind."""

    def __init__(self) -> None:
        self._first: dict[str, dict[str, Any]] = {}

    def of(self, run: Run) -> str:
        """Returns the line of a run."""
        job = run.job.to_dict()
        del job["run_dir"], job["spec_text"]  # nobody asks for them here
        entry = {
            "name": run.job.run_id,
            "stamp": _stamp(run.location),
            "uid": run.uid,
            "created": run.created,
            "job": job,
            "records": [_without_blanks(record.to_dict()) for record in run.records],
            "environment": run.environment,
        }
        first = self._first.setdefault(run.job.kind, entry)
        if first is not entry and _is_alike(entry, first):
            environment = _own(run.environment, first["environment"])
            entry |= {"job": _own_of_job(job, first["job"]), "environment": environment}
            entry["like"] = first["key"]
        else:
            entry["key"] = f"{run.job.run_id} {run.uid}"
        return json.dumps(entry) + "\n"


def _is_alike(entry: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tells whether two lines have the same fields, so that leaving one out is no ambiguity."""
    return all(
        one.keys() == two.keys()
        for one, two in (
            (entry["job"], other["job"]),
            (entry["job"]["config"], other["job"]["config"]),
            (entry["environment"], other["environment"]),
        )
    )


def _own(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value != others[name]}


def _own_of_job(job: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    own = _own(job, other)
    if "config" in own:
        own["config"] = _own(job["config"], other["config"])
    return own


def _without_blanks(record: dict[str, Any]) -> dict[str, Any]:
    """Leaves out of a record's body what is empty, and would be again by default."""
    body = {name: v for name, v in record["body"].items() if v or name not in _MAY_BE_EMPTY}
    return record | {"body": body}


def _run_of(location: str, entry: dict[str, Any]) -> Run:
    return Run(
        location=location,
        uid=entry["uid"],
        created=entry["created"],
        job=Job.from_dict({**entry["job"], "run_dir": location}),
        records=tuple(map(Record.from_dict, entry["records"])),
        outcome="finished",
        failure=None,
        environment=entry["environment"],
    )
