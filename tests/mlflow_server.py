"""A real MLflow server on loopback, to be stopped, ended and brought back."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server in a process group of its own, over ``server.db`` in a directory.

    Args:
        directory: Where it keeps its files.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.port = directory, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Starts it and returns at once."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.directory}/server.db"]
        command += ["--artifacts-destination", str(self.directory / "artifacts")]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        """Returns once it answers."""
        assert self._process is not None
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.url}/health", timeout=1),
            ):
                return
            assert self._process.poll() is None, (self.directory / "server.log").read_text()
            time.sleep(0.2)

    def send(self, number: int) -> None:
        """Sends all of its processes a signal."""
        if self._process is not None:
            os.killpg(self._process.pid, number)

    def end(self) -> None:
        """Kills it, if it runs."""
        if self._process is not None:
            self.send(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def __enter__(self) -> "Server":
        self.begin()
        self.wait()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.end()
