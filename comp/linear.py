"""Linears of a pruned model: rows under a mask, and rows that start at even addresses.

A mask on the outputs of a Linear is multiplied into its weight instead. The products are the
same, and a weight has fewer rows than a batch has tokens.

A Linear that lost some of its outputs writes rows of an odd length, which on a CPU costs up to a
third of its time. ``spaced_linear`` leaves a gap behind each row instead.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STEP = 16  # floats in a cache line
_MIN_ROWS = 128  # below, the gaps cost more than they save


def masked_linear(linear: nn.Linear, rows: Tensor, mask: Tensor | None) -> Tensor:
    """Returns ``linear(rows) * mask``.

    Args:
        linear: The Linear.
        rows: ``(..., in)``.
        mask: One factor per output, ``(out,)``; ``None`` means ones.
    """
    if mask is None:
        output: Tensor = linear(rows)
        return output
    mask = mask.to(device=linear.weight.device, dtype=linear.weight.dtype)
    bias = None if linear.bias is None else linear.bias * mask
    return F.linear(rows, linear.weight * mask.unsqueeze(1), bias)


def spaced_linear(linear: nn.Linear, rows: Tensor) -> Tensor | None:
    """Returns ``linear(rows)`` with unused columns, or ``None`` where they would not pay.

    Args:
        linear: The Linear.
        rows: ``(..., in)``.

    Returns:
        ``(..., width)``, contiguous, the first ``out`` columns being the result and the others
        zero, so that an elementwise function may run over all of them.
    """
    out = linear.out_features
    if out % _STEP == 0 or not _plain(linear, rows):
        return None
    count = rows.numel() // rows.shape[-1]
    if count < _MIN_ROWS:
        return None
    buffer = rows.new_empty(count, -(-out // _STEP) * _STEP)
    flat = rows.reshape(count, -1)
    if linear.bias is None:
        torch.mm(flat, linear.weight.t(), out=buffer[:, :out])
    else:
        torch.addmm(linear.bias, flat, linear.weight.t(), out=buffer[:, :out])
    buffer[:, out:] = 0
    return buffer.view(*rows.shape[:-1], -1)


def _plain(linear: nn.Linear, rows: Tensor) -> bool:
    """Whether nobody watches or records the Linear, and it runs on a CPU."""
    recorded = torch.is_grad_enabled() and (linear.weight.requires_grad or rows.requires_grad)
    hooked = bool(linear._forward_hooks or linear._forward_pre_hooks)
    plain = rows.device.type == "cpu" and rows.dtype == linear.weight.dtype == torch.float32
    free = not (recorded or hooked or torch.compiler.is_compiling())
    return plain and free and not torch.is_autocast_enabled("cpu")
