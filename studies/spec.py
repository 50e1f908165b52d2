"""What a person asks for: the models behind the YAML of ``comp prune`` and ``comp study``.

pydantic stands at this edge only; ``comp`` and ``orchestration`` get plain frozen dataclasses.
Reading files, overrides and the wording of errors are in :mod:`studies.specfile`.
"""

import hashlib
import json
import math
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, TypeAdapter, field_validator, model_validator

from comp.config import PruningConfig
from orchestration.job import FineTune, check_name
from orchestration.storage import absolute
from studies.domains import CONFIG_KEYS, DERIVED_KEYS, Config, Domain, Number, Section, check_keys
from studies.goals import Constraint, Objectives
from studies.matrix import CELL, Matrix, as_dimension
from studies.resources import ResourcesSection
from studies.search import (
    CmaesSampler,
    GridSampler,
    Pruner,
    Sampler,
    StartSampler,
    TpeSampler,
    check_pruner,
)
from studies.space import check_labels, check_setting, check_space, grid_of

MAX_NAME = 100  # leaves room for "-0003-s1" in a run id
MEASURE_KEYS = ("seed", "eval_samples", "test_samples", "eval_batch_size", "device", "autocast")
STORAGE_SCHEMES = ("sqlite", "postgresql", "postgresql+psycopg2", "postgresql+psycopg", "grpc")
MAX_GRID = 100_000  # Optuna keeps all combinations in memory


def refuse_password(name: str, url: str, variables: str) -> None:
    """Raises a ``ValueError`` if a URL holds a password: specs are written down in many places."""
    place = urlsplit(url).netloc.rpartition("@")[0]
    if ":" in place:
        raise ValueError(
            f"{name} must not hold a password, because specs are kept in files; leave it out of "
            f"the URL and set {variables} in the environment"
        )


class Tracking(Section):
    """Where MLflow keeps the runs.

    Attributes:
        uri: A tracking URI; ``null`` means ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` under the
            root.
        enabled: ``false`` writes nothing to MLflow; results on disk are the same.
        system_metrics: ``true`` samples CPU, memory, disk, network and GPUs of the driver's
            machine into the study's own run.
    """

    uri: str | None = None
    enabled: bool = True
    system_metrics: bool = False

    @field_validator("uri")
    @classmethod
    def _check_uri(cls, uri: str | None) -> str | None:
        if uri is not None:
            refuse_password("uri", uri, "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
        return uri


class RunSpec(Section):
    """What both kinds of spec say.

    Attributes:
        fine_tune: Where the model of each ratio is fine-tuned: ``"inline"`` between two stages of
            its trajectory, or in a ``"fork"``, a job beside it; then free workers take over
            trials of modes, too. Results are the same.
    """

    version: Literal[1] = 1
    name: str
    model: str
    task: str
    data: str | None = None
    pruning: Config = PruningConfig()
    fine_tune: FineTune = "inline"
    resources: ResourcesSection = ResourcesSection()
    tracking: Tracking = Tracking()
    root: str = "comp-runs"

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        check_name("name", name)
        if len(name) > MAX_NAME:
            raise ValueError(f"name must have at most {MAX_NAME} characters, but got {len(name)}")
        return name

    @field_validator("root")
    @classmethod
    def _check_root(cls, root: str) -> str:
        absolute(root)
        return root


class PruneSpec(RunSpec):
    """One run: ``comp prune SPEC.yaml``."""

    kind: Literal["prune"]


class StudySpec(RunSpec):
    """Many runs whose configs Optuna chooses: ``comp study run SPEC.yaml``.

    Attributes:
        matrix: Several models for Optuna to choose from; ``studies: each`` is expanded before.
        space: A domain for every config key that is searched. A key that also stands in
            ``pruning`` has its starting value there: trial 0 is the config of ``pruning``, the
            paper's values where that is silent, moved into the domain where they are outside.
        objective: What is bettered: one measure of the validation curve, or several.
        constraints: Measures that must stay within limits; trials that break one are never best.
        n_trials: Trials to end with, failed ones included and copied ones not; by default 20,
            for a grid all of it, for the sampler ``start`` trial 0 and what ``enqueue`` lists.
        parallel: Runs at a time.
        sampler: How Optuna proposes configs.
        pruner: When Optuna stops a trial before its end; ``None`` never does.
        seeds: Every trial runs once for each; the objective is the mean.
        enqueue: Values that are tried right after trial 0; keys left out are the sampler's.
        warm_start: An earlier study, by name under the same root or by directory, whose finished
            trials are copied where this study could have made them.
        storage: ``"journal"`` for a file in the study's directory, or an SQLite, PostgreSQL or
            gRPC URL.
        deadline_minutes: Time after which no trial goes on; the same command continues.
        stage_timeout_minutes: Time without a record after which a run counts as hung.
    """

    kind: Literal["study"]
    fine_tune: FineTune = "fork"
    matrix: Matrix | None = None
    space: dict[str, Domain]
    objective: Objectives
    constraints: tuple[Constraint, ...] = ()
    n_trials: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] = 20
    parallel: Annotated[int, Field(strict=True, ge=1, le=10_000)] = 1
    sampler: Sampler = TpeSampler()
    pruner: Pruner | None = None
    seeds: tuple[Annotated[int, Field(strict=True, ge=0, lt=2**32)], ...] = (0,)
    enqueue: tuple[dict[str, Any], ...] = ()
    warm_start: str | None = None
    storage: str = "journal"
    deadline_minutes: Annotated[Number, Field(gt=0)] | None = None
    stage_timeout_minutes: Annotated[Number, Field(gt=0)] | None = None

    @field_validator("space", mode="before")
    @classmethod
    def _check_space_keys(cls, space: Any) -> Any:
        for key in MEASURE_KEYS if isinstance(space, dict) else ():
            if key in space:
                raise ValueError(
                    f"{key} cannot be searched, because trials would not be comparable; set "
                    + ("seeds" if key == "seed" else f"pruning.{key}")
                )
        if isinstance(space, dict):
            check_keys(space, [*CONFIG_KEYS, *DERIVED_KEYS, *([CELL] if CELL in space else [])])
        return space

    @field_validator("pruning")
    @classmethod
    def _check_seed(cls, config: PruningConfig) -> PruningConfig:
        if config.seed:
            raise ValueError(
                f"a study has no pruning.seed; write 'seeds: [{config.seed}]' beside it"
            )
        return config

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or len(set(seeds)) != len(seeds):
            raise ValueError(f"seeds must be one or more different numbers, but got {list(seeds)}")
        return seeds

    @field_validator("storage")
    @classmethod
    def _check_storage(cls, storage: str) -> str:
        scheme = storage.partition("://")[0]
        if storage != "journal" and ("://" not in storage or scheme not in STORAGE_SCHEMES):
            raise ValueError(
                "storage must be 'journal' or a URL that starts with sqlite:///, postgresql:// or "
                f"grpc://, but got {storage!r}"
            )
        refuse_password("storage", storage, "PGPASSWORD")
        return storage

    @model_validator(mode="before")
    @classmethod
    def _search_cells(cls, values: Any) -> Any:
        return as_dimension(values) if isinstance(values, dict) else values

    @model_validator(mode="before")
    @classmethod
    def _count_trials(cls, values: Any) -> Any:
        """Lets a grid or a list have as many trials as it takes, unless the spec says how many.

        Trial 0 is one of the grid's.
        """
        sampler = values.get("sampler") if isinstance(values, dict) else None
        kind = sampler.get("kind") if isinstance(sampler, dict) else None
        if kind not in ("grid", "start") or "n_trials" in values:
            return values
        if kind == "start":
            return {**values, "n_trials": 1 + len(values.get("enqueue") or ())}
        try:
            size = _grid_size(TypeAdapter(dict[str, Domain]).validate_python(values["space"]))
        except (KeyError, ValueError):
            return values  # said once and better by the checks that follow
        return {**values, "n_trials": len(values.get("enqueue") or ()) + size}

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        ends = [measure.span[1] for measure in self.objective]
        ends += [bound.measure.span[1] for bound in self.constraints]
        if self.storage == self.tracking.uri:
            raise ValueError(
                "storage and tracking.uri must be two databases, because Optuna and MLflow both "
                f"keep their version in a table alembic_version, but both are {self.storage}"
            )
        if CELL in self.space and self.matrix is None:
            raise ValueError(f"space.{CELL} needs a matrix beside it, whose cells it chooses from")
        for cell in self.cells:
            there = self.in_cell(cell)
            check_space(there.pruning, self.space, max(ends), together=not self.is_listed)
            there.pruning.shared_by(there.resources.workers)
        check_pruner(self.pruner, len(self.objective), len(self.seeds))
        if isinstance(self.sampler, CmaesSampler) and len(self.objective) > 1:
            raise ValueError(
                "sampler cmaes takes one objective; take tpe, gp or nsga2 for several, or bound "
                "all but one with constraints"
            )
        if isinstance(self.sampler, GridSampler) and (size := _grid_size(self.space)) > MAX_GRID:
            raise ValueError(
                f"the grid has {size} combinations, which is more than {MAX_GRID}; take larger "
                "steps or sampler random"
            )
        for number, labels in enumerate(self.enqueue):
            try:
                found = check_labels(self.space, labels)
            except ValueError as error:
                raise ValueError(f"enqueue.{number}: {error}") from None
            if isinstance(self.sampler, GridSampler) and set(found) != set(grid_of(self.space)):
                raise ValueError(f"enqueue.{number} must name every key of the space for a grid")
            if self.is_listed:
                check_setting(self.pruning, self.space, found, f"enqueue.{number}")
        return self

    @property
    def is_listed(self) -> bool:
        """Whether ``enqueue`` names all settings besides that of trial 0."""
        return isinstance(self.sampler, StartSampler)

    @property
    def cells(self) -> tuple[str, ...]:
        """The names of the matrix's cells; one without a name where there is no matrix."""
        return tuple(self.matrix.cells) if self.matrix else ("",)

    def in_cell(self, name: str) -> "StudySpec":
        """Returns this spec with the model, task, data and config of a cell."""
        if self.matrix is None:
            return self
        cell = self.matrix.cells[name]
        own = {"model": cell.model, "task": cell.task, "data": cell.data}
        asked, config = cell.resources or self.resources, cell.config(self.pruning)
        return self.model_copy(update={**own, "resources": asked, "pruning": config})


def _grid_size(space: dict[str, Domain]) -> int:
    return math.prod(len(values) for values in grid_of(space).values())


Spec = Annotated[PruneSpec | StudySpec, Field(discriminator="kind")]

RUNTIME_KEYS = (
    "n_trials",
    "parallel",
    "fine_tune",
    "deadline_minutes",
    "stage_timeout_minutes",
    "resources",
    "tracking",
    "root",
)


def identity(spec: RunSpec) -> dict[str, Any]:
    """Returns the part of a spec that results depend on, as JSON values.

    How many trials, how many at a time, where and how long may change when a study goes on; the
    rest may not.
    """
    values = spec.model_dump(mode="json")
    for cell in ((values.get("matrix") or {}).get("cells") or {}).values():
        del cell["resources"]
    return {key: value for key, value in values.items() if key not in RUNTIME_KEYS}


def spec_hash(spec: RunSpec) -> str:
    """Returns 16 hexadecimal digits that two specs share exactly if they may share results."""
    text = json.dumps(identity(spec), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
