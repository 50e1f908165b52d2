"""How far the two importance measures disagree, layer by layer (the paper's Figure 2).

Parameter importance listens to the tokens with large activations, token importance to those that
receive attention. For every self-attention module this compares the tokens that contribute most
to the parameter scores of Eq. 3 with those that Eq. 6 ranks highest.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from comp.evaluation import batch_size_of, evaluating
from comp.handle import PruningHandle
from comp.importance import ActivationStatistics
from comp.sites import AttentionSite
from comp.tasks.base import Batch, Task


@dataclass(frozen=True)
class LayerInterference:
    """Disagreement in one attention module.

    Attributes:
        encoder: Which encoder.
        layer: Layer index.
        overlap: Mean share of the top tokens by contribution to Eq. 3 that are also top tokens
            by Eq. 6, in [0, 1].
        expected: The overlap of two random choices of that size.
        num_samples: Samples behind the means.
    """

    encoder: str
    layer: int
    overlap: float
    expected: float
    num_samples: int


class _TokenContributions(ActivationStatistics):
    """Compares, batch by batch, instead of adding activations up."""

    def __init__(self, handle: PruningHandle, share: float) -> None:
        super().__init__()
        self._handle = handle
        self._share = share
        self.overlaps: dict[str, list[float]] = {}
        self.expected: dict[str, list[float]] = {}

    def add(self, group: str, activation: Tensor, token_weight: Tensor | None) -> None:
        site = self._handle.groups[group]
        if not isinstance(site, AttentionSite) or token_weight is None:
            return
        importance = site.out.linear.weight.detach().float().abs().mean(dim=0)
        contribution = activation.detach().float().square() @ importance  # (B, N)
        for own, weights in zip(contribution, token_weight, strict=True):
            candidates = ((weights > 0) & (weights < 1)).nonzero().flatten()
            count = round(self._share * candidates.numel())
            if count < 1 or candidates.numel() < 3:
                continue
            by_contribution = set(own[candidates].topk(count).indices.tolist())
            by_attention = set(weights[candidates].topk(count).indices.tolist())
            self.overlaps.setdefault(group, []).append(len(by_contribution & by_attention) / count)
            self.expected.setdefault(group, []).append(count / candidates.numel())


def interference(
    handle: PruningHandle, task: Task, batches: Iterable[Batch], *, share: float = 0.25
) -> list[LayerInterference]:
    """Measures the overlap of important tokens by the two measures.

    Args:
        handle: The handle of a dense model; CIP must be on, so that scores are formed.
        task: Runs the forward pass.
        batches: Samples on the model's device.
        share: Share of the tokens that count as top.

    Returns:
        One entry per self-attention module that scores tokens, in forward order.

    Raises:
        ValueError: If ``share`` is not in (0, 1) or CIP is off.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be in (0, 1), but got {share}")
    if not handle.switches.cip:
        raise ValueError("interference needs token scores; attach the model with cip on")
    collector = _TokenContributions(handle, share)
    before, handle.statistics = handle.statistics, collector
    try:
        with evaluating(handle.model):
            for batch in batches:
                task.score(handle.model, batch)
                collector.num_samples += batch_size_of(batch)
    finally:
        handle.statistics = before
    found = []
    for encoder, blocks in handle.structure.encoders.items():
        for block in blocks:
            overlaps = collector.overlaps.get(block.attention.name)
            if not block.drops_tokens or not overlaps:
                continue
            expected = collector.expected[block.attention.name]
            found.append(
                LayerInterference(
                    encoder=encoder,
                    layer=block.layer,
                    overlap=float(torch.tensor(overlaps).mean()),
                    expected=float(torch.tensor(expected).mean()),
                    num_samples=len(overlaps),
                )
            )
    return found
