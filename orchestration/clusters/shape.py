"""What a cluster is, whatever it runs on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

EXAMPLE = Path(__file__).with_name("example.yaml")

Auth = Literal["token", "disabled"]


@dataclass(frozen=True)
class NodeType:
    """One kind of machine.

    Attributes:
        name: Its name in the cluster.
        cpus: CPU cores.
        gpus: GPUs.
        memory_gib: Host memory in GiB; 0 leaves it to the place.
        min_workers: Machines of this kind that always run.
        max_workers: Machines of this kind at most.
        instance: Machine type of a cloud.
        spot: Whether the cloud may take the machine away for a lower price.
        node_config: Put over what is rendered for a cloud's machine.
    """

    name: str
    cpus: int
    gpus: int = 0
    memory_gib: int = 0
    min_workers: int = 0
    max_workers: int = 1
    instance: str = ""
    spot: bool = False
    node_config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Slurm:
    """What a Slurm allocation needs besides.

    Attributes:
        partition: Partition, ``""`` for the default one.
        account: Account, ``""`` for the default one.
        time: Time limit as ``[DAYS-]HH:MM:SS``.
        exclusive: Whether the hosts belong to this job alone.
        options: Further lines behind ``#SBATCH``.
    """

    partition: str = ""
    account: str = ""
    time: str = "24:00:00"
    exclusive: bool = True
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Machines:
    """What virtual machines or machines behind SSH need besides.

    Attributes:
        region: Region of a cloud.
        zone: Zone within it, ``""`` for any.
        project: Google's project id.
        head_ip: Address of the head, for machines that are there already.
        worker_ips: Addresses of the others.
        user: Who to log in as.
        key: File with the private key, ``""`` to let Ray or the agent choose.
    """

    region: str = ""
    zone: str = ""
    project: str = ""
    head_ip: str = ""
    worker_ips: tuple[str, ...] = ()
    user: str = "ubuntu"
    key: str = ""


@dataclass(frozen=True)
class Shape:
    """A cluster.

    Attributes:
        name: Names the cluster and everything made for it.
        head: The machine that runs the driver; it holds no GPU unless it says so.
        workers: The kinds of machines that prune.
        image: Container image with this package and Ray in it, ``""`` for none.
        setup: Shell commands that prepare a machine or container before Ray starts.
        storage: Where studies and runs are kept, for all machines; ``COMP_ROOT`` there.
        auth: Whether Ray asks for a token.
        secrets_file: File of ``NAME=value`` lines that every machine reads into its environment
            before Ray starts; only its path is ever written down.
        secret_name: The same on Kubernetes: a Secret in the cluster's namespace.
        namespace: Namespace on Kubernetes.
        idle_minutes: Minutes after which an idle machine is given back.
        slurm: See ``Slurm``.
        machines: See ``Machines``.
    """

    name: str
    head: NodeType
    workers: tuple[NodeType, ...]
    image: str = ""
    setup: tuple[str, ...] = ()
    storage: str = ""
    auth: Auth = "token"
    secrets_file: str = ""
    secret_name: str = ""
    namespace: str = "default"
    idle_minutes: float = 5.0
    slurm: Slurm = Slurm()
    machines: Machines = Machines()

    @property
    def max_workers(self) -> int:
        """Machines besides the head at most."""
        return sum(worker.max_workers for worker in self.workers)

    def environment(self) -> dict[str, str]:
        """Returns the variables that every machine has; none of them is a secret."""
        values = {"RAY_AUTH_MODE": self.auth, "RAY_USAGE_STATS_ENABLED": "0"}
        return values | ({"COMP_ROOT": self.storage} if self.storage else {})


class ShapeError(ValueError):
    """A cluster that this kind of place cannot have."""
