"""The batch script, run as Slurm would: real Ray nodes, and small programs in Slurm's place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.clusters.shape import NodeType, Shape, Slurm
from orchestration.clusters.slurm import render

ROOT = Path(__file__).parents[2]

SRUN = """#!/usr/bin/env bash
# Runs what follows the options once for every node, side by side, as srun does.
echo "srun $*" >>"$LOG"
while [[ "$1" == --* ]]; do shift; done
trap 'kill $(jobs -p) 2>/dev/null' TERM
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node "$@" &
    steps+=($!)
done
code=0
for step in "${steps[@]}"; do wait "$step" || code=$?; done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$LOG"
if [ "$1" = show ]; then echo localhost; fi
"""
COUNT_NODES = """
import os
import ray
from orchestration.cluster import connect, read_state
with connect():
    state = read_state()
    print("nodes", len(state.nodes), "CPUs", state.total["CPU"], os.environ["COMP_ROOT"])
"""


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script, and programs in the place of Slurm's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder, "srun", SRUN)
    program(folder, "scontrol", SCONTROL)
    own = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": f"{folder}:{own}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "LOG": str(tmp_path / "log"),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "2",
    }


def shape(*, exclusive: bool) -> Shape:
    worker = NodeType("cpu", cpus=2, min_workers=2, max_workers=2)
    return Shape(
        name="test",
        head=NodeType("head", cpus=1),
        workers=(worker,),
        storage="/shared/comp",
        slurm=Slurm(exclusive=exclusive),
    )


def run(script: str, tmp_path: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "job.sbatch"
    path.write_text(script)
    return subprocess.run(
        ["bash", str(path)], env=env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.ray
@pytest.mark.slow
def test_every_host_of_an_allocation_becomes_a_node_and_the_command_runs_on_them(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    script = render(shape(exclusive=False), [sys.executable, "-c", COUNT_NODES])
    done = run(script, tmp_path, slurm)
    assert done.returncode == 0, done.stderr
    assert "nodes 2 CPUs 4.0 /shared/comp" in done.stdout
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    port = 20000 + 10 * (os.getpid() % 1000)
    assert f":{port} " not in listed  # no node outlives the job


@pytest.mark.parametrize("code", [0, 3])
def test_on_hosts_of_its_own_a_job_leaves_the_nodes_to_symmetric_run(
    slurm: dict[str, str], tmp_path: Path, code: int
) -> None:
    ray = f"""#!/bin/sh
echo "ray $*" >>"$LOG"
[ "$2" = --help ] || exit {code}
"""
    program(tmp_path / "bin", "ray", ray)
    slurm["SLURM_JOB_NUM_NODES"] = "1"
    done = run(render(shape(exclusive=True), ["comp", "demo"]), tmp_path, slurm)
    port = 20000 + 10 * (os.getpid() % 1000)
    assert done.returncode == code
    words = f"--address=127.0.0.1:{port} --min-nodes=1 --num-cpus=2 --num-gpus=0"
    log = Path(slurm["LOG"]).read_text()
    assert f"ray symmetric-run {words} --disable-usage-stats -- comp demo\n" in log


def test_a_job_whose_time_runs_out_ends_its_stages_and_queues_up_again(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    """`ray` is a program here that is old: it knows no symmetric-run, and its nodes do nothing."""
    program(tmp_path / "bin", "ray", '#!/bin/sh\n[ "$1" = start ] && exec sleep 60\nexit 2\n')
    study = """#!/usr/bin/env bash
[ "$1" = cluster ] && exit 0
trap 'echo finished the stage; exit 130' TERM
echo running; kill -TERM "$BATCH"
while true; do sleep 0.1; done
"""
    program(tmp_path / "bin", "comp", study)
    script = render(shape(exclusive=True), ["comp", "study", "run", "s.yaml"])
    script = script.replace("set -euo pipefail", "set -euo pipefail\nexport BATCH=$$", 1)
    slurm["SLURM_JOB_NUM_NODES"] = "1"
    done = run(script, tmp_path, slurm)
    assert "finished the stage" in done.stdout, done.stderr
    assert done.returncode == 130
    assert f"scontrol requeue {os.getpid()}" in Path(slurm["LOG"]).read_text()
