"""Cluster specs and what is rendered from them, held to the schemas of whoever reads it."""

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from orchestration.clusters import kuberay, slurm, vm
from orchestration.clusters.checks import check_kubernetes, check_ray_up
from orchestration.clusters.shape import EXAMPLE, Shape, ShapeError
from studies.cli import cli
from studies.clusterspec import load_cluster
from studies.errors import SpecError
from studies.yaml_text import read_yaml, write_yaml

GCP = ("machines.project=my-project", "machines.region=us-central1")
LOCAL = ("machines.head_ip=10.0.0.1", "machines.worker_ips=[10.0.0.2, 10.0.0.3, a, b]")


def shape(*overrides: str) -> Shape:
    return load_cluster(EXAMPLE, overrides).to_shape()


def run(*words: str) -> int:
    return cli.main(["cluster", *words], standalone_mode=False)


@pytest.mark.parametrize(("provider", "overrides"), [("aws", ()), ("gcp", GCP), ("local", LOCAL)])
def test_a_cluster_file_is_what_ray_reads(provider: Any, overrides: tuple[str, ...]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    values = vm.render(shape(*overrides), provider)
    check_ray_up(values)
    again = read_yaml(write_yaml(values))
    assert again == values
    validate_config(prepare_config(copy.deepcopy(again)))


def test_idle_machines_and_spot_ones_are_what_was_asked_for() -> None:
    values = vm.render(shape("workers.l4.min=1", "workers.l4.max=3"), "aws")
    worker = values["available_node_types"]["l4"]
    assert (worker["min_workers"], worker["max_workers"], values["max_workers"]) == (1, 3, 3)
    assert worker["resources"] == {"CPU": 8, "GPU": 1, "memory": 32 * 2**30}
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert values["available_node_types"]["head"]["resources"]["CPU"] == 0


def test_machines_that_are_there_already_keep_other_rays() -> None:
    assert "ray stop" not in vm.render(shape(*LOCAL), "local")["head_start_ray_commands"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("max_worker",), 3, "max_worker"),
        (("head_node_type",), "nobody", "must be one of head, l4, but got 'nobody'"),
        (("available_node_types", "l4", "max_workers"), 9, "min_workers <= max_workers <= 4"),
        (("provider",), {}, "'type' is a required property"),
    ],
)
def test_a_wrong_cluster_file_is_named(path: tuple[str, ...], value: Any, message: str) -> None:
    values = copy.deepcopy(vm.render(shape(), "aws"))
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        check_ray_up(values)


def manifests() -> list[dict[str, Any]]:
    cluster = kuberay.cluster(shape(), "2.60.0")
    return [cluster, *kuberay.job(shape(), "2.60.0", "kind: study\n")]


def test_manifests_have_the_fields_of_kuberay() -> None:
    for values in manifests():
        check_kubernetes(values)
        assert read_yaml(write_yaml(values)) == values


def test_a_job_on_kubernetes_carries_its_study_and_a_token() -> None:
    _, config, job = manifests()
    spec = job["spec"]["rayClusterSpec"]
    assert config["data"] == {"study.yaml": "kind: study\n"}
    assert job["spec"]["entrypoint"] == "comp study run /etc/comp/study.yaml"
    assert spec["authOptions"] == {"mode": "token"}
    (group,) = spec["workerGroupSpecs"]
    container = group["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["envFrom"] == [{"secretRef": {"name": "comp-secrets"}}]
    assert {"name": "COMP_ROOT", "value": "s3://my-bucket/comp"} in container["env"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("headGroupSpecs",), {}, "'headGroupSpecs' was unexpected"),
        (("authOptions", "mode"), "password", "'password' is not one of"),
        (("workerGroupSpecs", 0, "minReplicas"), "1", "'1' is not of type 'integer'"),
        (("workerGroupSpecs", 0, "replicas"), 9, "minReplicas <= replicas <= maxReplicas"),
        (("headGroupSpec", "rayStartParams", "num-cpus"), 0, "0 is not of type 'string'"),
    ],
)
def test_a_wrong_manifest_is_named(path: tuple[Any, ...], value: Any, message: str) -> None:
    values = manifests()[0]
    inner: Any = values["spec"]
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        check_kubernetes(values)


def test_the_batch_script_asks_for_the_hosts_and_is_a_script() -> None:
    script = slurm.render(shape("workers.l4.min=2"), ["comp", "study", "run", "a b.yaml"])
    lines = script.splitlines()
    for line in ("nodes=2-4", "gpus-per-node=1", "mem=32G", "signal=B:TERM@120", "exclusive"):
        assert f"#SBATCH --{line}" in lines
    assert "comp study run 'a b.yaml'" in script
    assert "@" not in script.replace('"$@"', "").replace("[@]", "").replace("TERM@120", "")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("render", "overrides", "message"),
    [
        ("slurm", ("workers.big={cpus: 8}",), "one kind of host, but the cluster has workers l4,"),
        ("kuberay", ("image=''",), "needs an image"),
        ("kuberay", ("setup=[pip install x]",), "do not run on Kubernetes"),
        ("job", ("storage=''",), "storage that outlives its pods"),
        ("gcp", (), "provider gcp needs machines.project"),
        ("aws", ("head.instance=''",), "needs head.instance"),
        ("aws", ("secrets.file=''",), "put RAY_AUTH_TOKEN=... into a file"),
        ("local", ("machines.head_ip=h",), "to be 4 machines, but machines.worker_ips names 0"),
    ],
)
def test_what_a_place_lacks_is_named(
    render: str, overrides: tuple[str, ...], message: str
) -> None:
    given = shape(*overrides)
    calls = {
        "slurm": lambda: slurm.render(given, ["true"]),
        "kuberay": lambda: kuberay.cluster(given, "2.60.0"),
        "job": lambda: kuberay.job(given, "2.60.0", ""),
    }
    provider: Any = render
    with pytest.raises(ShapeError, match=message):
        calls.get(render, lambda: vm.render(given, provider))()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("workers.l4.maximum=3", "workers.l4: unknown key 'maximum'"),
        ("workers.l4.min=9", "min must not be above max, but got 9 and 4"),
        ("workers={}", "at least one kind of machine"),
        ("name=My_Cluster", "must be lower-case letters"),
        ("name=../up", "name must be 1 to 128 letters"),
        ("storage=runs", "a URI or an absolute path that all machines share"),
        ("storage=s3://key:hunter2@bucket/x", "must not hold a key"),
        ("auth=password", "auth must be 'token' or 'disabled'"),
        ('slurm.partition="gpu\\n#SBATCH --uid=root"', "one line without control characters"),
        ("slurm.options=['; rm -r x']", "an option must start with '-'"),
    ],
)
def test_a_wrong_cluster_spec_is_named(override: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        load_cluster(EXAMPLE, (override,))
    assert "hunter2" not in str(caught.value)


def test_shell_words_of_a_spec_stay_words(tmp_path: Path) -> None:
    """Attacks what ends up in a shell: the storage and the file of secrets."""
    trap = tmp_path / "trap"
    given = shape(f"storage=/x/$(touch {trap})", f"secrets.file='/dev/null; touch {trap}'")
    script = slurm.render(given, ["true", f"$(touch {trap})"])
    head = script[: script.index("export num_nodes")]
    subprocess.run(["bash"], input=head, text=True, check=False, capture_output=True)
    (command,) = vm.render(given, "aws")["worker_start_ray_commands"][1:]
    before = command.partition("; ray start")[0]
    subprocess.run(["bash", "-c", before], check=False, capture_output=True)
    assert not trap.exists()


def test_the_commands_print_what_they_render(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "cluster.yaml"
    run("example")
    path.write_text(capsys.readouterr().out)
    assert run("vm", str(path), "--provider", "aws") == 0
    check_ray_up(read_yaml(capsys.readouterr().out))
    assert run("kuberay", str(path), "--study", "smoke", "--json") == 0
    found = json.loads(capsys.readouterr().out)["manifests"]
    assert [values["kind"] for values in found] == ["ConfigMap", "RayJob"]
    assert run("slurm", str(path), "--study", "smoke") == 0
    assert capsys.readouterr().out.startswith("#!/usr/bin/env bash\n#SBATCH --job-name=comp\n")


@pytest.mark.parametrize(
    "words", [("kuberay",), ("slurm", "--study", "smoke"), ("vm", "--provider", "aws")]
)
def test_a_cluster_without_a_token_is_warned_of(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words[0], str(EXAMPLE), *words[1:]) == 0
    assert "warning" not in capsys.readouterr().err
    assert run(words[0], str(EXAMPLE), *words[1:], "--set", "auth=disabled") == 0
    assert "can run any program" in capsys.readouterr().err


def test_a_mistake_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("slurm", str(EXAMPLE)) == 2
    assert "--study must name the study" in capsys.readouterr().err
    assert run("kuberay", str(EXAMPLE), "--study", "prune-vqa") == 2
    assert "is of kind 'prune', but a cluster runs studies" in capsys.readouterr().err
    assert run("up", "--bind", "203.0.113.9") == 2
    assert "bind must be an IPv4 address of this machine" in capsys.readouterr().err
    assert run("vm", "nowhere.yaml", "--provider", "aws") == 2
    assert "'comp cluster example' prints one" in capsys.readouterr().err
