"""What ``ray up`` reads: virtual machines of a cloud, or machines that SSH reaches."""

from collections.abc import Mapping
from typing import Any, Literal

from orchestration.clusters.shape import NodeType, Shape, ShapeError
from orchestration.clusters.slurm import quote_path

Provider = Literal["aws", "gcp", "local"]
PROVIDERS: tuple[Provider, ...] = ("aws", "gcp", "local")

SECRETS = "~/.comp-secrets"  # where every machine finds the file of secrets
PORT = 6379

# The image that Ray's own defaults for Google name (autoscaler/gcp/defaults.yaml of 2.60).
_GCP_IMAGE = "projects/deeplearning-platform-release/global/images/family/common-cpu"
_DISK_GB = 100


def render(shape: Shape, provider: Provider) -> dict[str, Any]:
    """Returns the values of a cluster file for ``ray up``.

    Args:
        shape: The cluster.
        provider: Where its machines come from.

    Raises:
        ShapeError: If the shape lacks what the provider needs.
    """
    _check(shape, provider)
    values: dict[str, Any] = {
        "cluster_name": shape.name,
        "max_workers": shape.max_workers,
        "idle_timeout_minutes": shape.idle_minutes,
        "provider": _provider(shape, provider),
        "auth": _auth(shape),
    }
    if shape.image:
        values["docker"] = {
            "image": shape.image,
            "container_name": f"ray-{shape.name}",
            "run_options": ["--ulimit nofile=65536:65536", "--shm-size=8g"],
        }
    if provider != "local":
        nodes = {shape.head.name: _node(shape.head, provider, is_head=True)}
        nodes |= {worker.name: _node(worker, provider) for worker in shape.workers}
        values["available_node_types"] = nodes
        values["head_node_type"] = shape.head.name
    if shape.secrets_file:
        values["file_mounts"] = {SECRETS: shape.secrets_file}
    values["setup_commands"] = list(shape.setup)
    return values | _start(shape, provider)


def _check(shape: Shape, provider: Provider) -> None:
    machines = shape.machines
    needed = {
        "aws": {"machines.region": machines.region},
        "gcp": {"machines.region": machines.region, "machines.project": machines.project},
        "local": {"machines.head_ip": machines.head_ip},
    }[provider]
    if provider != "local":
        needed |= {f"{node.name}.instance": node.instance for node in (shape.head, *shape.workers)}
    missing = [name for name, value in needed.items() if not value]
    if missing:
        raise ShapeError(f"provider {provider} needs {', '.join(missing)}; set it in the spec")
    if shape.auth == "token" and not shape.secrets_file:
        raise ShapeError(
            "auth: token needs the same token on every machine; put RAY_AUTH_TOKEN=... into a "
            "file, name it as secrets_file, or set auth: disabled"
        )
    if provider == "local" and shape.max_workers > len(machines.worker_ips):
        raise ShapeError(
            f"the workers are to be {shape.max_workers} machines, but machines.worker_ips names "
            f"{len(machines.worker_ips)}; name as many, or lower max"
        )


def _provider(shape: Shape, provider: Provider) -> dict[str, Any]:
    machines = shape.machines
    if provider == "local":
        ips = list(machines.worker_ips)
        return {"type": "local", "head_ip": machines.head_ip, "worker_ips": ips}
    values = {"type": provider, "region": machines.region}
    values |= {"availability_zone": machines.zone} if machines.zone else {}
    return values | ({"project_id": machines.project} if provider == "gcp" else {})


def _auth(shape: Shape) -> dict[str, str]:
    key = shape.machines.key
    return {"ssh_user": shape.machines.user} | ({"ssh_private_key": key} if key else {})


def _node(node: NodeType, provider: Provider, *, is_head: bool = False) -> dict[str, Any]:
    # The head drives: it offers no CPUs to runs.
    resources = {"CPU": 0 if is_head else node.cpus, "GPU": node.gpus}
    if node.memory_gib:
        resources["memory"] = node.memory_gib * 2**30
    values: dict[str, Any] = {
        "resources": {name: amount for name, amount in resources.items() if amount or is_head},
        "node_config": {**_machine(node, provider), **node.node_config},
    }
    if not is_head:
        values |= {"min_workers": node.min_workers, "max_workers": node.max_workers}
    return values


def _machine(node: NodeType, provider: Provider) -> Mapping[str, Any]:
    if provider == "aws":
        disk = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": _DISK_GB}}
        aws: dict[str, Any] = {"InstanceType": node.instance, "BlockDeviceMappings": [disk]}
        return aws | ({"InstanceMarketOptions": {"MarketType": "spot"}} if node.spot else {})
    parameters = {"diskSizeGb": _DISK_GB, "sourceImage": _GCP_IMAGE}
    boot = {"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": parameters}
    scheduling: dict[str, Any] = {"preemptible": True} if node.spot else {}
    if node.gpus:
        scheduling["onHostMaintenance"] = "TERMINATE"
    gcp: dict[str, Any] = {"machineType": node.instance, "disks": [boot]}
    return gcp | ({"scheduling": [scheduling]} if scheduling else {})


def _start(shape: Shape, provider: Provider) -> dict[str, list[str]]:
    exports = " ".join(f"{k}={quote_path(v)}" for k, v in shape.environment().items())
    before = f"export {exports}; ulimit -n 65536"
    if shape.secrets_file:
        before = f"set -a; . {SECRETS}; set +a; {before}"
    head = (
        f"{before}; ray start --head --port={PORT} --dashboard-host=127.0.0.1 "
        "--autoscaling-config=~/ray_bootstrap_config.yaml"
    )
    worker = f"{before}; ray start --address=$RAY_HEAD_IP:{PORT}"
    # On machines of its own a second `ray up` starts Ray anew. Machines that were there already
    # may run somebody else's Ray, which `ray stop` would end.
    stop = [] if provider == "local" else ["ray stop"]
    return {
        "head_start_ray_commands": [*stop, head],
        "worker_start_ray_commands": [*stop, worker],
    }
