"""A running Ray to work on: one started here for this process, or one that already runs."""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import grpc
import ray
from ray._private import ray_constants
from ray.exceptions import RayActorError

from orchestration.clusters.local import is_loopback
from orchestration.executor import Resources
from orchestration.lock import LockHeld, is_alive

OBJECT_STORE_MIB = 200  # jobs and records are small; models are loaded by the workers themselves
NAMESPACE = "comp"

_ray: Any = ray  # for the few of its functions that have no types


class ClusterError(RuntimeError):
    """There is no Ray cluster to work on, or it has no room."""


class HeadLost(ClusterError):
    """The head node of the cluster is gone, and with it every actor."""


class Cluster:
    """A connection to Ray.

    Attributes:
        address: Address of the cluster.
        owned: Whether the cluster was started for this process and ends with it.
    """

    def __init__(self, address: str, *, owned: bool, scratch: "_Scratch | None" = None) -> None:
        self.address, self.owned = address, owned
        self._scratch = scratch

    def close(self) -> None:
        """Leaves the cluster; ends it if it was started here."""
        if self.owned:
            ray.shutdown()
        if self._scratch is not None:
            self._scratch.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def connect(
    address: str | None = None, *, num_cpus: int | None = None, num_gpus: int | None = None
) -> Cluster:
    """Joins the cluster at ``address`` or ``RAY_ADDRESS``, or starts one on this machine.

    A cluster that this process is already connected to is used as it is.

    Args:
        address: ``host:port``, ``"auto"``, or ``None`` for what the environment says.
        num_cpus: CPUs of a cluster that is started here; ``None`` for those of the machine.
        num_gpus: The same for GPUs.

    Raises:
        ClusterError: If it cannot be reached, runs other versions, or does not start.
    """
    if ray.is_initialized():
        return Cluster(ray.get_runtime_context().gcs_address, owned=False)
    _silence_raylet()
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        return _join(address)
    return _start(num_cpus, num_gpus)


def _join(address: str) -> Cluster:
    try:
        _knock(address)
        _check_terms(address)
        with _on_loopback(_is_only_local(address)):
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except ClusterError:
        raise
    except Exception as error:
        raise ClusterError(_explain(address, error)) from error
    return Cluster(address, owned=True)


def _knock(address: str) -> None:
    """Tries the address first: Ray ends the whole process if nothing answers there.

    Raises:
        OSError: If nothing does within five seconds.
    """
    place = _host_and_port(address)
    if place:
        socket.create_connection(place, timeout=5.0).close()


def _check_terms(address: str) -> None:
    """Asks the cluster whether it takes our token and runs our version.

    Ray itself tries for 20 seconds with a wrong token, writes a line on standard error for each
    attempt and then names no reason. What does not answer as expected is left to Ray.

    Raises:
        ClusterError: If it refuses the token, or runs another version.
    """
    place = _host_and_port(address)
    if place is None or "://" in address:
        return
    try:
        with grpc.insecure_channel(f"{place[0]}:{place[1]}") as channel:
            ask = channel.unary_unary(
                "/ray.rpc.NodeInfoGcsService/CheckAlive",
                request_serializer=bytes,
                response_deserializer=bytes,
            )
            reply: bytes = ask(b"", timeout=5.0, metadata=_token())
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise ClusterError(_NEEDS_TOKEN.format(address)) from error
        return
    found = re.search(rb"\d+\.\d+\.\d+[\w.]*", reply)
    theirs = found.group().decode() if found else ray.__version__
    if theirs != ray.__version__:
        raise ClusterError(
            f"the Ray cluster at {address} runs Ray {theirs}, but this process has Ray "
            f"{ray.__version__}; install the cluster's version here (pip install "
            f"'ray[default]=={theirs}'), or unset RAY_ADDRESS to work on this machine alone"
        )


_NEEDS_TOKEN = (
    "the Ray cluster at {} asks for a token; set RAY_AUTH_MODE=token, and the cluster's token as "
    "RAY_AUTH_TOKEN or its file as RAY_AUTH_TOKEN_PATH"
)


def _token() -> tuple[tuple[str, str], ...]:
    """Returns our token as Ray's clients send it; nothing if there is none to be sent."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return ()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    with contextlib.suppress(OSError):
        token = token or path.read_text(encoding="utf-8").strip()
    return (("authorization", f"Bearer {token}"),) if token else ()


def _host_and_port(address: str) -> tuple[str, int] | None:
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    return (host, int(port)) if colon and port.isdigit() else None


def _is_only_local(address: str) -> bool:
    """Tells whether a cluster answers on loopback alone, as those of ``comp cluster up`` do."""
    place = _host_and_port(address)
    if place is None or not is_loopback(place[0]) or "://" in address:
        return False
    try:
        outside = _ray.util.get_node_ip_address(), place[1]
        socket.create_connection(outside, timeout=2.0).close()
    except OSError:
        return True
    return False


@contextlib.contextmanager
def _on_loopback(wanted: bool) -> Iterator[None]:
    """Keeps Ray from putting the machine's outer address in the place of loopback.

    Ray does so for clusters of several machines, and then listens to everybody. It has one switch
    for that, made for other operating systems, which it reads from the environment once.
    """
    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    before, known = os.environ.get(name), getattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    if wanted:
        os.environ[name] = "0"
        ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = known
        if wanted and before is None:
            del os.environ[name]
        elif before is not None:
            os.environ[name] = before


def _start(num_cpus: int | None, num_gpus: int | None) -> Cluster:
    # A fresh cluster of one user on one machine needs neither tokens nor statistics; without
    # these two Ray writes a token into the home directory and talks about both.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    scratch = _Scratch()
    try:
        with _on_loopback(True):
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_MIB * 2**20,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(scratch.path / "ray"),  # Ray opens its own to every user
            )
    except Exception as error:
        scratch.remove()
        raise ClusterError(f"Ray did not start on this machine: {_first_line(error)}") from error
    return Cluster(ray.get_runtime_context().gcs_address, owned=True, scratch=scratch)


class _Scratch:
    """The directory of a Ray that ends with this process.

    A driver that is killed cannot remove its own; the next one does, which it may because the
    kernel has given up the dead one's lock.

    Attributes:
        path: The directory.
    """

    def __init__(self) -> None:
        place = Path(_short_temporary_directory())
        _remove_orphans(place)
        self.path = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=place))
        self._lock: IO[str] = (self.path / _OWNED).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Deletes it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


_SCRATCH, _OWNED = "comp-ray-", "owner.lock"


def _remove_orphans(place: Path) -> None:
    """Deletes the scratch directories whose drivers are dead."""
    for path in place.glob(f"{_SCRATCH}*"):
        try:
            lock = (path / _OWNED).open("r+")
        except OSError:
            continue  # another user's, or just being made
        with lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)


class HeadWatch:
    """Notices that the head node is gone before Ray does, which then ends the process.

    Ray tries for a minute to reach its head again, in which any call may stand still, and then
    exits without a word to anybody's handlers.
    """

    def __init__(
        self, address: str | None = None, *, patience: float = 5.0, interval: float = 0.5
    ) -> None:
        """Watches a head.

        Args:
            address: ``HOST:PORT`` of it; by default that of the cluster that this process is
                connected to.
            patience: Seconds without an answer after which it counts as gone.
            interval: Seconds between two looks.
        """
        self.address = address or str(ray.get_runtime_context().gcs_address)
        self._patience, self._interval = patience, interval
        self._place = _host_and_port(self.address)
        self._silent_since: float | None = None
        self._stopped = threading.Event()
        if self._answers():  # else it is reached through Ray's client, say, and cannot be watched
            threading.Thread(target=self._watch, name="head", daemon=True).start()

    def _answers(self) -> bool:
        if self._place is None:
            return False
        try:
            socket.create_connection(self._place, timeout=1.0).close()
        except OSError:
            return False
        return True

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            if self._answers():
                self._silent_since = None
                continue
            now = time.monotonic()
            self._silent_since = self._silent_since or now
            if now - self._silent_since > 2 * self._patience:
                # The main thread stands still in one of Ray's calls, and Ray is about to exit.
                print(f"comp: {self._sentence()}", file=sys.stderr, flush=True)
                os._exit(1)

    @property
    def is_lost(self) -> bool:
        """Whether the head has been silent for longer than ``patience``."""
        since = self._silent_since
        return since is not None and time.monotonic() - since > self._patience

    def check(self) -> None:
        """Returns while the head answers; waits for it as long as ``patience`` otherwise.

        Raises:
            HeadLost: If it does not answer again.
        """
        while self._silent_since is not None:
            if self.is_lost:
                raise HeadLost(self._sentence())
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends the watch."""
        self._stopped.set()

    def _sentence(self) -> str:
        return (
            f"the head node of the Ray cluster at {self.address} is gone; start it again and give "
            "the same command, which goes on after the last finished stages"
        )


def _short_temporary_directory() -> str:
    """Returns a directory in which Ray's sockets stay below the 107 bytes that Unix allows."""
    usual = tempfile.gettempdir()
    return usual if len(usual) <= 24 or not Path("/tmp").is_dir() else "/tmp"


def _explain(address: str, error: Exception) -> str:
    """Turns what Ray raises on joining into one sentence."""
    text = str(error)
    if "ersion mismatch" in text:
        versions = re.findall(r"Ray: (\S+)\s+Python: (\S+)", text)
        if len(versions) == 2:
            (their_ray, their_python), (our_ray, our_python) = versions
            return (
                f"the Ray cluster at {address} runs Ray {their_ray} on Python {their_python}, but "
                f"this process has Ray {our_ray} on Python {our_python}; install the cluster's "
                "versions here, or unset RAY_ADDRESS to work on this machine alone"
            )
    if "oken" in text and re.search("authenti|InvalidAuthToken|Unauthorized", text, re.I):
        return _NEEDS_TOKEN.format(address)
    return (
        f"no Ray cluster can be joined at {address} ({_first_line(error)}); start one with 'comp "
        "cluster up', or unset RAY_ADDRESS to work on this machine alone"
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


@dataclass(frozen=True)
class ClusterState:
    """What a cluster has.

    Attributes:
        nodes: Address of every node that is alive, and its resources.
        total: Resources of all of them: ``CPU``, ``GPU``, ``memory`` (bytes), ...
        free: What of that is free.
        ray_version: Version of Ray.
    """

    nodes: dict[str, dict[str, float]]
    total: dict[str, float]
    free: dict[str, float]
    ray_version: str


def read_state() -> ClusterState:
    """Returns what the cluster has that this process is connected to."""
    nodes = {
        f"{node['NodeManagerAddress']} {node['NodeID'][:6]}": _countable(node["Resources"])
        for node in _ray.nodes()
        if node["Alive"]
    }
    total, free = _ray.cluster_resources(), _ray.available_resources()
    return ClusterState(nodes, _countable(total), _countable(free), ray.__version__)


def wait_for_head(address: str, timeout: float) -> None:
    """Waits until something answers at an address.

    Raises:
        ClusterError: If nothing does after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            return _knock(address)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"no head came up at {address} within {timeout:g} s; see its log, or wait "
                    "longer"
                ) from error
        time.sleep(0.5)


def wait_for_nodes(num_nodes: int, timeout: float) -> None:
    """Waits until the cluster that this process is connected to has so many nodes.

    Raises:
        ClusterError: If it has fewer after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while len(read_state().nodes) < num_nodes:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{len(read_state().nodes)} of {num_nodes} nodes joined within {timeout:g} s; see "
                "the logs of the others, or wait longer"
            )
        time.sleep(0.5)


def _countable(resources: dict[str, float]) -> dict[str, float]:
    """Leaves out what Ray keeps for itself: one resource for every node's name."""
    return {k: v for k, v in sorted(resources.items()) if not k.startswith("node:")}


def total_gpus() -> float:
    """Returns the GPUs of the cluster that this process is connected to."""
    return float(_ray.cluster_resources().get("GPU", 0.0))


def total_cpus() -> float:
    """Returns the CPU cores of the cluster that this process is connected to."""
    return float(_ray.cluster_resources().get("CPU", 0.0))


def use_of_resources() -> dict[str, tuple[float, float]]:
    """Returns what the cluster has in use and in all: nodes, CPUs and, if there are any, GPUs."""
    total, free = _ray.cluster_resources(), _ray.available_resources()
    nodes = float(sum(node["Alive"] for node in _ray.nodes()))
    found = {"nodes": (nodes, nodes)}
    for name, label in (("CPU", "CPUs"), ("GPU", "GPUs")):
        if total.get(name):
            found[label] = (total[name] - free.get(name, 0.0), total[name])
    return found


def check_fits(resources: Resources) -> None:
    """Refuses slots that no node of the cluster could ever hold, or all nodes for one's workers.

    Raises:
        ClusterError: With what is asked for and what the nodes have.
    """
    nodes = [node["Resources"] for node in _ray.nodes() if node["Alive"]]
    held = sum(_num_held(node, resources) for node in nodes)
    if held >= resources.workers:
        return
    if held:
        raise ClusterError(
            f"a slot asks for {resources}, but {len(nodes)} nodes hold no more than {held} of "
            "these; ask for fewer or add a node"
        )
    largest: dict[str, float] = max(nodes, key=lambda node: node.get("CPU", 0.0), default={})
    parts = [f"{_amount(largest, n)} {unit}" for n, unit in _asked_for(resources).items()]
    raise ClusterError(
        f"a slot asks for {resources}, but the largest of {len(nodes)} nodes has "
        f"{', '.join(parts)}; ask for less or add a node"
    )


def describe_room(resources: Resources, num_slots: int) -> str:
    """Says in one clause what is asked for, what there is and what of it is free."""
    free, total = _ray.available_resources(), _ray.cluster_resources()
    names = _asked_for(resources)
    parts = [f"{_amount(free, n)} of {_amount(total, n)} {unit}" for n, unit in names.items()]
    return f"{num_slots} slots of {resources} are asked for, and {', '.join(parts)} are free"


def _num_held(node: dict[str, float], resources: Resources) -> int:
    """Returns how many workers of a slot an empty node has room for, up to all of them."""
    memory = (resources.memory_mib or 0) * 2**20
    asked = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": memory}
    rooms = [node.get(name, 0.0) // amount for name, amount in asked.items() if amount]
    return int(min([resources.workers, *rooms]))


def _asked_for(resources: Resources) -> dict[str, str]:
    """Returns the units of what a slot asks for, by Ray's names."""
    names = {"CPU": "CPUs"}
    names |= {"GPU": "GPUs"} if resources.gpus else {}
    return names | ({"memory": "MiB of memory"} if resources.memory_mib else {})


def _amount(amounts: dict[str, float], name: str) -> str:
    scale = 2**20 if name == "memory" else 1
    return f"{round(amounts.get(name, 0.0) / scale, 2):g}"


class _Owner:
    """The actor behind a study's lock; Ray ends it when its driver ends."""

    def __init__(self, host: str, pid: int) -> None:
        self._owner = host, pid

    def owner(self) -> tuple[str, int]:
        return self._owner


@contextlib.contextmanager
def hold_study(study: str) -> Iterator[None]:
    """Keeps other drivers of the same cluster off a study.

    Raises:
        LockHeld: If another driver has it.
    """
    actor = _claim(study)
    try:
        yield
    finally:
        if ray.is_initialized():
            ray.kill(actor)


def _claim(study: str, *, patience: float = 10.0) -> Any:
    name = f"study:{study}"
    me = socket.gethostname(), os.getpid()
    deadline = time.monotonic() + patience
    while True:
        try:
            owner = ray.remote(num_cpus=0)(_Owner)
            actor: Any = owner.options(name=name, namespace=NAMESPACE).remote(*me)
            ray.get(actor.owner.remote())
            return actor
        except ValueError:  # the name is taken
            with contextlib.suppress(RayActorError, ValueError):
                holder: Any = ray.get_actor(name, NAMESPACE)
                host, pid = ray.get(holder.owner.remote())
                if host != me[0] or is_alive(pid):
                    raise LockHeld(study, host, pid) from None
        if time.monotonic() > deadline:
            raise ClusterError(f"the lock of study {study!r} is neither free nor held; try again")
        time.sleep(0.2)  # its holder has just died, and Ray has not noticed yet


def _silence_raylet() -> None:
    """Keeps Ray from printing a paragraph on standard output for every lost worker.

    The pool reports those in a line of its own, and standard output belongs to results. Ray has
    no public switch for it; without the private name nothing changes but the noise.
    """
    from ray._private import worker

    if hasattr(worker, "print_to_stdstream"):
        log = logging.getLogger("orchestration.raylet")
        worker.print_to_stdstream = lambda data, **_: log.debug("\n".join(data["lines"]))
