"""The slow copy of a model that contrastive training learns from, and the queues of its features.

The copy's weights are a moving average of the trained ones. It has no masks or thresholds of its
own: every pass takes those of the model, so both drop the same units and tokens, and when units
are physically removed, the same ones go out of the copy's own averaged weights. It runs under
``no_grad`` outside the model's meter, so it costs nothing in any reported FLOPs, and it is no part
of the model: nothing of it is saved with one.

Source: ALBEF (arXiv 2107.07651), sections 3.2 and 3.3; the queue is MoCo's (arXiv 1911.05722).
"""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from comp.handle import PruningHandle, handle_of
from comp.shrink import remove_units_

RATE = 0.995
"""Share of the old average that every step keeps (BLIP, arXiv 2201.12086)."""

T = TypeVar("T")


class Momentum:
    """A model's moving average with the features it made of recent batches.

    Args:
        model: An attached model in training; copied as it is now.
        length: Samples whose features are kept, a multiple of every batch's size.
        width: Width of the features.

    Attributes:
        seen: Samples whose features were remembered, since the beginning.
    """

    def __init__(self, model: nn.Module, *, length: int, width: int) -> None:
        self._slow = copy.deepcopy(model).requires_grad_(False).eval()
        device = next(model.parameters()).device
        self._images = torch.zeros(length, width, device=device)
        self._texts = torch.zeros(length, width, device=device)
        self._ids = torch.zeros(length, dtype=torch.int64, device=device)
        self.seen = 0

    @property
    def length(self) -> int:
        """Samples that the queues hold when they are full."""
        return len(self._ids)

    def queues(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what is remembered: features of images and texts ``(K, D)``, ids ``(K,)``."""
        known = min(self.seen, self.length)
        return self._images[:known], self._texts[:known], self._ids[:known]

    @torch.no_grad()
    def encode(self, model: nn.Module, run: Callable[[nn.Module], T]) -> T:
        """Runs a pass of the slow copy under the masks and thresholds of the model.

        Args:
            model: The model that this was made of.
            run: The pass.
        """
        own, online = handle_of(self._slow), handle_of(model)
        own.masks, own.thresholds = online.masks, online.thresholds
        own.stock_when_idle = online.stock_when_idle
        return run(self._slow)

    @torch.no_grad()
    def remember(self, images: Tensor, texts: Tensor, ids: Tensor) -> None:
        """Puts a batch's features in the place of the oldest ones.

        Args:
            images: Features of the images by the slow copy, ``(B, D)``.
            texts: Features of the texts, ``(B, D)``.
            ids: Equal where two samples have the same image, ``(B,)`` int64.

        Raises:
            ValueError: If the length is no multiple of the batch.
        """
        if self.length % len(ids):
            raise ValueError(
                f"a queue of {self.length} samples is no multiple of a batch of {len(ids)}; keep "
                "the batch size while training"
            )
        start = self.seen % self.length
        for queue, rows in ((self._images, images), (self._texts, texts), (self._ids, ids)):
            queue[start : start + len(ids)] = rows
        self.seen += len(ids)

    @torch.no_grad()
    def follow(self, model: nn.Module, rate: float = RATE) -> None:
        """Moves the average towards the weights of the model; masks are no weights."""
        slow = dict(self._slow.named_parameters())
        for name, parameter in model.named_parameters():
            slow[name].lerp_(parameter.detach(), 1 - rate)

    def remove_units_(self, group: str, keep: Tensor) -> None:
        """Shrinks a group of the slow copy as the model's was shrunk, in place.

        Args:
            group: Name of the unit group.
            keep: Kept units as the group physically is, ascending, ``(K,)``.
        """
        remove_units_(handle_of(self._slow).groups[group], keep)

    def held(self) -> list[Tensor]:
        """Returns the tensors themselves: the slow copy's parameters and the queues."""
        return [*self._slow.parameters(), self._images, self._texts, self._ids]

    def tensors(self) -> dict[str, Tensor]:
        """Returns everything that ``load_tensors_`` needs, by name."""
        own = {f"model.{name}": p.detach() for name, p in self._slow.named_parameters()}
        queues = {"images": self._images, "texts": self._texts, "ids": self._ids}
        return {**own, **queues, "seen": torch.tensor(self.seen)}

    def load_tensors_(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what ``tensors`` returned for a copy of the same structure."""
        with torch.no_grad():
            for name, parameter in self._slow.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        self._images, self._texts = tensors["images"], tensors["texts"]
        self._ids = tensors["ids"]
        self.seen = int(tensors["seen"])


def momentum_of(model: nn.Module, *, length: int, batch: int, width: int) -> Momentum:
    """Returns the model's slow copy, which begins as the model is at the first call.

    Args:
        model: An attached model in training.
        length: Samples in its queues at most; rounded down to a multiple of ``batch``.
        batch: Samples of a batch.
        width: Width of the features.

    Raises:
        ValueError: If several workers train the model: each has only its own features.
    """
    handle: PruningHandle = handle_of(model)
    if handle.workers.size > 1:
        raise ValueError(
            f"{handle.workers.size} workers cannot share one queue of features; train with one, "
            "or with a task that has no queue"
        )
    if handle.momentum is None:
        rounded = max(length // batch, 1) * batch
        handle.momentum = Momentum(model, length=rounded, width=width)
    return handle.momentum


def restored(model: nn.Module, tensors: dict[str, Tensor]) -> Momentum:
    """Rebuilds the slow copy of a model of the same structure from ``Momentum.tensors``."""
    length, width = tensors["images"].shape
    momentum = Momentum(model, length=length, width=width)
    momentum.load_tensors_(tensors)
    return momentum
