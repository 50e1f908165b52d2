"""``comp cluster``: start one here, see one, end it, and write what other places want to read."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from studies.cli_base import Function, answer, common, example, mistakes, say

if TYPE_CHECKING:
    from studies.clusterspec import ClusterSpec

name_option = click.option(
    "--name", default="local", show_default=True, help="Tells clusters on this machine apart."
)


@click.group(
    epilog=example(
        "comp cluster up --num-cpus 8",
        "comp cluster example > cluster.yaml",
        "comp cluster slurm cluster.yaml --study my-study.yaml > job.sbatch",
    )
)
def cluster() -> None:
    """Launch Ray clusters: here, on Slurm, Kubernetes, clouds, or machines behind SSH."""


@cluster.command(epilog=example("comp cluster up --num-cpus 8 --num-gpus 2"))
@name_option
@click.option("--num-cpus", type=click.IntRange(0), help="CPUs to offer; all by default.")
@click.option("--num-gpus", type=click.IntRange(0), help="GPUs to offer; all by default.")
@click.option("--port", type=click.IntRange(1024, 65535), help="For Ray itself; 6379 or near.")
@click.option(
    "--dashboard-port",
    type=click.IntRange(1024, 65535),
    help="For dashboard and jobs; 8265 or near.",
)
@click.option(
    "--client-port", type=click.IntRange(1024, 65535), help="For Ray's client; 10001 or near."
)
@click.option(
    "--bind", default="127.0.0.1", show_default=True, help="Address that the ports are on."
)
@click.option(
    "--auth",
    type=click.Choice(["token", "disabled"]),
    help="Whether Ray asks for a token; it does by default unless bound to loopback.",
)
@common
def up(
    name: str,
    num_cpus: int | None,
    num_gpus: int | None,
    port: int | None,
    dashboard_port: int | None,
    client_port: int | None,
    bind: str,
    auth: str | None,
    as_json: bool,
) -> None:
    """Start a Ray head on this machine that stays when this command ends."""
    from orchestration.clusters.local import is_loopback, start

    with mistakes():
        running = start(
            name,
            bind=bind,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            port=port,
            dashboard_port=dashboard_port,
            client_port=client_port,
            auth=auth or "",
        )
    if not is_loopback(bind):
        say(exposed(running.host, running.dashboard, running.auth))
    exports = [f"  export {k}={v}" for k, v in running.environment().items()]
    lines = [
        f"cluster {name!r} runs on this machine: dashboard and jobs {running.dashboard_url}",
        "to work on it:",
        *exports,
        "or submit to it:",
        f"  comp study run SPEC --address {running.dashboard_url}",
        "to end it:",
        f"  comp cluster down{'' if name == 'local' else f' --name {name}'}",
    ]
    values = {
        "name": name,
        "address": running.address,
        "dashboard": running.dashboard_url,
        "client": running.client_url,
        "auth": running.auth,
        "token_file": running.token_file,
        "pid": running.pid,
    }
    answer(as_json, values, "\n".join(lines))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def exposed(host: str, port: int, auth: str) -> str:
    """Returns a warning in plain words for ports that others can reach."""
    guard = (
        "They ask for a token, but send it unencrypted; still"
        if auth == "token"
        else "They ask for no token;"
    )
    return (
        f"warning: the ports of this cluster are open to other machines: whoever reaches "
        f"{host}:{port} and gets in can run any program as {_user()} here. {guard} keep them "
        "behind a firewall, or bind to 127.0.0.1 and use an SSH tunnel."
    )


def _user() -> str:
    import getpass

    return getpass.getuser()


@cluster.command(epilog=example("comp cluster status", "comp cluster status --address auto"))
@name_option
@click.option("--address", help="Another cluster's address; RAY_ADDRESS by default.")
@click.option("--wait-nodes", type=click.IntRange(1), help="First wait for so many nodes.")
@click.option(
    "--timeout", type=click.FloatRange(0), default=300.0, show_default=True, help="Seconds."
)
@common
def status(
    name: str, address: str | None, wait_nodes: int | None, timeout: float, as_json: bool
) -> None:
    """Show the nodes of a cluster and what of its CPUs and GPUs is free."""
    from orchestration.clusters.local import find

    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        running = find(name)
        if running is None:
            text = f"no cluster {name!r} runs on this machine; start one with 'comp cluster up'"
            answer(as_json, {"running": False}, text)
            return
        address = running.address
        os.environ.update(running.environment())
    from orchestration.cluster import connect, read_state, wait_for_head, wait_for_nodes

    if wait_nodes:
        wait_for_head(address, timeout)
    with connect(address):
        if wait_nodes:
            wait_for_nodes(wait_nodes, timeout)
        state = read_state()
    lines = [f"cluster at {address}: {_count(len(state.nodes), 'node')}, Ray {state.ray_version}"]
    for resource in ("CPU", "GPU"):
        if total := state.total.get(resource):
            lines.append(f"  {resource}s: {state.free.get(resource, 0.0):g} of {total:g} free")
    lines += [
        f"  node {node}: {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs, "
        f"{resources.get('memory', 0) / 2**30:.1f} GiB"
        for node, resources in state.nodes.items()
    ]
    values = {
        "running": True,
        "address": address,
        "ray": state.ray_version,
        "nodes": state.nodes,
        "total": state.total,
        "free": state.free,
    }
    answer(as_json, values, "\n".join(lines))


@cluster.command(epilog=example("comp cluster down"))
@name_option
@common
def down(name: str, as_json: bool) -> None:
    """End a cluster of 'comp cluster up', and nothing else."""
    from orchestration.clusters.local import stop

    count = stop(name)
    answer(
        as_json,
        {"name": name, "processes": count},
        f"cluster {name!r} has ended ({count} processes)",
    )


@cluster.command("example", epilog=example("comp cluster example > cluster.yaml"))
@common
def show_example(as_json: bool) -> None:
    """Print a cluster spec to start from."""
    from orchestration.clusters.shape import EXAMPLE

    text = EXAMPLE.read_text(encoding="utf-8").rstrip("\n")
    answer(as_json, {"spec": text}, text)


def with_cluster_spec(function: Function) -> Function:
    """Adds SPEC and ``--set``, which every command that renders takes."""
    for option in (
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override a key of the spec: --set workers.l4.max=8.",
        ),
        click.argument("spec", type=click.Path(path_type=Path, dir_okay=False)),
    ):
        function = option(function)
    return function


study_option = click.option(
    "--study", metavar="SPEC", help="The study to run there: a YAML file or a preset."
)


@cluster.command(
    epilog=example("comp cluster slurm cluster.yaml --study my-study.yaml > job.sbatch")
)
@with_cluster_spec
@study_option
@common
def slurm(spec: Path, overrides: tuple[str, ...], study: str | None, as_json: bool) -> None:
    """Write a batch script: one Ray node per host of the allocation, and a study on them."""
    from orchestration.clusters.slurm import render

    with mistakes():
        shape = _load(spec, overrides).to_shape()
        if study is None:
            raise ValueError("--study must name the study that the job runs, but got none")
        path = _study_file(study)
        text = render(shape, ["comp", "study", "run", str(path)])
    if shape.auth == "disabled":
        say(exposed("a host of the job", 8265, "disabled"))
    answer(as_json, {"script": text}, text.rstrip("\n"))


@cluster.command(
    epilog=example(
        "comp cluster kuberay cluster.yaml > raycluster.yaml",
        "comp cluster kuberay cluster.yaml --study my-study.yaml > rayjob.yaml",
    )
)
@with_cluster_spec
@study_option
@common
def kuberay(spec: Path, overrides: tuple[str, ...], study: str | None, as_json: bool) -> None:
    """Write a RayCluster, or with --study a RayJob that brings its own, for KubeRay."""
    from orchestration.clusters import kuberay as manifests
    from orchestration.clusters.checks import check_kubernetes
    from studies.yaml_text import write_yaml

    with mistakes():
        checked = _load(spec, overrides)
        shape = checked.to_shape()
        if study is None:
            objects = [manifests.cluster(shape, checked.ray)]
        else:
            text = _study_file(study).read_text(encoding="utf-8")
            objects = manifests.job(shape, checked.ray, text)
        for values in objects:
            check_kubernetes(values)
    if shape.auth == "disabled":
        say(exposed(f"{shape.name}-head-svc", 8265, "disabled"))
    text = "---\n".join(write_yaml(values) for values in objects)
    answer(as_json, {"manifests": objects}, text.rstrip("\n"))


@cluster.command(epilog=example("comp cluster vm cluster.yaml --provider aws > ray.yaml"))
@with_cluster_spec
@click.option("--provider", type=click.Choice(["aws", "gcp", "local"]), required=True)
@common
def vm(spec: Path, overrides: tuple[str, ...], provider: Any, as_json: bool) -> None:
    """Write a file for 'ray up': machines of a cloud, or ones that SSH reaches (local)."""
    from orchestration.clusters.checks import check_ray_up
    from orchestration.clusters.vm import render
    from studies.yaml_text import write_yaml

    with mistakes():
        shape = _load(spec, overrides).to_shape()
        values = render(shape, provider)
        check_ray_up(values)
    if shape.auth == "disabled":
        say(exposed("the head", 6379, "disabled"))
    answer(as_json, {"cluster": values}, write_yaml(values).rstrip("\n"))


def _study_file(study: str) -> Path:
    """Returns the file of a study's spec after checking it.

    Raises:
        SpecError: If anything is wrong in it, or it is no study.
        FileNotFoundError: If there is no such file and no such preset.
    """
    from studies.errors import SpecError
    from studies.specfile import find_spec, read_spec

    kind = read_spec(study).kind
    if kind != "study":
        raise SpecError(f"{study} is of kind {kind!r}, but a cluster runs studies")
    return find_spec(study).resolve()


def _load(spec: Path, overrides: tuple[str, ...]) -> "ClusterSpec":
    from studies.clusterspec import load_cluster

    return load_cluster(spec, overrides)
