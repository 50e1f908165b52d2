"""The commands that go on from a finished study, ready to be copied into a shell."""

import shlex
import shutil
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

from orchestration.storage import is_remote, join, parent
from studies.report import StudyReport
from studies.spec import StudySpec
from studies.specfile import tracking_uri
from studies.storages import JOURNAL

LOOPBACK = "127.0.0.1"  # neither MLflow nor the dashboard asks who is there
MLFLOW_PORT = 5000
DASHBOARD_PORT = 8080


def next_steps(report: StudyReport, directory: str) -> list[tuple[str, str]]:
    """Returns what to do next: a heading and a command each.

    Args:
        report: A study with at least one complete trial.
        directory: The study's directory, a path or a URI.
    """
    spec = report.spec
    steps = [
        ("all curves side by side, in MLflow (Charts)", mlflow_command(spec)),
        ("what the search tried, in the Optuna dashboard", dashboard_command(spec, directory)),
    ]
    best = report.summary.best
    if best is not None:
        run_spec = join(parent(directory, 2), "runs", best.runs[0], "spec.yaml")
        steps.append(
            (
                "the best settings once more; put the directory of your own model into model=",
                f"{program('comp')} prune {quote(run_spec)} --set name=my-run "
                f"--set model={shlex.quote(spec.model)}",
            )
        )
    return steps


def mlflow_command(spec: StudySpec) -> str:
    """Returns the command that opens MLflow on a study's runs, or says where its server is."""
    if not spec.tracking.enabled:
        return "# this study has tracking.enabled: false"
    uri = tracking_uri(spec)
    if uri.startswith(("http://", "https://")):
        parts = urlsplit(uri)
        return f"# open {parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}"
    # Without its job runner the server needs 0.5 instead of 2.4 GB.
    return (
        f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {program('mlflow')} server "
        f"--backend-store-uri {shlex.quote(uri)} --host {LOOPBACK} --port {free_port(MLFLOW_PORT)}"
    )


def dashboard_command(spec: StudySpec, directory: str) -> str:
    """Returns the command that opens the Optuna dashboard on a study's storage."""
    if spec.storage == "journal" and is_remote(directory):
        return "# the Optuna dashboard reads local journals and databases, not object stores"
    is_file = spec.storage == "journal"
    where = quote(join(directory, JOURNAL)) if is_file else shlex.quote(spec.storage)
    port = free_port(DASHBOARD_PORT)
    return f"{program('optuna-dashboard')} {where} --host {LOOPBACK} --port {port}"


def program(name: str) -> str:
    """Returns how to call a program of this Python's environment from the current directory."""
    own = Path(sys.executable).parent / name
    found = shutil.which(name)
    if not own.is_file() or (found and Path(found).resolve() == own.resolve()):
        return name
    return quote(own)


def quote(place: str | Path) -> str:
    """Returns a path or URI for a shell: relative where that is shorter."""
    if is_remote(place):
        return shlex.quote(str(place))
    here, path = Path.cwd(), Path(place)
    shown = path.relative_to(here) if path.is_relative_to(here) else path
    return shlex.quote(str(shown))


def free_port(first: int) -> int:
    """Returns the first port from ``first`` on that nothing on this machine listens on."""
    for port in range(first, first + 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    return first
