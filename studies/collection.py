"""The dataset behind a results page: points and stages of studies in two small Parquet files.

A study may be run in pieces, some seeds here and some there: what is collected joins what is there
already, if the terms are equal.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet

from comp.config import PruningConfig
from comp.methods import METHODS
from orchestration.job import Job
from orchestration.store import Run
from orchestration.store_tables import tables_of
from studies.folder import StudyFolder
from studies.sources import find_runs
from studies.spec import StudySpec
from studies.terms import differing_terms, start_of, terms_of

POINTS = "points.parquet"
STAGES = "stages.parquet"
REMEDIES = {
    *("rank_by", "one_ranking", "refresh_after", "last_quantum", "init"),
    *("mask_site", "merge", "distillation", "min_heads"),
}
"""Searched keys by which a setting is not its method any more (docs/algorithm.md)."""

RUN_KEY = ("study", "setting", "seed")
"""Columns that tell runs apart; run ids do not, where a study was run in pieces."""
RunKey = tuple[str, str, int]
_Runs = dict[RunKey, list[dict[str, Any]]]


def collect(folders: Sequence[StudyFolder], target: Path, *, replace: bool = False) -> int:
    """Adds the points and stages of studies' runs to ``target`` and returns how many runs.

    A run without a finished ratio is left out. Where a study's setting and seed are there already,
    the run with more points stays, the new one of equals.

    Args:
        folders: The studies.
        target: Directory of the two files, made if it is not there.
        replace: Drop what is there of these studies first.

    Raises:
        SpecError: If a study has no run.
        ValueError: If ``target`` has runs of a study on other terms.
    """
    points, stages = [], []
    for folder in folders:
        spec = folder.read_spec()
        for run in find_runs([folder.location], folder.root):
            if all(point.method == "dense" for point in run.points):
                continue
            tables = tables_of(run.job, run.records)
            points.append(_with_setting(tables["curve"], run, spec))
            stages.append(_with_setting(tables["stages"].drop_columns(["layers"]), run, spec))
    if not points:
        return 0
    found = {POINTS: pa.concat_tables(points), STAGES: pa.concat_tables(stages)}
    if (target / POINTS).is_file():
        kept = {name: pyarrow.parquet.read_table(target / name) for name in found}
        found = _joined(kept, found, target, replace=replace)
    target.mkdir(parents=True, exist_ok=True)
    for name, table in found.items():
        temporary = target / f".{name}"
        pyarrow.parquet.write_table(table, temporary, compression="zstd")
        temporary.replace(target / name)
    return len(points)


class Collected(NamedTuple):
    """What ``collect`` wrote into a directory: a row a point and a row a stage, of all runs."""

    directory: Path
    points: list[dict[str, Any]]
    stages: list[dict[str, Any]]


def read_collection(directory: Path) -> Collected:
    """Reads the points and the stages of all runs."""
    tables = (pyarrow.parquet.read_table(directory / name) for name in (POINTS, STAGES))
    return Collected(directory, *(table.to_pylist() for table in tables))


def key_of(row: Mapping[str, Any]) -> RunKey:
    """Returns which run a row is of: its study, setting and seed."""
    return row["study"], row["setting"], row["seed"]


def _joined(
    kept: Mapping[str, pa.Table], found: Mapping[str, pa.Table], target: Path, *, replace: bool
) -> dict[str, pa.Table]:
    old, new = (_by_run(tables[POINTS]) for tables in (kept, found))
    studies = {key[0] for key in old} & {key[0] for key in new}
    if replace:
        outdone, short = {key for key in old if key[0] in studies}, set()
    else:
        for study in studies:
            _check_terms(study, old, new, target)
        short = {key for key in old.keys() & new.keys() if len(old[key]) > len(new[key])}
        outdone = new.keys() - short
    return {
        name: pa.concat_tables(
            [_without(kept[name], outdone), _without(found[name], short)],
            promote_options="default",
        )
        for name in found
    }


def _check_terms(study: str, old: _Runs, new: _Runs, target: Path) -> None:
    there, here = (
        [point for key, own in runs.items() if key[0] == study for point in own]
        for runs in (old, new)
    )
    if wrong := differing_terms(there, here):
        raise ValueError(
            f"{target} has runs of {study!r} that differ from the new ones in "
            f"{'; '.join(wrong)}; collect with --replace to drop them"
        )


def _by_run(points: pa.Table) -> _Runs:
    runs: _Runs = {}
    for point in points.drop_columns(["outcomes"]).to_pylist():
        runs.setdefault(key_of(point), []).append(point)
    return runs


def _without(table: pa.Table, runs: Collection[RunKey]) -> pa.Table:
    rows = table.select([*RUN_KEY]).to_pylist()
    return table.filter(pa.array([key_of(row) not in runs for row in rows], pa.bool_()))


def _with_setting(table: pa.Table, run: Run, spec: StudySpec) -> pa.Table:
    config, changes = PruningConfig.from_dict(run.job.config), changes_of(run.job, spec)
    is_ours = config.switches in (METHODS["comp"], METHODS["cim"], METHODS["comp_plus"])
    columns = {
        "setting": setting_of(run.job, spec),
        "is_own": is_ours and not changes.keys() & REMEDIES,
        "is_reference": spec.is_listed and not changes,
        "terms": json.dumps(terms_of(run.job, spec)),
        "data": run.job.data or "OpenMoji",
        "commit": run.environment.get("git_commit", ""),
    }
    for name, value in columns.items():
        table = table.append_column(name, pa.array([value] * table.num_rows))
    return table


def setting_of(job: Job, spec: StudySpec) -> str:
    """Returns what tells a run from the others of its study, such as ``cim cip=false``.

    It is the method and whatever else is not as in trial 0.
    """
    changes = changes_of(job, spec)
    return " ".join([job.method, *(f"{key}={json.dumps(v)}" for key, v in changes.items())])


def changes_of(job: Job, spec: StudySpec) -> dict[str, Any]:
    """Returns the values of searched keys other than the method that are not as in trial 0."""
    start, config = start_of(spec), job.config
    return {key: config.get(key) for key in start if config.get(key) != start[key]}
