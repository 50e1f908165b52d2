"""How the workers of one job find each other: a store with the first, and a group for each job.

A group of ``torch.distributed`` ends with its job, so that a job that is stopped between two of
its collectives leaves nothing behind that the next one would read.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestration.clusters.local import is_loopback

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

Place = tuple[str, int]


@dataclass(frozen=True)
class Seat:
    """A worker's part in the group of one job.

    Attributes:
        group: Name of the group; every job of a store has its own.
        rank: The worker's number, from 0; that one's records count.
        size: How many workers there are.
        on_gpus: Whether each has a GPU of its own, so that tensors there need not pass the host.
    """

    group: str
    rank: int
    size: int
    on_gpus: bool = False


def open_store(host: str) -> "TCPStore":
    """Opens the store of the first worker on a free port of one address of this machine."""
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    # Without a socket of ours it would listen on every address of the machine.
    return _store((host, port), is_master=True, master_listen_fd=listener.detach())


def find_store(place: Place) -> "TCPStore":
    """Connects another worker with the store of the first."""
    return _store(place, is_master=False)


def _store(place: Place, **options: Any) -> "TCPStore":
    from torch import distributed

    api: Any = distributed  # its stores have no types
    store: TCPStore = api.TCPStore(*place, wait_for_workers=False, **options)
    return store


@contextlib.contextmanager
def group(store: "TCPStore", seat: Seat) -> Iterator[None]:
    """Joins the group of a job, which ``comp.workers.Workers.here`` finds, and leaves it after.

    Args:
        store: What ``open_store`` or ``find_store`` returned.
        seat: The worker's part.

    Raises:
        RuntimeError: If another worker does not come.
    """
    import torch
    from torch import distributed

    api: Any = distributed
    if is_loopback(store.host):
        names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if seat.on_gpus and torch.cuda.is_available() else "gloo",
        store=api.PrefixStore(seat.group, store),
        rank=seat.rank,
        world_size=seat.size,
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()
