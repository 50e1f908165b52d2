"""Submits a study to a cluster as a Ray job, follows its output, and finds it again.

The package travels with the job as an unpacked wheel, beside the study's spec; what it depends on
must be installed on the cluster. Secrets do not travel: Ray shows what does on its dashboard. They
come from the environment of the cluster's machines.
"""

import asyncio
import contextlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray.job_submission import JobStatus, JobSubmissionClient

from orchestration.cluster import ClusterError
from orchestration.clusters.local import check_address, is_loopback

PACKAGES = ("comp", "orchestration", "studies")
DISTRIBUTION = "comp-vlm"
SPEC_FILE = "study.yaml"
HANDED_ON = ("MLFLOW_TRACKING_URI",)  # unless there is a password in it


@dataclass(frozen=True)
class JobState:
    """A job as a person reads it.

    Attributes:
        job: Its id, which names the study.
        study: The study.
        status: ``"PENDING"``, ``"RUNNING"``, ``"SUCCEEDED"``, ``"FAILED"`` or ``"STOPPED"``.
        exit_code: What the study's driver ended with, ``None`` before that.
        message: What Ray says of it.
    """

    job: str
    study: str
    status: str
    exit_code: int | None
    message: str

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class RayJobs:
    """The job server of a cluster."""

    def __init__(self, address: str) -> None:
        """Connects.

        Args:
            address: ``http://HOST:PORT`` of the dashboard, or ``ray://HOST:PORT``, which is asked
                where that is.

        Raises:
            ClusterError: If nothing answers there, or it asks for a token.
            ValueError: If the address is of another form.
        """
        is_client = check_address(address).scheme == "ray"
        self.address = _dashboard_of(address) if is_client else address.rstrip("/")
        logging.getLogger("ray").setLevel(logging.WARNING)  # it tells of every upload
        with _explained(self.address):
            self._client = JobSubmissionClient(self.address)

    def submit(self, study: str, spec: str, words: list[str]) -> str:
        """Submits a study and returns the job's id.

        Args:
            study: Its name.
            spec: Its spec as YAML.
            words: Further words for ``comp study run``.

        Raises:
            ClusterError: If the server does not take it.
        """
        job = f"comp-{study}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        command = " ".join(["python -m studies.cli study run", SPEC_FILE, *words])
        with tempfile.TemporaryDirectory() as scratch, _explained(self.address):
            directory = Path(scratch) / "job"
            unpack_wheel(directory)
            (directory / SPEC_FILE).write_text(spec, encoding="utf-8")
            handed = {name: os.environ[name] for name in HANDED_ON if name in os.environ}
            return str(
                self._client.submit_job(
                    entrypoint=command,
                    submission_id=job,
                    runtime_env={
                        "working_dir": str(directory),
                        "env_vars": {k: v for k, v in handed.items() if "@" not in v},
                    },
                    metadata={"study": study},
                )
            )

    def find(self, study: str) -> JobState | None:
        """Returns the newest job of a study, ``None`` if it has none."""
        with _explained(self.address):
            jobs = [
                d for d in self._client.list_jobs() if (d.metadata or {}).get("study") == study
            ]
        newest = max(jobs, key=lambda details: details.start_time or 0, default=None)
        return _state(newest) if newest else None

    def state(self, job: str) -> JobState:
        """Returns what is known of a job."""
        with _explained(self.address):
            return _state(self._client.get_job_info(job))

    def follow(self, job: str, write: Callable[[str], object]) -> JobState:
        """Writes a job's output from its beginning until it ends.

        Raises:
            ClusterError: If the connection breaks off; the job goes on.
        """
        state = self.state(job)
        if state.has_ended:
            with _explained(self.address):
                write(self._client.get_job_logs(job))
            return state

        async def stream() -> None:
            async for text in self._client.tail_job_logs(job):
                write(text)

        with _explained(self.address):
            asyncio.run(stream())
        deadline = time.monotonic() + 30
        while not (state := self.state(job)).has_ended and time.monotonic() < deadline:
            time.sleep(0.2)
        return state

    def stop(self, job: str) -> None:
        """Asks a job to end: its driver gets SIGTERM, and the study can go on later."""
        with _explained(self.address):
            self._client.stop_job(job)


def unpack_wheel(directory: Path) -> None:
    """Writes the installed package as its unpacked wheel: modules, data and metadata."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in PACKAGES:
        source = Path(__file__).parents[1] / name
        shutil.copytree(source, directory / name, ignore=ignore)
    own = importlib.metadata.distribution(DISTRIBUTION)
    info = directory / f"{DISTRIBUTION.replace('-', '_')}-{own.version}.dist-info"
    info.mkdir()
    text = own.read_text("METADATA") or own.read_text("PKG-INFO") or ""
    (info / "METADATA").write_text(text, encoding="utf-8")


def _state(details: Any) -> JobState:
    status = details.status
    return JobState(
        job=str(details.submission_id),
        study=str((details.metadata or {}).get("study", "")),
        status=str(status.value if isinstance(status, JobStatus) else status),
        exit_code=details.driver_exit_code,
        message=str(details.message or ""),
    )


def _dashboard_of(address: str) -> str:
    """Asks the server of Ray's client where the dashboard is.

    Raises:
        ClusterError: If it does not answer, or the dashboard cannot be reached from here.
    """
    import ray

    parts = urlsplit(address)
    try:
        context: Any = ray.init(address)
        place = str(context.dashboard_url)
        context.disconnect()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        first = lines[-1] if lines else type(error).__name__
        raise ClusterError(
            f"Ray's client server at {address} does not answer ({first}); check the address, or "
            "pass the dashboard's, http://HOST:8265"
        ) from error
    host, _, port = place.rpartition(":")
    if is_loopback(host) and not is_loopback(str(parts.hostname)):
        raise ClusterError(
            f"the job server of {address} listens on loopback of its head only; open a tunnel "
            f"with 'ssh -L {port}:127.0.0.1:{port} {parts.hostname}' and pass "
            f"http://127.0.0.1:{port}"
        )
    return f"http://{place}"


@contextlib.contextmanager
def _explained(address: str) -> Iterator[None]:
    try:
        yield
    except ClusterError:
        raise
    except Exception as error:
        text = str(error)
        if "token" in text.lower() or "401" in text:
            raise ClusterError(
                f"the job server at {address} asks for a token; set RAY_AUTH_MODE=token, and the "
                "cluster's token as RAY_AUTH_TOKEN or its file as RAY_AUTH_TOKEN_PATH"
            ) from error
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        reason = lines[0].rstrip(".") if lines else type(error).__name__
        with contextlib.suppress(ValueError):
            reason = json.loads(reason)["msg"]
        raise ClusterError(
            f"the job server at {address} does not do that ({reason}); check the address, and "
            "that the cluster runs with its dashboard"
        ) from error
