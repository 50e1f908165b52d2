"""What a person asks for: the models behind the YAML of ``comp prune`` and ``comp study``.

pydantic stands at this edge only; ``comp`` and ``orchestration`` get plain frozen dataclasses.
Reading files, overrides and the wording of errors are in :mod:`studies.specfile`.
"""

import hashlib
import json
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Discriminator, Field, PlainValidator, Tag, field_validator, model_validator

from comp.config import PruningConfig
from orchestration.job import FineTune, check_name
from orchestration.storage import absolute
from studies.domains import CONFIG_KEYS, TARGET_RATIO, Config, Domain, Number, Section, check_keys
from studies.space import check_space

MAX_NAME = 100  # leaves room for "-0003-s1" in a run id
MEASURE_KEYS = ("seed", "eval_samples", "test_samples", "eval_batch_size", "device", "autocast")
STORAGE_SCHEMES = ("sqlite", "postgresql", "postgresql+psycopg2", "postgresql+psycopg")


def refuse_password(name: str, url: str, variables: str) -> None:
    """Raises a ``ValueError`` if a URL holds a password: specs are written down in many places."""
    place = urlsplit(url).netloc.rpartition("@")[0]
    if ":" in place:
        raise ValueError(
            f"{name} must not hold a password, because specs are kept in files; leave it out of "
            f"the URL and set {variables} in the environment"
        )


def check_ratio(name: str, ratio: float) -> None:
    """Raises a ``ValueError`` if a ratio is outside [0, 1), with the hint for percentages."""
    if not 0.0 <= ratio < 1.0:
        hint = f"; pass {ratio / 100:g} for {ratio:g} %" if 1 < ratio < 100 else ""
        raise ValueError(f"{name} must be in [0, 1), but got {ratio:g}{hint}")


class ValAt(Section):
    """Maximizes validation accuracy at one FLOPs ratio, read off the trial's curve."""

    val_at: Number

    @field_validator("val_at")
    @classmethod
    def _check(cls, ratio: float) -> float:
        check_ratio("val_at", ratio)
        return ratio

    @property
    def span(self) -> tuple[float, float]:
        """The ratios that a curve must cover."""
        return (self.val_at, self.val_at)


class Area(Section):
    """Maximizes mean validation accuracy between two ratios (area under the curve / width)."""

    area: tuple[Number, Number]

    @field_validator("area")
    @classmethod
    def _check(cls, area: tuple[float, float]) -> tuple[float, float]:
        for ratio in area:
            check_ratio("area", ratio)
        if not area[0] < area[1]:
            raise ValueError(f"area must be two ascending ratios, but got {list(area)}")
        return area

    @property
    def span(self) -> tuple[float, float]:
        """The ratios that a curve must cover."""
        return self.area


def _objective_kind(values: Any) -> str:
    if isinstance(values, Section):
        return "area" if isinstance(values, Area) else "val_at"
    kinds = [kind for kind in ("val_at", "area") if isinstance(values, dict) and kind in values]
    if len(kinds) != 1 or len(values) != 1:
        raise ValueError(
            "objective must be {val_at: RATIO} or {area: [LOW, HIGH]}, but got "
            f"{values!r}; the test split is never the objective"
        )
    return kinds[0]


Objective = Annotated[
    Annotated[ValAt, Tag("val_at")] | Annotated[Area, Tag("area")], Discriminator(_objective_kind)
]


class Sampler(Section):
    """How Optuna proposes configs: its tree-structured Parzen estimator.

    Attributes:
        seed: Seed of the proposals. With several trials at a time the order in which they end
            matters too, so a repeat is exact only with ``parallel: 1`` and no interruption.
        startup_trials: Trials drawn at random before the estimator takes over.
    """

    kind: Literal["tpe"] = "tpe"
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0
    startup_trials: Annotated[int, Field(strict=True, ge=0)] = 10


class Tracking(Section):
    """Where MLflow keeps the runs.

    Attributes:
        uri: A tracking URI; ``null`` means ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` under the
            root.
        enabled: ``false`` writes nothing to MLflow; results on disk are the same.
    """

    uri: str | None = None
    enabled: bool = True

    @field_validator("uri")
    @classmethod
    def _check_uri(cls, uri: str | None) -> str | None:
        if uri is not None:
            refuse_password("uri", uri, "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
        return uri


def _read_gpus(gpus: Any) -> Literal["auto"] | float:
    if gpus == "auto":
        return "auto"
    is_number = isinstance(gpus, (int, float)) and not isinstance(gpus, bool)
    if not is_number or not (0 <= gpus <= 1 or (gpus > 1 and gpus == round(gpus))):
        raise ValueError(f"gpus must be auto, a share of one or a whole number, but got {gpus!r}")
    return float(gpus)


class ResourcesSection(Section):
    """What one run at a time asks of the machine or the cluster.

    Attributes:
        cpus: CPU cores.
        gpus: GPUs, or a share of one; ``"auto"`` shares what the cluster has among the runs that
            go on at a time, and asks for none where there is none.
        threads: CPU threads of torch.
    """

    cpus: Annotated[Number, Field(gt=0)] = 1.0
    gpus: Annotated[Literal["auto"] | float, PlainValidator(_read_gpus)] = "auto"
    threads: Annotated[int, Field(strict=True, ge=1, le=1024)] = 1


class RunSpec(Section):
    """What both kinds of spec say.

    Attributes:
        fine_tune: Where the model of each ratio is fine-tuned: ``"inline"`` between two stages of
            its trajectory, or in a ``"fork"``, a job beside it. Results are the same.
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
        space: A domain for every config key that is searched. A key that also stands in
            ``pruning`` has its starting value there: trial 0 is the config of ``pruning``, the
            paper's values where that is silent, moved into the domain where they are outside.
        objective: What is maximized; always of the validation split.
        n_trials: Trials to end with, failed ones included.
        parallel: Runs at a time.
        seeds: Every trial runs once for each; the objective is the mean.
        storage: ``"journal"`` for a file in the study's directory, or an SQLite or PostgreSQL URL.
        deadline_minutes: Time after which no trial goes on; the same command continues.
        stage_timeout_minutes: Time without a record after which a run counts as hung.
    """

    kind: Literal["study"]
    fine_tune: FineTune = "fork"
    space: dict[str, Domain]
    objective: Objective
    n_trials: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] = 20
    parallel: Annotated[int, Field(strict=True, ge=1, le=10_000)] = 1
    sampler: Sampler = Sampler()
    seeds: tuple[Annotated[int, Field(strict=True, ge=0, lt=2**32)], ...] = (0,)
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
            check_keys(space, [*CONFIG_KEYS, TARGET_RATIO])
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
                "storage must be 'journal' or a URL that starts with sqlite:/// or "
                f"postgresql://, but got {storage!r}"
            )
        refuse_password("storage", storage, "PGPASSWORD")
        return storage

    @model_validator(mode="after")
    def _check_space(self) -> Self:
        check_space(self.pruning, self.space, self.objective.span)
        return self


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
    return {key: value for key, value in values.items() if key not in RUNTIME_KEYS}


def spec_hash(spec: RunSpec) -> str:
    """Returns 16 hexadecimal digits that two specs share exactly if they may share results."""
    text = json.dumps(identity(spec), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
