"""Notes which patches of an image survive each layer of a forward pass."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class TokenPass:
    """One pass of patches through one encoder.

    Attributes:
        encoder: Which encoder.
        patches: Where the patches stand in the sequence that enters, ``(B, N)`` bool.
        kept: By layer, which patches are left behind it, ``(B, P)`` bool.
    """

    encoder: str
    patches: Tensor
    kept: dict[int, Tensor] = field(default_factory=dict)

    def note(self, layer: int, origins: Tensor, valid: Tensor | None) -> None:
        """Notes what is left behind a layer; see ``TokenTrace.note``."""
        number = (self.patches.cumsum(dim=1) - 1).masked_fill(~self.patches, -1)
        own = number.gather(1, origins.clamp(min=0)).masked_fill(origins < 0, -1)  # (B, K)
        if valid is not None:
            own = own.masked_fill(~valid, -1)
        most = int(self.patches.sum(dim=1).max())
        kept = torch.zeros(own.shape[0], most + 1, dtype=torch.bool, device=own.device)
        kept.scatter_(1, own.masked_fill(own < 0, most), True)
        self.kept[layer] = kept[:, :most].cpu()


@dataclass
class TokenTrace:
    """Collects passes; ``comp.blocks`` feeds it while a handle's ``trace`` holds it.

    Attributes:
        passes: One for every encoder's forward pass that has patches, in order.
    """

    passes: list[TokenPass] = field(default_factory=list)

    def begin(self, encoder: str, patches: Tensor) -> None:
        """Starts a pass.

        Args:
            encoder: Which encoder.
            patches: Where the patches stand in the sequence, ``(B, N)`` bool.
        """
        self.passes.append(TokenPass(encoder, patches))

    def note(self, layer: int, origins: Tensor, valid: Tensor | None) -> None:
        """Notes what is left behind a layer of the pass that goes on.

        Args:
            layer: Layer index.
            origins: Where the rows that are left stood at first, -1 for a summary, ``(B, K)``.
            valid: True for real rows, ``(B, K)``; ``None`` means all.
        """
        self.passes[-1].note(layer, origins, valid)
