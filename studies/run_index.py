"""The points of a study's finished runs in one file, so that thousands are read in seconds.

The run directories stay the truth: an entry counts only while the run's manifest has the size and
the time that it had then, and runs without an entry are read from their own directories. The
study's driver writes the file, ``runs.jsonl``; roots that are URIs have none.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orchestration.job import Job, Record
from orchestration.storage import Storage, is_remote, join
from orchestration.store import Run, read_header, read_run
from studies.folder import StudyFolder

INDEX = "runs.jsonl"


def read_point_runs(folder: StudyFolder) -> list[Run]:
    """Returns the runs of a study by name, with their points and without their stages."""
    return list(_read(folder)[0].values())


def write_index(folder: StudyFolder) -> None:
    """Brings the file up to date; only the study's driver may.

    Raises:
        StorageError: If the folder cannot be written.
    """
    runs, is_current = _read(folder)
    if is_remote(folder.root) or is_current:
        return
    lines = []
    for name, run in runs.items():
        stamp = _stamp(run.location)
        if stamp is not None and run.outcome == "finished":
            lines.append(json.dumps({"name": name, "stamp": stamp, **_entry(run)}))
    folder.storage.write(INDEX, "".join(f"{line}\n" for line in lines).encode())


def _read(folder: StudyFolder) -> tuple[dict[str, Run], bool]:
    """Returns the runs by name, and whether the file had all that are finished."""
    known, is_current = _entries(folder), True
    runs = {}
    for name in _names(folder):
        location = join(folder.runs, name)
        entry, stamp = known.get(name), _stamp(location)
        if entry is not None and entry["stamp"] == stamp:
            runs[name] = _run_of(location, entry)
            continue
        header = read_header(location)
        if header is None or header["job"]["study"] != folder.name:
            continue
        run = read_run(location)
        points = tuple(record for record in run.records if record.point is not None)
        runs[name] = dataclasses.replace(run, records=points)
        is_current = is_current and run.outcome != "finished"
    return runs, is_current


def _names(folder: StudyFolder) -> Iterable[str]:
    """Returns what may be runs of the study: a driver names them after it."""
    return [name for name in Storage(folder.runs).names() if name.startswith(f"{folder.name}-")]


def _stamp(location: str) -> list[int] | None:
    if is_remote(location):
        return None
    try:
        found = (Path(location) / "manifest.json").stat()
    except FileNotFoundError:
        return None
    return [found.st_mtime_ns, found.st_size]


def _entries(folder: StudyFolder) -> dict[str, dict[str, Any]]:
    if is_remote(folder.root) or not folder.storage.exists(INDEX):
        return {}
    lines = folder.storage.read(INDEX).splitlines()
    return {entry["name"]: entry for entry in map(json.loads, lines)}


def _entry(run: Run) -> dict[str, Any]:
    job = run.job.to_dict()
    del job["run_dir"]
    return {
        "uid": run.uid,
        "created": run.created,
        "job": job,
        "records": [record.to_dict() for record in run.records],
        "environment": run.environment,
    }


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
