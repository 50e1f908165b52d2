"""Tensors of which every worker may hold a shard (a ``DTensor``), and workers that are gone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from comp.errors import WorkerLost


@contextmanager
def naming_the_lost(*, amid_others: bool = False) -> Iterator[None]:
    """Turns what a collective raises when another process is gone into ``WorkerLost``.

    Args:
        amid_others: Whether more than collectives runs inside, whose errors are to stay.
    """
    try:
        yield
    except RuntimeError as error:
        own = amid_others and not isinstance(error, distributed.DistError)
        if isinstance(error, WorkerLost) or (own and "gloo" not in str(error)):
            raise
        reason = str(error).strip().splitlines()[0]
        raise WorkerLost(f"another worker of the same run is gone ({reason})") from error


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor of which workers may hold shards; all of them must call it.

    Raises:
        WorkerLost: If a worker is gone.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    with naming_the_lost(amid_others=True):
        return tensor.full_tensor()


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """Returns what this worker holds of a tensor, itself and no copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """Returns a tensor that every worker has, in shards if another one is."""
    if not isinstance(other, DTensor):
        return tensor
    placed: Tensor = distribute_tensor(
        tensor, other.device_mesh, other.placements, src_data_rank=None
    )
    return placed


def clip_gradients_(parameters: Sequence[nn.Parameter], max_norm: float) -> None:
    """As ``clip_grad_norm_``, where some gradients may be in shards.

    Raises:
        WorkerLost: If a worker is gone.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        nn.utils.clip_grad_norm_(parameters, max_norm)
        return
    squares = torch.zeros(2, device=gradients[0].device)  # of whole gradients, and of shards
    for gradient in gradients:
        squares[int(isinstance(gradient, DTensor))] += local(gradient).square().sum()
    with naming_the_lost():
        distributed.all_reduce(squares[1:])
    factor = (max_norm / (squares.sum().sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local(gradient).mul_(factor)
