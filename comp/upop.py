"""The parameter score of UPop, a baseline: gradients of the training loss by the unit masks.

In plain text, with m the mask of every unit (1 where it is whole) and w the penalty of its kind:

    g = d(task loss) / dm + w * d|m| / dm       averaged over the calibration samples
    score = -g

UPop prunes the largest positive gradients: there a smaller mask lowers the loss. Here a low score
goes first, so the sign turns. The penalty adds the same number to every whole unit of a kind; it
therefore cancels when a kind is standardised, and it trains nothing, since the masks are fixed by
the fade. It is kept so that the sum above is UPop's.

What differs from UPop: its unit is one dimension of a layer's heads (the same in all heads),
ours a whole head, as everywhere in this package; it adds gradients up over the whole search while
masks fade, here each ranking starts from a fresh pass at whole masks, as with Eq. 3; and it counts
parameters where all methods here share the same quanta of FLOPs. In its own mixed-precision path
the sum is cleared at every step; here it is an explicit one in float32, without autocast.

Source: UPop (arXiv 2301.13741), Section 3.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from comp.evaluation import autocast, batch_size_of
from comp.handle import PruningHandle
from comp.sharding import gathered
from comp.tasks.base import Batch, Task

PENALTIES: dict[str, float] = {"head": 4.8e-3, "head_dim": 4.8e-3, "channel": 2e-4}
"""Weights of the L1 terms, UPop's for NLVR2 with BLIP (compress_nlvr.py)."""


def gradient_scores(
    handle: PruningHandle,
    task: Task,
    batches: Iterable[Batch],
    *,
    penalties: Mapping[str, float] = PENALTIES,
) -> dict[str, Tensor]:
    """Scores all units by how much the training loss asks for a smaller mask.

    Args:
        handle: The handle of the model; its masks must be 0 or 1 and are left as they are.
        task: Gives the training loss.
        batches: Calibration batches on the model's device.
        penalties: Weight of the L1 term by kind of unit.

    Returns:
        Group name to scores ``(units,)``, float32, low is pruned first. A group that the loss
        does not depend on is left out.
    """
    gradients = mask_gradients(handle, task, batches)
    scores = {}
    for name, gradient in gradients.items():
        mask = handle.masks.get(name, torch.ones_like(gradient))
        scores[name] = -(gradient + penalties[handle.groups[name].kind] * mask.sign())
    return scores


def mask_gradients(
    handle: PruningHandle, task: Task, batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """Averages the gradient of the task's loss by every unit's mask, in eval mode.

    The mean is over samples, so that a shorter last batch counts less. Gradients of parameters
    are left alone.

    Args:
        handle: The handle of the model; masks are left as they are.
        task: Gives the training loss, the mean over a batch.
        batches: Batches on the model's device.

    Returns:
        Group name to gradients ``(units,)``, float32; groups the loss does not depend on are
        left out.
    """
    before, was_training, workers = handle.masks, handle.model.training, handle.workers
    device = next(handle.model.parameters()).device
    handle.masks = {
        name: before.get(name, torch.ones(group.num_units, device=device))
        .detach()
        .clone()
        .float()
        .requires_grad_()
        for name, group in handle.groups.items()
    }
    sums: dict[str, Tensor] = {}
    num_samples = 0
    handle.model.eval()
    try:
        with gathered(handle.model):
            for batch in workers.own(batches):
                size = batch_size_of(batch)
                for name, gradient in _one_batch(handle, task, batch, device).items():
                    sums[name] = sums.get(name, torch.zeros_like(gradient)) + size * gradient
                num_samples += size
    finally:
        handle.masks = before
        handle.model.train(was_training)
    num_samples = sum(workers.gather(num_samples))
    sums = workers.sum_tensors(sums)
    return {name: total / num_samples for name, total in sums.items()}


def _one_batch(
    handle: PruningHandle, task: Task, batch: Batch, device: torch.device
) -> dict[str, Tensor]:
    with torch.enable_grad(), autocast(device, enabled=False):
        loss = task.loss(handle.model, batch)
        gradients = torch.autograd.grad(loss, list(handle.masks.values()), allow_unused=True)
    return {
        name: gradient.float()
        for name, gradient in zip(handle.masks, gradients, strict=True)
        if gradient is not None
    }
