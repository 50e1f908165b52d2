"""A batch script that turns a Slurm allocation into a Ray cluster and runs one command on it.

Every host becomes one Ray node: the first one the head, where the command runs too. Ports are made
from the job's number, so that two jobs on one host do not meet, and every job has a token of its
own. Two minutes before the time limit the command gets SIGTERM and finishes its stages; then the
job goes back to the queue. On hosts that belong to the job alone the script uses ``ray
symmetric-run`` where the installed Ray has it; elsewhere it does not, because that ends every Ray
of the user on the host.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from orchestration.clusters.shape import Shape, ShapeError

TEMPLATE = Path(__file__).with_name("slurm.sh")
GRACE_SECONDS = 120  # before the time limit; a stage of the largest preset fits


def render(shape: Shape, command: Sequence[str]) -> str:
    """Returns the script.

    Args:
        shape: The cluster; it must have one kind of worker, because an allocation has.
        command: The words to run on the head once every node is there.

    Raises:
        ShapeError: If there are several kinds of workers.
    """
    if len(shape.workers) != 1:
        names = ", ".join(worker.name for worker in shape.workers) or "none"
        raise ShapeError(
            f"a Slurm job has one kind of host, but the cluster has workers {names}; keep one of "
            "them, or write one spec for each and submit two jobs"
        )
    (worker,) = shape.workers
    low, high = max(1, worker.min_workers), max(1, worker.max_workers)
    options = {
        "job-name": shape.name,
        "nodes": str(low) if low == high else f"{low}-{high}",
        "ntasks-per-node": "1",
        "cpus-per-task": str(worker.cpus),
        "gpus-per-node": str(worker.gpus) if worker.gpus else "",
        "mem": f"{worker.memory_gib}G" if worker.memory_gib else "",
        "time": shape.slurm.time,
        "partition": shape.slurm.partition,
        "account": shape.slurm.account,
        "signal": f"B:TERM@{GRACE_SECONDS}",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value]
    lines += ["#SBATCH --requeue"]
    lines += ["#SBATCH --exclusive"] if shape.slurm.exclusive else []
    lines += [f"#SBATCH {option}" for option in shape.slurm.options]
    exports = [f"export {k}={shlex.quote(v)}" for k, v in shape.environment().items()]
    values = {
        "OPTIONS": "\n".join(lines),
        "EXPORTS": "\n".join(exports),
        "SECRETS": _secrets(shape.secrets_file),
        "SETUP": "\n".join(shape.setup),
        "EXCLUSIVE": "1" if shape.slurm.exclusive else "0",
        "CPUS": str(worker.cpus),
        "GPUS": str(worker.gpus),
        "COMMAND": shlex.join(command),
    }
    script = TEMPLATE.read_text(encoding="utf-8")
    for name, value in values.items():
        script = script.replace(f"@{name}@", value)
    return script


def _secrets(path: str) -> str:
    if not path:
        return "# Secrets come from the environment of whoever submits this script."
    return f"set -a; . {quote_path(path)}; set +a  # NAME=value lines; never written elsewhere"


def quote_path(path: str) -> str:
    """Quotes a path for a shell, which still puts the home directory in for ``~``."""
    head, slash, rest = path.partition("/")
    return f"~/{shlex.quote(rest)}" if head == "~" and slash else shlex.quote(path)
