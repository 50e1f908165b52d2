"""Reads specs: file or preset, then ``--set key=value``, then every check before any work."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from comp.words import nearest
from orchestration.storage import absolute, is_remote, join
from studies.errors import SpecError, sentences
from studies.matrix import expand
from studies.presets import preset_names, preset_path
from studies.spec import PruneSpec, RunSpec, Spec, StudySpec
from studies.yaml_text import read_yaml, write_yaml

AnySpec = TypeVar("AnySpec", bound=RunSpec)

MERGED = {"pruning", "resources", "tracking"}
"""Sections of which a spec that extends another may state a part."""

_ADAPTER: TypeAdapter[PruneSpec | StudySpec] = TypeAdapter(Spec)


def read_spec(source: str | Path, overrides: Sequence[str] = ()) -> PruneSpec | StudySpec:
    """Reads a spec file or a preset.

    Args:
        source: A YAML file, or the name of a preset.
        overrides: ``"dotted.key=value"`` each, the value in YAML; later ones win.

    Raises:
        SpecError: If anything in it is wrong; the text has a line for every mistake.
        FileNotFoundError: If there is no such file and no such preset.
    """
    specs = read_specs(source, overrides)
    if len(specs) > 1:
        names = ", ".join(spec.name for spec in specs)
        raise SpecError(
            f"{source} is a matrix of {len(specs)} studies ({names}); 'comp study run' takes "
            "it, this command takes one study"
        )
    return specs[0]


def read_specs(source: str | Path, overrides: Sequence[str] = ()) -> list[PruneSpec | StudySpec]:
    """Reads a spec like ``read_spec``; a matrix of studies gives one spec a cell and seed.

    Raises:
        SpecError: If anything in it is wrong.
        FileNotFoundError: If there is no such file and no such preset.
    """
    values = override(read_values(source), overrides)
    if not isinstance(values, Mapping):
        return [spec_of(values, where=str(source))]
    try:
        cells = expand(values)
    except ValueError as error:
        raise SpecError(f"{source}: {error}") from None
    return [spec_of(cell, where=str(source)) for cell in cells]


def read_values(source: str | Path) -> Any:
    """Reads the raw values of a spec, over those of the one that it ``extends``, if it does.

    Sections in ``MERGED`` are put together key by key, everything else is replaced.

    Args:
        source: A YAML file, or the name of a preset. What it extends is a file beside it, or a
            preset, that extends nothing itself.

    Raises:
        SpecError: If a file is no YAML, or ``extends`` cannot be followed.
        FileNotFoundError: If there is no such file and no such preset.
    """
    path = find_spec(source)
    values = _read(path)
    if not isinstance(values, Mapping) or "extends" not in values:
        return values
    name = values["extends"]
    if not isinstance(name, str) or "name" not in values:
        raise SpecError(
            f"{path}: extends must be the name of a preset or a file beside a name of one's own, "
            f"but got extends {name!r} and name {values.get('name')!r}"
        )
    beside = path.parent / name
    base = _read(beside if beside.is_file() else find_spec(name))
    if not isinstance(base, Mapping) or "extends" in base:
        raise SpecError(
            f"{path}: extends names {name!r}, which must be a spec that extends nothing itself"
        )
    own = {key: value for key, value in values.items() if key != "extends"}
    for key in MERGED & base.keys() & own.keys():
        if isinstance(base[key], Mapping) and isinstance(own[key], Mapping):
            own[key] = {**base[key], **own[key]}
    return {**base, **own}


def _read(path: Path) -> Any:
    return read_yaml(path.read_text(encoding="utf-8"), where=str(path))


def find_spec(source: str | Path) -> Path:
    """Returns the file of a spec: a path as it is, or a preset's.

    Raises:
        FileNotFoundError: If it is neither.
    """
    path = Path(source)
    if path.is_file():
        return path
    if str(source) in preset_names():
        return preset_path(str(source))
    known = [*preset_names(), *(p.name for p in path.parent.glob("*.yaml"))]
    hint = nearest(path.name, known) or f"; presets are {', '.join(preset_names())}"
    raise FileNotFoundError(f"there is no spec file and no preset {str(source)!r}{hint}")


def spec_of(values: Any, where: str = "the spec") -> PruneSpec | StudySpec:
    """Checks raw values and returns the spec.

    Raises:
        SpecError: If anything in them is wrong.
    """
    if not isinstance(values, Mapping):
        raise SpecError(f"{where} must be a mapping with name, kind, model and task")
    try:
        return _ADAPTER.validate_python(dict(values))
    except ValueError as error:
        found = sentences(error, dict(values))
        raise SpecError("\n".join(f"{where}: {sentence}" for sentence in found)) from None


def override(values: Any, overrides: Sequence[str]) -> Any:
    """Puts ``dotted.key=value`` texts over raw values; the values in YAML.

    Raises:
        SpecError: If a text has no ``=``, or a key leads through something that has no keys.
    """
    for text in overrides:
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise SpecError(f"--set takes key=value, for example pruning.seed=1, but got {text!r}")
        values = _put(values, parts, read_yaml(value, where=f"--set {key.strip()}"), text)
    return values


def _put(values: Any, parts: Sequence[str], value: Any, text: str) -> Any:
    if not parts:
        return value
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise SpecError(f"--set {text!r} asks for a key {parts[0]!r} inside {values!r}")
    inner = _put(values.get(parts[0]), parts[1:], value, text)
    return {**values, parts[0]: inner}


def write_spec(spec: RunSpec) -> str:
    """Returns the YAML of a spec with every default spelled out."""
    values = spec.model_dump(mode="json")
    first = ("version", "kind", "name")
    return write_yaml({**{k: values[k] for k in first}, **values})


def check_places(spec: RunSpec) -> None:
    """Checks that the model, the task, the data and MLflow's address of a spec can be used.

    It imports no torch and no MLflow.

    Raises:
        SpecError: If one is unknown or missing.
    """
    from comp.models.hub import is_repository
    from comp.models.presets import MODEL_PRESETS
    from comp.tasks.names import TASKS
    from orchestration.tracking import MlflowTracker

    if spec.task not in TASKS:
        hint = nearest(spec.task, list(TASKS))
        raise SpecError(f"task must be one of {', '.join(TASKS)}, but got {spec.task!r}{hint}")
    preset = MODEL_PRESETS.get(spec.model)
    if preset is not None and preset.task != spec.task:
        raise SpecError(
            f"model {spec.model!r} was trained for task {preset.task!r}, but task is {spec.task!r}"
        )
    if preset is None and not Path(spec.model).is_dir() and not is_repository(spec.model):
        hint = nearest(spec.model, list(MODEL_PRESETS))
        raise SpecError(
            f"model must be a directory, owner/name of the hub or one of "
            f"{', '.join(MODEL_PRESETS)}, but got {spec.model!r}{hint}"
        )
    if spec.data is not None and not Path(spec.data).exists():
        raise SpecError(
            f"data must be a data set file or directory, but there is none at {spec.data!r}; "
            "leave it out for the embedded data set"
        )
    if spec.data is not None:
        _check_data(spec.task, Path(spec.data))
    if spec.tracking.enabled:
        try:
            MlflowTracker(tracking_uri(spec), spec.name)
        except ValueError as error:
            raise SpecError(f"tracking.uri: {error}") from None


def _check_data(task: str, path: Path) -> None:
    from comp.data.layout import DataSet
    from comp.tasks.names import check_kind

    try:
        stored = DataSet(path)
        check_kind(task, stored.kind, path)
    except (ValueError, OSError) as error:
        raise SpecError(f"data: {error}") from None
    missing = [split for split in ("train", "val", "test") if split not in stored.splits]
    if missing and stored.kind != "drawings":
        raise SpecError(
            f"data: {path} has the splits {', '.join(stored.splits)}, but a run needs "
            f"{' and '.join(missing)} too; import the files of all splits together"
        )


def tracking_uri(spec: RunSpec) -> str:
    """Returns the spec's MLflow address, else the environment's, else a file under the root.

    A database cannot lie in an object store: with a root there, the file is
    ``comp-runs/mlflow.db`` in the current directory.
    """
    place = "comp-runs" if is_remote(spec.root) else spec.root
    own = f"sqlite:///{join(absolute(place), 'mlflow.db')}"
    return spec.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or own


def resolve_places(spec: AnySpec) -> AnySpec:
    """Makes the paths of a spec absolute, so that it means the same from any directory."""
    model = str(Path(spec.model).resolve()) if Path(spec.model).is_dir() else spec.model
    data = None if spec.data is None else str(Path(spec.data).resolve())
    changes = {"model": model, "data": data, "root": absolute(spec.root)}
    return spec.model_copy(update=changes)


def load_study(source: str, overrides: Sequence[str], root: str | None = None) -> StudySpec:
    """Reads the spec of a study and checks everything that can be checked before any work.

    Args:
        source: A YAML file or a preset.
        overrides: ``"dotted.key=value"`` each.
        root: Put over the spec's root, if given.

    Raises:
        SpecError: If anything is wrong.
        FileNotFoundError: If there is no such file and no such preset.
    """
    return _checked_study(read_spec(source, [*overrides, *_root(root)]), source)


def load_studies(
    source: str, overrides: Sequence[str], root: str | None = None
) -> list[StudySpec]:
    """Reads the specs of a matrix of studies, or the one of a single study; like ``load_study``.

    Raises:
        SpecError: If anything is wrong.
        FileNotFoundError: If there is no such file and no such preset.
    """
    specs = read_specs(source, [*overrides, *_root(root)])
    return [_checked_study(spec, source) for spec in specs]


def load_study_for(
    address: str, source: str, overrides: Sequence[str], root: str | None = None
) -> StudySpec:
    """Reads the spec of a study that a cluster will run; like ``load_study``.

    On a cluster that was not started on this machine, places are checked there.

    Args:
        address: URL of the cluster.
        source: A YAML file or a preset.
        overrides: ``"dotted.key=value"`` each.
        root: Put over the spec's root, if given.

    Raises:
        SpecError: If anything is wrong, or a place means something on this machine only.
        FileNotFoundError: If there is no such file and no such preset.
    """
    from orchestration.clusters.local import is_here

    if is_here(address):
        return load_study(source, overrides, root)
    spec = read_spec(source, [*overrides, *_root(root)])
    if not isinstance(spec, StudySpec):
        raise SpecError(f"{source} is of kind {spec.kind!r}, but a cluster runs studies")
    for name, place in (("root", spec.root), ("data", spec.data)):
        if place is not None and not is_remote(place) and not Path(place).is_absolute():
            raise SpecError(
                f"{name} must be a URI or an absolute path that the machines of {address} share, "
                f"but got {place!r}"
            )
    return spec


def load_frozen_study(values: Any, where: str, overrides: Sequence[str]) -> StudySpec:
    """Checks the spec of a study that was started; like ``load_study``.

    Args:
        values: What ``StudyFolder.read_values`` gives.
        where: What to call them in an error.
        overrides: ``"dotted.key=value"`` each.

    Raises:
        SpecError: If anything is wrong.
    """
    return _checked_study(spec_of(override(values, overrides), where), where)


def _checked_study(spec: RunSpec, where: str) -> StudySpec:
    if not isinstance(spec, StudySpec):
        command = f"comp prune {where}"
        raise SpecError(f"{where} is of kind 'prune'; run it with {command!r}")
    for cell in spec.cells:
        check_places(spec.in_cell(cell))
    return resolve_cells(resolve_places(spec))


def resolve_cells(spec: StudySpec) -> StudySpec:
    """Makes the paths in a study's matrix absolute."""
    if spec.matrix is None:
        return spec
    cells = {}
    for name, cell in spec.matrix.cells.items():
        there = resolve_places(spec.in_cell(name))
        cells[name] = cell.model_copy(update={"model": there.model, "data": there.data})
    return spec.model_copy(update={"matrix": spec.matrix.model_copy(update={"cells": cells})})


def load_prune(source: str, overrides: Sequence[str], root: str | None = None) -> PruneSpec:
    """Reads the spec of a single run; like ``load_study``.

    Raises:
        SpecError: If anything is wrong.
        FileNotFoundError: If there is no such file and no such preset.
    """
    spec = read_spec(source, [*overrides, *_root(root)])
    if not isinstance(spec, PruneSpec):
        raise SpecError(
            f"{source} is of kind {spec.kind!r}; run it with 'comp study run {source}'"
        )
    check_places(spec)
    return resolve_places(spec)


def _root(root: str | None) -> list[str]:
    return [] if root is None else [f"root={write_yaml(root)}"]
