"""Several models, tasks and seeds in one spec: a study for each cell, or one study over all.

``studies: each`` makes plain specs, one a cell (and a seed, if the matrix has seeds), which run
one after the other and are from then on studies like any other. ``studies: one`` makes one study
in which Optuna chooses the cell too; its curves share an axis, so its cells share the task.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from comp.config import PruningConfig
from orchestration.job import check_name
from studies.domains import Section, read_config
from studies.errors import sentences
from studies.resources import ResourcesSection

CELL = "cell"  # the key of the space that chooses one
OWN_KEYS = ("model", "task", "data")  # which stand in the cells, not beside a matrix


class Cell(Section):
    """A model and a task.

    Attributes:
        model: As in a spec.
        task: As in a spec.
        data: As in a spec.
        pruning: Keys of ``PruningConfig`` that this cell has otherwise than the spec.
        resources: What a run of this cell asks for, where that is not what the spec says.
    """

    model: str
    task: str
    data: str | None = None
    pruning: dict[str, Any] = Field(default_factory=dict)
    resources: ResourcesSection | None = None

    def config(self, base: PruningConfig) -> PruningConfig:
        """Returns a config with this cell's own keys put over it.

        Raises:
            ValueError: If the result is no valid config.
        """
        return read_config({**base.to_dict(), **self.pruning}) if self.pruning else base


class Matrix(Section):
    """The cells of a spec.

    Attributes:
        studies: ``"each"`` for a study a cell, or ``"one"`` over all of them.
        cells: By name.
        seeds: With ``studies: each``: every cell once for each, as a study of its own; without,
            the spec's ``seeds`` are repeats within each study.
    """

    studies: Literal["each", "one"]
    cells: dict[str, Cell]
    seeds: tuple[Annotated[int, Field(strict=True, ge=0, lt=2**32)], ...] | None = None

    @field_validator("cells")
    @classmethod
    def _check_cells(cls, cells: dict[str, Cell]) -> dict[str, Cell]:
        if not cells:
            raise ValueError("cells must name at least one model and task, but got {}")
        for name in cells:
            check_name("a cell's name", name)
        return cells

    @model_validator(mode="after")
    def _check(self) -> Self:
        tasks = sorted({cell.task for cell in self.cells.values()})
        if self.studies == "one" and len(tasks) > 1:
            raise ValueError(
                "cells of one study must share the task, because accuracies of "
                f"{' and '.join(tasks)} cannot be ranked; write 'studies: each' for a study each"
            )
        if self.studies == "one" and self.seeds is not None:
            raise ValueError("seeds must stand beside the matrix of one study, not inside")
        return self


def expand(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the raw values of the specs that a raw spec stands for.

    A matrix with ``studies: each`` gives one a cell and seed; everything else is left as it is.

    Raises:
        ValueError: If the matrix is wrong.
    """
    plain = dict(values)
    raw = plain.get("matrix")
    if not isinstance(raw, Mapping) or raw.get("studies") != "each":
        return [plain]
    check_own_keys(plain)
    matrix = _read(raw)
    del plain["matrix"]
    found = []
    for name, cell in matrix.cells.items():
        own: dict[str, Any] = {"model": cell.model, "task": cell.task, "data": cell.data}
        pruning = {**(plain.get("pruning") or {}), **cell.pruning}
        if cell.resources is not None:
            own["resources"] = cell.resources.model_dump()
        named = {**plain, **own, "pruning": pruning, "name": f"{plain.get('name')}-{name}"}
        if matrix.seeds is None:
            found.append(named)
        for seed in matrix.seeds or ():
            found.append({**named, "name": f"{named['name']}-s{seed}", "seeds": [seed]})
    return found


def _read(raw: Any) -> Matrix:
    try:
        return Matrix.model_validate(raw)
    except ValueError as error:
        raise ValueError("; ".join(sentences(error, raw, "matrix"))) from None


def check_own_keys(values: Mapping[str, Any]) -> None:
    """Raises a ``ValueError`` if a spec has a model both beside its matrix and inside."""
    for key in OWN_KEYS:
        if values.get(key) is not None:
            raise ValueError(f"{key} must be left out beside a matrix, whose cells have their own")


def as_dimension(values: dict[str, Any]) -> dict[str, Any]:
    """Lets a raw spec with a matrix search the cell.

    Its own model is that of the first cell, with which trial 0 begins.

    Raises:
        ValueError: If the matrix is wrong.
    """
    raw = values.get("matrix")
    if raw is None:
        return values
    matrix = raw if isinstance(raw, Matrix) else _read(raw)
    space = dict(values.get("space") or {})
    if CELL not in space:
        check_own_keys(values)
        names = list(matrix.cells)
        space = {CELL: {"kind": "categorical", "choices": names}, **space}
    first = next(iter(matrix.cells.values()))
    own = {"model": first.model, "task": first.task, "data": first.data}
    return {**values, **own, "space": space}
