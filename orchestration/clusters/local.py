"""A Ray cluster on this machine that outlives the command that started it.

Every port is on loopback unless asked otherwise. What was started carries a mark in its
environment, so that ``stop`` ends exactly that and no other Ray of the same user, which ``ray
stop`` would.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import psutil

from orchestration.job import check_name

LOOPBACK = "127.0.0.1"
MARK = "COMP_CLUSTER"
# Ray starts its workers on ports 10002 to 19999, so these stay out of that range.
GCS_PORT, DASHBOARD_PORT, CLIENT_PORT, AGENT_PORT = 6379, 8265, 10001, 52365
START_SECONDS = 90.0
STOP_SECONDS = 10.0  # to end by itself; what is left then is killed


class LocalClusterError(RuntimeError):
    """The cluster does not start, or there is none."""


@dataclass(frozen=True)
class Running:
    """A cluster that was started here.

    Attributes:
        name: Its name on this machine.
        pid: The process that all others of it descend from.
        mark: What its processes have in their environment.
        host: Where its ports are.
        gcs: Port that Ray's own processes and drivers join.
        dashboard: Port of the dashboard and of the job server.
        client: Port of Ray's client.
        auth: ``"disabled"``, or ``"token"`` if it asks for the token in ``token_file``.
        token_file: See ``auth``; ``""`` if the token came from the environment.
        scratch: What holds Ray's temporary directory. Ray opens that to every user of the machine;
            this one stays closed.
        log: What the head wrote while it started.
    """

    name: str
    pid: int
    mark: str
    host: str
    gcs: int
    dashboard: int
    client: int
    auth: str
    token_file: str
    scratch: str
    log: str

    @property
    def address(self) -> str:
        """What goes into ``RAY_ADDRESS``."""
        return f"{self.host}:{self.gcs}"

    @property
    def dashboard_url(self) -> str:
        """Dashboard and job server."""
        return f"http://{self.host}:{self.dashboard}"

    @property
    def client_url(self) -> str:
        """Ray's client."""
        return f"ray://{self.host}:{self.client}"

    def environment(self) -> dict[str, str]:
        """Returns what a process needs in its environment to join."""
        values = {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": self.auth}
        return values | ({"RAY_AUTH_TOKEN_PATH": self.token_file} if self.token_file else {})


def state_directory() -> Path:
    """Returns where clusters of this user on this machine are noted."""
    if own := os.environ.get("COMP_STATE"):
        return Path(own)
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "comp"


def start(
    name: str = "local",
    *,
    bind: str = LOOPBACK,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    port: int | None = None,
    dashboard_port: int | None = None,
    client_port: int | None = None,
    auth: str = "",
) -> Running:
    """Starts a head on this machine and returns once its job server answers.

    Args:
        name: Tells several clusters on this machine apart.
        bind: Where the ports are; another place than loopback asks for a token by default.
        num_cpus: CPUs that it offers; those of the machine by default.
        num_gpus: GPUs that it offers; those of the machine by default.
        port: For Ray's own processes; 6379 or the next free one by default.
        dashboard_port: For dashboard and jobs; 8265 or the next free one by default.
        client_port: For Ray's client; 10001 or the next free one below by default.
        auth: ``"token"`` or ``"disabled"``; by default the former if ``bind`` is not loopback.

    Raises:
        ValueError: If a port that was asked for is taken, the address is not one of this machine,
            or the name cannot be one.
        LocalClusterError: If such a cluster runs already, or Ray does not start.
    """
    check_name("name", name)
    _check_own_address(bind)
    if (known := find(name)) is not None:
        raise LocalClusterError(
            f"cluster {name!r} runs already at {known.address}; end it with 'comp cluster down "
            f"--name {name}', or give this one another --name"
        )
    gcs = _port(port, GCS_PORT, 1)
    dashboard = _port(dashboard_port, DASHBOARD_PORT, 1)
    client = _port(client_port, CLIENT_PORT, -1)
    state = state_directory()
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    scratch = tempfile.mkdtemp(prefix="comp-up-", dir="/tmp" if Path("/tmp").is_dir() else None)
    is_local = is_loopback(bind)
    running = Running(
        name=name,
        pid=0,
        mark=secrets.token_hex(8),
        host=bind if is_local else _own_address(bind),
        gcs=gcs,
        dashboard=dashboard,
        client=client,
        auth=auth or ("disabled" if is_local else "token"),
        token_file="",
        scratch=scratch,
        log=str(state / f"cluster-{name}.log"),
    )
    if running.auth == "token" and not os.environ.get("RAY_AUTH_TOKEN"):
        running = replace(running, token_file=_token_file(state, name))
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *(f"--node-ip-address={running.host}", f"--port={gcs}"),
        *(f"--dashboard-host={bind}", f"--dashboard-port={dashboard}"),
        *(f"--ray-client-server-port={client}", f"--temp-dir={scratch}/ray"),
        # Without this port there are no jobs, and the first Ray on a machine, be it the own one of
        # a study, takes the usual one.
        f"--dashboard-agent-listen-port={_port(None, AGENT_PORT, 1)}",
        *("--disable-usage-stats", "--include-dashboard=true"),
        *([] if num_cpus is None else [f"--num-cpus={num_cpus}"]),
        *([] if num_gpus is None else [f"--num-gpus={num_gpus}"]),
    ]
    own = os.environ | running.environment() | {MARK: running.mark}
    own.pop("RAY_ADDRESS")
    # Jobs find the Python of this environment first.
    own["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), own.get("PATH", os.defpath)])
    if is_local:
        # Otherwise Ray puts the machine's outer address in the place of loopback.
        own["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    with Path(running.log).open("wb") as log:
        process = subprocess.Popen(
            command,
            env=own,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    running = replace(running, pid=process.pid)
    try:
        _wait_until_up(running, process)
    except BaseException:
        _end(running)
        if running.token_file:
            Path(running.token_file).unlink(missing_ok=True)
        raise
    text = json.dumps(asdict(running), indent=1) + "\n"
    _note(name).write_text(text, encoding="utf-8")
    return running


def find(name: str = "local") -> Running | None:
    """Returns a cluster that was started here and still runs."""
    try:
        values: dict[str, Any] = json.loads(_note(name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    running = Running(**values)
    if _processes(running):
        return running
    _forget(running)
    return None


def stop(name: str = "local") -> int:
    """Ends a cluster that was started here and nothing else.

    Returns:
        The number of processes that were ended.

    Raises:
        LocalClusterError: If there is none of that name.
    """
    running = find(name)
    if running is None:
        raise LocalClusterError(
            f"no cluster {name!r} of 'comp cluster up' runs on this machine; others are ended "
            "where they were started"
        )
    count = _end(running)
    _forget(running)
    return count


def is_here(address: str) -> bool:
    """Tells whether the address of a job server or client is of a cluster that was started here.

    Loopback alone does not say so: it may be one end of a tunnel.
    """
    parts = check_address(address)
    ports = {port for r in all_running() for port in (r.dashboard, r.client)}
    return is_loopback(str(parts.hostname)) and parts.port in ports


def check_address(address: str) -> SplitResult:
    """Splits the address of a job server or of Ray's client.

    Raises:
        ValueError: If it is of another form.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https", "ray") or not parts.hostname:
        raise ValueError(
            "the address of a job server must look like http://HOST:8265 or ray://HOST:10001, but "
            f"got {address!r}; for HOST:6379 set RAY_ADDRESS and leave --address out"
        )
    return parts


def is_loopback(host: str) -> bool:
    """Tells whether only this machine can reach a host name or address."""
    return host in ("localhost", "::1") or host.startswith("127.")


def _port(asked: int | None, usual: int, step: int) -> int:
    if asked is not None:
        if not _is_free(asked):
            raise ValueError(
                f"port {asked} is in use by another program; name another one, or leave the "
                "option out to get a free one"
            )
        return asked
    return next(port for port in range(usual, usual + 200 * step, step) if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _check_own_address(bind: str) -> None:
    try:
        with socket.socket() as probe:
            probe.bind((bind, 0))
    except OSError as error:
        raise ValueError(
            f"bind must be an IPv4 address of this machine, but got {bind!r}; 0.0.0.0 means all "
            "of them"
        ) from error


def _own_address(bind: str) -> str:
    """Returns an address of this machine for one that means all of them."""
    if bind != "0.0.0.0":
        return bind
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; chooses the interface that leads out
        return str(probe.getsockname()[0])


def _token_file(state: Path, name: str) -> str:
    path = state / f"cluster-{name}.token"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:  # noqa: PTH123
        stream.write(secrets.token_hex(32))
    return str(path)


def _wait_until_up(running: Running, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise LocalClusterError(f"Ray did not start: {_last_words(running)}")
        if _answers(f"{running.dashboard_url}/api/version"):
            return
        time.sleep(0.2)
    raise LocalClusterError(
        f"Ray did not start within {START_SECONDS:g} s; its output is in {running.log}"
    )


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)  # it is up, and asks for the token
    except OSError:
        return False


def _last_words(running: Running) -> str:
    lines = [line.strip() for line in Path(running.log).read_text().splitlines() if line.strip()]
    return f"{lines[-1] if lines else 'it said nothing'} (all of it is in {running.log})"


def _processes(running: Running) -> list[psutil.Process]:
    """Returns what carries the cluster's mark, and what descends from that."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == running.mark:
                found[process.pid] = process
                found |= {child.pid: child for child in process.children(recursive=True)}
    return [p for p in found.values() if p.pid != os.getpid() and _is_alive(p)]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _wait(processes: list[psutil.Process], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(map(_is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)


def _end(running: Running) -> int:
    everything = _processes(running)
    first = [process for process in everything if process.pid == running.pid]
    for process in first:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGTERM)
    _wait(first, STOP_SECONDS)
    left = _processes(running)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    _wait(left, 2.0)
    shutil.rmtree(running.scratch, ignore_errors=True)
    return len(everything)


def _note(name: str) -> Path:
    return state_directory() / f"cluster-{name}.json"


def _forget(running: Running) -> None:
    for path in (_note(running.name), Path(running.log)):
        path.unlink(missing_ok=True)
    if running.token_file:
        Path(running.token_file).unlink(missing_ok=True)


def all_running() -> Iterator[Running]:
    """Yields every cluster that was started here and still runs."""
    for path in sorted(state_directory().glob("cluster-*.json")):
        running = find(path.stem.removeprefix("cluster-"))
        if running is not None:
            yield running
