"""What a person asks for of a cluster: the models behind the YAML of ``comp cluster``."""

import importlib.metadata
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, TypeAdapter, field_validator, model_validator

from orchestration.clusters.shape import Machines, NodeType, Shape, Slurm
from orchestration.job import check_name
from orchestration.storage import absolute, is_remote
from studies.domains import Section
from studies.errors import SpecError, sentences
from studies.specfile import override
from studies.yaml_text import read_yaml

Count = Annotated[int, Field(strict=True, ge=0, le=100_000)]


def _one_line(text: str) -> str:
    if any(ord(character) < 32 for character in text):
        raise ValueError(f"a text here must be one line without control characters: {text!r}")
    return text


def _option(text: str) -> str:
    if not text.startswith("-"):
        raise ValueError(f"an option must start with '-', as in --gres=nvme, but got {text!r}")
    return text


Line = Annotated[str, AfterValidator(_one_line)]


class NodeSection(Section):
    """A kind of machine; see ``orchestration.clusters.shape.NodeType``."""

    cpus: Annotated[int, Field(strict=True, ge=1, le=4096)]
    gpus: Count = 0
    memory_gib: Count = 0
    min: Count = 0
    max: Count = 1
    instance: Line = ""
    spot: bool = False
    node_config: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min must not be above max, but got {self.min} and {self.max}")
        return self

    def to_type(self, name: str) -> NodeType:
        """Returns the plain value."""
        return NodeType(
            name=name,
            cpus=self.cpus,
            gpus=self.gpus,
            memory_gib=self.memory_gib,
            min_workers=self.min,
            max_workers=self.max,
            instance=self.instance,
            spot=self.spot,
            node_config=self.node_config,
        )


class SlurmSection(Section):
    """See ``orchestration.clusters.shape.Slurm``."""

    partition: Line = ""
    account: Line = ""
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d\d){0,2}$")] = "24:00:00"
    exclusive: bool = True
    options: tuple[Annotated[Line, AfterValidator(_option)], ...] = ()


class MachinesSection(Section):
    """See ``orchestration.clusters.shape.Machines``."""

    region: Line = ""
    zone: Line = ""
    project: Line = ""
    head_ip: Line = ""
    worker_ips: tuple[Line, ...] = ()
    user: Line = "ubuntu"
    key: Line = ""


class SecretsSection(Section):
    """Where machines find secrets; never the secrets themselves.

    Attributes:
        file: File of ``NAME=value`` lines, for Slurm, clouds and SSH.
        kubernetes: Name of a Secret.
    """

    file: Line = ""
    kubernetes: Line = ""


class ClusterSpec(Section):
    """A cluster; see ``orchestration.clusters.shape.Shape``."""

    version: Literal[1] = 1
    kind: Literal["cluster"]
    name: str
    head: NodeSection = NodeSection(cpus=4, memory_gib=16)
    workers: dict[str, NodeSection]
    image: Line = ""
    ray_version: Line = ""
    setup: tuple[Line, ...] = ()
    storage: Line = ""
    auth: Literal["token", "disabled"] = "token"
    secrets: SecretsSection = SecretsSection()
    namespace: Line = "default"
    idle_minutes: Annotated[float, Field(gt=0)] = 5.0
    slurm: SlurmSection = SlurmSection()
    machines: MachinesSection = MachinesSection()

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if check_name("name", name) != name.lower() or "_" in name or "." in name:
            raise ValueError(
                "name must be lower-case letters, digits and '-', as clouds and Kubernetes ask, "
                f"but got {name!r}"
            )
        return name

    @field_validator("workers")
    @classmethod
    def _check_workers(cls, workers: dict[str, NodeSection]) -> dict[str, NodeSection]:
        for name in workers:
            check_name("a worker's name", name)
        if not workers:
            raise ValueError("workers must name at least one kind of machine, but got none")
        return workers

    @field_validator("storage")
    @classmethod
    def _check_storage(cls, storage: str) -> str:
        if storage and not is_remote(storage) and not Path(storage).is_absolute():
            raise ValueError(
                f"storage must be a URI or an absolute path that all machines share, but got "
                f"{storage!r}"
            )
        return absolute(storage) if storage else ""

    @property
    def ray(self) -> str:
        """Version of Ray on the cluster; the installed one unless the spec says another."""
        return self.ray_version or importlib.metadata.version("ray")

    def to_shape(self) -> Shape:
        """Returns the plain value that the renderers take."""
        return Shape(
            name=self.name,
            head=self.head.to_type("head"),
            workers=tuple(node.to_type(name) for name, node in self.workers.items()),
            image=self.image,
            setup=self.setup,
            storage=self.storage,
            auth=self.auth,
            secrets_file=self.secrets.file,
            secret_name=self.secrets.kubernetes,
            namespace=self.namespace,
            idle_minutes=self.idle_minutes,
            slurm=Slurm(**self.slurm.model_dump()),
            machines=Machines(**self.machines.model_dump()),
        )


_ADAPTER: TypeAdapter[ClusterSpec] = TypeAdapter(ClusterSpec)


def load_cluster(path: Path, overrides: tuple[str, ...] = ()) -> ClusterSpec:
    """Reads the spec of a cluster and checks all of it.

    Args:
        path: A YAML file.
        overrides: ``"dotted.key=value"`` each.

    Raises:
        SpecError: If anything is wrong; the text has a line for every mistake.
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no cluster spec {str(path)!r}; 'comp cluster example' prints one"
        )
    values = override(read_yaml(path.read_text(encoding="utf-8"), str(path)), overrides)
    if not isinstance(values, dict):
        raise SpecError(f"{path} must be a mapping with kind: cluster, name and workers")
    try:
        return _ADAPTER.validate_python(values)
    except ValueError as error:
        found = sentences(error, values)
        raise SpecError("\n".join(f"{path}: {sentence}" for sentence in found)) from None
