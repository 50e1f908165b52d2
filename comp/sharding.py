"""Weights, gradients and moments in shards: each of several workers holds its part of every one.

FSDP2 (``torch.distributed.fsdp.fully_shard``) gathers the weights of a module around its forward.
A pruned layer never calls its stock forward, so every block gets a ``_Part`` that FSDP2 shards in
its place: a module that owns the layer's weights and whose forward runs whatever it is given. One
more has what is left of the model and runs the loss. Parts stand beside the model and not in it:
where units are to be removed they are dropped, weights are whole for a while, and new parts are
made of what is left.

Passes without gradients run on weights that are gathered once for all of them (``gathered``):
workers take unequal numbers of batches there and generate unequal numbers of tokens, so that they
could not gather block by block in step.
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from comp.collectives import naming_the_lost, whole

if TYPE_CHECKING:
    from comp.handle import PruningHandle
    from comp.sites import Block


class _Part(nn.Module):
    """Weights that are gathered together.

    Args:
        weights: The module that they are below.
        parts: Parts that have some of these weights already.
    """

    def __init__(self, weights: nn.Module, parts: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.weights = weights

    def forward(self, run: Callable[..., Any], *args: Any) -> Any:
        return run(*args)


class Sharding:
    """The parts of one model; ``PruningHandle.sharding`` holds it.

    A copy of the model is to be sharded anew, so a copy of this is ``None``.

    Args:
        handle: That of a model whose weights are whole, and equal in all workers.

    Raises:
        ValueError: If this torch cannot do it.
    """

    def __init__(self, handle: "PruningHandle") -> None:
        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise ValueError(
                f"torch {torch.__version__} cannot shard models whose workers use different "
                "weights in a step; install torch 2.13 or newer, or do not shard"
            )
        model = handle.model
        device = next(model.parameters()).device
        world = distributed.group.WORLD
        assert world is not None  # several workers have joined it
        mesh = DeviceMesh.from_group(world, device.type)
        layers = {path: model.get_submodule(path) for path in map(_path_of, _blocks(handle))}
        # Parameters without a dimension cannot be sharded.
        rest = {p for p in model.parameters() if not p.dim()}
        self._parts: dict[str, Any] = {}
        with _without_new_hooks(model):
            for path, layer in layers.items():
                self._parts[path] = self._sharded(_Part(layer), mesh, rest)
                rest |= set(layer.parameters())
            self._root: Any = self._sharded(_Part(model, list(self._parts.values())), mesh, rest)
        self._root.set_reduce_scatter_unused_params(True)
        self._depth = 0

    def _sharded(self, part: _Part, mesh: DeviceMesh, others: set[nn.Parameter]) -> Any:
        sharded: Any = fully_shard(part, mesh=mesh, ignored_params=others)
        sharded.set_gradient_divide_factor(1.0)  # losses are shares of one: gradients add up
        sharded.set_force_sum_reduction_for_comms(True)
        _unshard([sharded])
        sharded.reshard()
        return sharded

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def loss(self, compute: Callable[[], Tensor]) -> Tensor:
        """Runs a training pass, whose gradients ``backward`` leaves in shards."""
        result: Tensor = self._root(compute)
        return result

    def part_of(self, block: "Block") -> Any:
        """Returns what runs a block with its weights gathered; ``None`` if they already are."""
        return None if self._depth else self._parts[_path_of(block)]

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Gathers all weights for what runs inside; they must not be changed there."""
        self._depth += 1
        try:
            if self._depth == 1:
                _unshard(self._all())
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                for part in self._all():
                    part.reshard()

    def _all(self) -> list[Any]:
        return [self._root, *self._parts.values()]


def _unshard(parts: Sequence[Any]) -> None:
    with naming_the_lost(amid_others=True):
        for part in parts:
            part.unshard()


def _blocks(handle: "PruningHandle") -> Iterator["Block"]:
    for blocks in handle.structure.encoders.values():
        yield from blocks


def _path_of(block: "Block") -> str:
    """Path of the layer that a block describes: what the paths of its parts begin with."""
    paths = [group.name.replace(".", "/") for group in block.groups()]
    return os.path.commonpath(paths).replace("/", ".")


@contextmanager
def _without_new_hooks(model: nn.Module) -> Iterator[None]:
    """Takes off what FSDP2 hooks into the model's own modules, as it would outlive the parts.

    These hooks put shards in the places of weights before a state is read or written.
    """
    before = [
        (hooks, set(hooks))
        for module in model.modules()
        for name, hooks in vars(module).items()
        if name.endswith("_hooks") and isinstance(hooks, dict)
    ]
    yield
    for hooks, old in before:
        for key in set(hooks) - old:
            del hooks[key]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gathers the weights of a model for passes without gradients, if they are sharded."""
    sharding = getattr(getattr(model, "pruning", None), "sharding", None)
    if sharding is None:
        yield
        return
    with sharding.gathered():
        yield


def shard_(handle: "PruningHandle", optimizer: torch.optim.Optimizer | None = None) -> None:
    """Shards the weights of a model anew, if its workers ask for it; an optimizer follows.

    Args:
        handle: The handle of the model, or of a copy of one that was sharded.
        optimizer: Changed in place; moments stay as they are.
    """
    if not handle.workers.shards:
        return
    gather_(handle, optimizer)
    whole_ones = dict(handle.model.named_parameters())
    handle.sharding = Sharding(handle)
    now = dict(handle.model.named_parameters())
    _follow(optimizer, {whole_ones[name]: now[name] for name in now})


def gather_(handle: "PruningHandle", optimizer: torch.optim.Optimizer | None = None) -> None:
    """Gives every worker the whole weights for good; moments of an optimizer stay in shards."""
    handle.sharding = None
    new: dict[nn.Parameter, nn.Parameter] = {}
    for module in handle.model.modules():
        for name, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if old not in new and isinstance(old.data, DTensor):
                new[old] = nn.Parameter(whole(old.detach()), old.requires_grad)
            if old in new:
                setattr(module, name, new[old])
    _follow(optimizer, new)
    if any(parameter.device.type != "cpu" for parameter in new):
        gc.collect()  # parts are in cycles, and an accelerator cannot wait for Python's own sweep


def _follow(
    optimizer: torch.optim.Optimizer | None, new: dict[nn.Parameter, nn.Parameter]
) -> None:
    """Puts parameters in the places of others in an optimizer, with their moments."""
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [new.get(parameter, parameter) for parameter in group["params"]]
    for old, now in new.items():
        if old in optimizer.state:
            optimizer.state[now] = optimizer.state.pop(old)
