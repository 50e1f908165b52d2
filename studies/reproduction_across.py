"""Settings of several studies in one table, if their terms are equal; else what is not.

Terms are all that decides how well a setting can do besides the setting itself: the dense model,
the data, the config keys that neither study searches, and the size of a stage. Seeds that not all
of the studies have are left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from studies.collection import Collected
from studies.reproduction import ResultRow, Settings, compare_settings, settings_by_ratio
from studies.terms import differing_terms


def rows_across(
    collected: Collected, studies: Sequence[str], baseline: str | None = None
) -> list[ResultRow]:
    """Compares all settings of some studies at the ratios and seeds that all of them have.

    A setting that several studies have is told apart by the study's name.

    Args:
        collected: What ``studies.collection.collect`` wrote.
        studies: Names of the studies.
        baseline: What all are compared with; ``None`` is the best of the others by validation.

    Raises:
        ValueError: If a study or the baseline is not there, terms differ (names every
            difference), or no seed or ratio is shared.
    """
    directory, points, stages = collected
    by_study = {name: [p for p in points if p["study"] == name] for name in studies}
    for name, own in by_study.items():
        if not own:
            raise ValueError(f"{directory} has no study {name!r}; collect it with the others")
    (first, base), *others = by_study.items()
    for name, own in others:
        if wrong := differing_terms(base, own):
            raise ValueError(f"{first} and {name} differ in {'; '.join(wrong)}")
    seeds = set.intersection(*(_seeds(own) for own in by_study.values()))
    if not seeds:
        raise ValueError(f"{' and '.join(studies)} share no seed")
    groups = settings_by_ratio((p for p in points if p["seed"] in seeds), stages)
    ratios = [{ratio for study, ratio in groups if study == name} for name in studies]
    shared = sorted(set.intersection(*ratios))
    if not shared:
        raise ValueError(f"{' and '.join(studies)} share no ratio")
    found = []
    for ratio in shared:
        joined = _joined({name: groups[name, ratio] for name in studies})
        found += compare_settings(joined, baseline)
    return found


def _seeds(points: Sequence[Mapping[str, Any]]) -> set[int]:
    return {point["seed"] for point in points if point["method"] != "dense"}


def _joined(parts: Mapping[str, Settings]) -> Settings:
    names = [setting for part in parts.values() for setting in part]
    return {
        setting if names.count(setting) == 1 else f"{setting} ({study})": points
        for study, part in parts.items()
        for setting, points in part.items()
    }
