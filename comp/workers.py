"""Processes that prune one model together: each takes a share of the samples.

Each holds the model whole, or a shard of its weights, gradients and moments (``comp.sharding``).
All of them run the same loop in the same order and tell each other what they found: gradients are
added up before a step, activations and multiply-adds before anything is decided on them. So all
hold the same weights, take the same decisions and yield the same records; one of them may write
these down. A step's batch is split as ``PruningConfig.accumulate`` splits it, and every worker
takes its share of the parts: the result is that of one process with as many parts, up to rounding
and, where a model has dropout, up to its random numbers.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from comp.collectives import local, naming_the_lost
from comp.config import PruningConfig
from comp.tasks.base import Shard

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """The processes of the default group of ``torch.distributed``, or this process alone.

    Attributes:
        rank: This one's number, from 0.
        size: How many there are.
        sharded: Whether each keeps only its share of weights, gradients and moments.
    """

    rank: int = 0
    size: int = 1
    sharded: bool = False

    @classmethod
    def here(cls, *, sharded: bool = False) -> Self:
        """Returns those of the group that this process has joined, as under ``torchrun``.

        Args:
            sharded: See the attribute.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size(), sharded)

    @property
    def shard(self) -> Shard:
        """What ``Task.train_batches`` takes."""
        return self.rank, self.size

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes things down."""
        return self.rank == 0

    @property
    def shards(self) -> bool:
        """Whether there is anything to share weights with."""
        return self.sharded and self.size > 1

    def own(self, items: Iterable[T]) -> Iterator[T]:
        """Yields every ``size``-th item, this worker's share."""
        return itertools.islice(items, self.rank, None, self.size)

    def gather(self, value: T) -> list[T]:
        """Returns what each worker passed, by rank; tensors inside must be on the CPU.

        Raises:
            WorkerLost: If a worker is gone.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with naming_the_lost():
            distributed.all_gather_object(values, value)
        return values

    def first(self, value: T) -> T:
        """Returns what the first worker passed.

        Raises:
            WorkerLost: If a worker is gone.
        """
        if self.size == 1:
            return value
        values: list[Any] = [value]
        with naming_the_lost():
            distributed.broadcast_object_list(values)
        found: T = values[0]
        return found

    def in_turn(self, values: list[T]) -> list[T]:
        """Returns what became of ``own`` items by all workers, in the order of the items."""
        rounds = itertools.zip_longest(*self.gather([(value,) for value in values]))
        return [entry[0] for each in rounds for entry in each if entry is not None]

    def sum(self, value: float) -> float:
        """Returns the sum of what the workers passed."""
        return math.fsum(self.gather(value)) if self.size > 1 else value

    def sum_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the sums by name, where each was; a worker may lack some."""
        if self.size == 1:
            return tensors
        total: dict[str, Tensor] = {}
        for part in self.gather({name: tensor.cpu() for name, tensor in tensors.items()}):
            for name, tensor in part.items():
                total[name] = total[name] + tensor if name in total else tensor
        devices = {tensor.device for tensor in tensors.values()}
        device = devices.pop() if devices else torch.device("cpu")
        return {name: tensor.to(device) for name, tensor in total.items()}

    def sum_gradients_(self, parameters: Iterable[nn.Parameter]) -> None:
        """Puts the sum over all workers in the place of every gradient.

        A parameter that no worker has a gradient for keeps none. Gradients in shards are summed
        already, and are zero where there was none.

        Raises:
            WorkerLost: If a worker is gone.
        """
        if self.size == 1:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        has = torch.stack([_has_gradient(parameter) for parameter in trained]).int()
        with naming_the_lost():
            distributed.all_reduce(has, distributed.ReduceOp.MAX)
            waits = []
            for parameter, is_there in zip(trained, has.tolist(), strict=True):
                if not is_there:
                    parameter.grad = None
                elif not isinstance(parameter, DTensor):
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    waits.append(distributed.all_reduce(parameter.grad, async_op=True))
            for wait in waits:
                wait.wait()

    def share_(self, model: nn.Module) -> None:
        """Gives every worker the weights of the first."""
        if self.size == 1:
            return
        with naming_the_lost(), torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                distributed.broadcast(tensor.data, 0)

    def split(self, config: PruningConfig) -> PruningConfig:
        """Returns a config whose batches have a whole number of parts for every worker.

        Raises:
            ValueError: If a batch cannot be split so.
        """
        return config.shared_by(self.size)


ALONE = Workers()
"""One process that does everything itself."""


def _has_gradient(parameter: nn.Parameter) -> Tensor:
    """Whether a parameter has a gradient, in shards one that is not zero, as a tensor ``()``."""
    if isinstance(parameter.grad, DTensor):
        return local(parameter.grad).any()
    return torch.tensor(parameter.grad is not None, device=parameter.device)
