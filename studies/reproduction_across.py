"""Settings of several studies in one table, if their terms are equal; else what is not.

Terms are all that decides how well a setting can do besides the setting itself: the dense model,
the data, the config keys that neither study searches, the size of a stage, and the seeds.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet

from studies.reproduction import POINTS, ResultRow, Settings, compare_settings, settings_by_ratio


def rows_across(directory: Path, studies: Sequence[str]) -> list[ResultRow]:
    """Compares all settings of some studies at the ratios that all of them have.

    A setting that several studies have is told apart by the study's name.

    Args:
        directory: What ``studies.reproduction.collect`` wrote.
        studies: Names of the studies.

    Raises:
        ValueError: If a study is not there, or terms differ; names every difference.
    """
    points = pyarrow.parquet.read_table(directory / POINTS).to_pylist()
    by_study = {name: [p for p in points if p["study"] == name] for name in studies}
    for name, own in by_study.items():
        if not own:
            raise ValueError(f"{directory} has no study {name!r}; collect it with the others")
    (first, base), *others = by_study.items()
    for name, own in others:
        if wrong := differing_terms(base, own):
            raise ValueError(f"{first} and {name} differ in {'; '.join(wrong)}")
    groups = settings_by_ratio(directory)
    ratios = [{ratio for study, ratio in groups if study == name} for name in studies]
    shared = sorted(set.intersection(*ratios))
    if not shared:
        raise ValueError(f"{' and '.join(studies)} share no ratio")
    found = []
    for ratio in shared:
        joined = _joined({name: groups[name, ratio] for name in studies})
        found += compare_settings(joined)
    return found


def _joined(parts: Mapping[str, Settings]) -> Settings:
    names = [setting for part in parts.values() for setting in part]
    return {
        setting if names.count(setting) == 1 else f"{setting} ({study})": points
        for study, part in parts.items()
        for setting, points in part.items()
    }


def differing_terms(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Returns what is not equal between the points of two studies, with both values."""
    wrong = []
    mine, other = (_terms(points) for points in (ours, theirs))
    for key in sorted(mine.keys() & other.keys()):
        if mine[key] != other[key]:
            wrong.append(f"{key} ({mine[key]} and {other[key]})")
    for name, of in (("dense model", _dense), ("seeds", _seeds)):
        one, two = of(ours), of(theirs)
        if one != two:
            wrong.append(f"{name} ({one} and {two})")
    return wrong


def _terms(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if any(not point.get("terms") for point in points):
        raise ValueError(
            f"study {points[0]['study']!r} was collected before terms were kept; collect it again "
            "with 'comp results collect'"
        )
    found: dict[str, Any] = json.loads(points[0]["terms"])
    return found


def _dense(points: Sequence[Mapping[str, Any]]) -> str:
    of = sorted({(p["params"], round(p["test"], 2)) for p in points if p["method"] == "dense"})
    return ", ".join(f"{params} parameters, {test:.2f} on test" for params, test in of)


def _seeds(points: Sequence[Mapping[str, Any]]) -> str:
    seeds = sorted({point["seed"] for point in points if point["method"] != "dense"})
    return ", ".join(map(str, seeds))
