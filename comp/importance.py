"""Collaborative importance (CIM): parameter scores that know tokens, token scores that know heads.

In plain text, with X the activation that feeds the out-projection W of a sub-layer, A the
attention probabilities and m the soft mask of each head:

    Eq. 3  S_i  = mean_j |W_ij| * sqrt(sum_n       X_ni^2)            structured Wanda
    Eq. 4  S'_i = mean_j |W_ij| * sqrt(sum_n w_n * X_ni^2)            CIP
           w_0 = 1 (pooled token), w_n = S_n / sum S (the others)
    Eq. 5  the attention of layer l takes S of layer l, its feed-forward that of layer l + 1
    Eq. 6  S_i  = Norm(sum_n max_h A[h, n, i])                        token importance
    Eq. 7  A[h] -> m_h * A[h] before the maximum                      CIT

Everything here is a pure function of tensors. ``comp.blocks`` decides which layer's scores meet
which activation (Eq. 5); ``ActivationStatistics`` carries the sums over samples.
"""

import torch
from torch import Tensor


def token_importance(
    attention: Tensor,
    head_mask: Tensor | None = None,
    valid: Tensor | None = None,
    protected: Tensor | None = None,
) -> Tensor:
    """Scores tokens by the attention they receive, ignoring heads that are fading out.

    Padding and protected tokens (the pooled token above all) neither vote nor are scored.

    Args:
        attention: Attention probabilities (query, key), ``(B, H, N, N)``.
        head_mask: Soft head masks in [0, 1], ``(H,)``. ``None`` leaves Eq. 7 out.
        valid: True for real tokens, ``(B, N)`` bool. ``None`` means all.
        protected: True for tokens that are never dropped, ``(B, N)`` bool. ``None`` means none.

    Returns:
        Scores ``(B, N)``, float32, detached: they sum to 1 over valid unprotected tokens and are
        0 elsewhere. A sample whose scores are all 0 gets uniform ones.

    Raises:
        ValueError: If the shapes disagree.

    Source: CoMP (arXiv 2604.02956), Eq. (6) and (7).
    """
    if attention.dim() != 4 or attention.shape[2] != attention.shape[3]:
        raise ValueError(f"attention must be (B, H, N, N), but got {tuple(attention.shape)}")
    return column_scores(strongest_heads(attention, head_mask), valid, protected)


def strongest_heads(
    attention: Tensor, head_mask: Tensor | None = None, *, reduce: str = "max"
) -> Tensor:
    """Maximum over heads of attention ``(B, H, Q, N)`` under soft head masks (Eq. 7).

    Args:
        attention: Attention probabilities.
        head_mask: Soft head masks in [0, 1], ``(H,)``. ``None`` leaves Eq. 7 out.
        reduce: ``"mean"`` takes the mean over heads instead, as PyramidDrop does.

    Returns:
        ``(B, Q, N)``, float32, detached.

    Raises:
        ValueError: If the mask is not ``(H,)``.
    """
    probabilities = attention.detach().float()
    if head_mask is not None:
        if head_mask.shape != attention.shape[1:2]:
            raise ValueError(
                f"head_mask must be ({attention.shape[1]},) for attention of "
                f"{attention.shape[1]} heads, but got {tuple(head_mask.shape)}"
            )
        mask = head_mask.detach().to(device=probabilities.device, dtype=probabilities.dtype)
        probabilities = probabilities * mask[:, None, None]
    return probabilities.amax(dim=1) if reduce == "max" else probabilities.mean(dim=1)


def voted_importance(
    attention: Tensor,
    votes: Tensor,
    scored: Tensor,
    head_mask: Tensor | None = None,
    *,
    reduce: str = "max",
) -> Tensor:
    """Scores tokens by the attention that a few chosen queries pay them.

    Args:
        attention: Probabilities of the chosen queries, ``(B, H, Q, N)``.
        votes: Which of the queries count, ``(B, Q)`` bool.
        scored: Which tokens are scored, ``(B, N)`` bool.
        head_mask: Soft head masks in [0, 1], ``(H,)``. ``None`` leaves Eq. 7 out.
        reduce: How heads become one, ``"max"`` (Eq. 6) or ``"mean"`` (PyramidDrop).

    Returns:
        As ``token_importance``, over the scored tokens.

    Raises:
        ValueError: If the shapes disagree.

    Source: CoMP (arXiv 2604.02956), Eq. (6) and (7), the sum over queries restricted as in
    PyramidDrop (arXiv 2410.17247).
    """
    batch, _, queries, num_tokens = attention.shape
    if votes.shape != (batch, queries) or scored.shape != (batch, num_tokens):
        raise ValueError(
            f"votes and scored must be ({batch}, {queries}) and ({batch}, {num_tokens}), but got "
            f"{tuple(votes.shape)} and {tuple(scored.shape)}"
        )
    sums = vote_sums(strongest_heads(attention, head_mask, reduce=reduce), votes)
    return normalise_scores(sums, scored)


def column_scores(
    strongest: Tensor, valid: Tensor | None = None, protected: Tensor | None = None
) -> Tensor:
    """Sums, per key, what the voting queries give it, and normalises: the rest of Eq. 6.

    Args:
        strongest: Maximum over heads of the (masked) attention, ``(B, N, N)``.
        valid: As in ``token_importance``.
        protected: As in ``token_importance``.

    Returns:
        As ``token_importance``.

    Raises:
        ValueError: If ``valid`` or ``protected`` is not ``(B, N)``.

    Source: CoMP (arXiv 2604.02956), Eq. (6).
    """
    batch, _, num_tokens = strongest.shape
    scored = torch.ones(batch, num_tokens, dtype=torch.bool, device=strongest.device)
    for name, mask, keep in (("valid", valid, True), ("protected", protected, False)):
        if mask is None:
            continue
        if mask.shape != scored.shape:
            raise ValueError(
                f"{name} must be ({batch}, {num_tokens}), but got {tuple(mask.shape)}"
            )
        scored = scored & (mask.bool() if keep else ~mask.bool())
    return normalise_scores(vote_sums(strongest, scored), scored)


def vote_sums(strongest: Tensor, votes: Tensor) -> Tensor:
    """Sums, per key, what the queries that vote give it.

    Sums over parts of the queries add up, so that attention need not be held as a whole.

    Args:
        strongest: ``strongest_heads`` of some queries, ``(B, Q, N)``.
        votes: Which of these count, ``(B, Q)`` bool.

    Returns:
        ``(B, N)``, float32.
    """
    return (votes.unsqueeze(2) * strongest).sum(dim=1)


def mean_votes(sums: Tensor, visible: Tensor, votes: Tensor) -> Tensor:
    """Turns sums over queries into means over those that can see a key.

    Args:
        sums: ``vote_sums`` of all queries, ``(B, N)``.
        visible: Whether a query can see a key, ``(B or 1, N, N)`` bool.
        votes: Which queries count, ``(B, N)`` bool.

    Returns:
        ``(B, N)``; 0 where no query that counts can see the key.
    """
    number = (visible & votes.unsqueeze(2)).sum(dim=1)
    return sums / number.clamp(min=1)


def normalise_scores(sums: Tensor, scored: Tensor) -> Tensor:
    """Divides by the sum over the scored tokens; a row of zeros becomes uniform.

    Args:
        sums: Non-negative sums, ``(B, N)``.
        scored: Which tokens take part, ``(B, N)`` bool.

    Returns:
        ``(B, N)``, float32.
    """
    sums = sums.float() * scored
    total = sums.sum(dim=1, keepdim=True)
    uniform = scored.float() / scored.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(total > 0, sums / total.clamp(min=torch.finfo(torch.float32).tiny), uniform)


def token_weights(scores: Tensor, prefix: int | Tensor = 1) -> Tensor:
    """Turns token scores into the weights with which CIP counts token rows.

    Args:
        scores: Token importance, non-negative, 0 on padding, ``(B, N)``.
        prefix: Number of pooled tokens at the front (1 for a class token, 0 where there is
            none), or a bool mask ``(B, N)`` where the pooled token stands elsewhere.

    Returns:
        ``(B, N)``: 1 on the pooled tokens, the rest normalised to sum 1.

    Raises:
        ValueError: If ``prefix`` does not fit the scores.

    Source: CoMP (arXiv 2604.02956), Eq. (4). The equation says n > 1 for the second case; the sum
    in its denominator starts at 1, so n >= 1 is read.
    """
    if isinstance(prefix, Tensor):
        if prefix.shape != scores.shape:
            raise ValueError(
                f"prefix must be {tuple(scores.shape)} like scores, but got {tuple(prefix.shape)}"
            )
        pooled = prefix.bool()
    else:
        if not 0 <= prefix <= scores.shape[1]:
            raise ValueError(f"prefix must be in [0, {scores.shape[1]}], but got {prefix}")
        pooled = (torch.arange(scores.shape[1], device=scores.device) < prefix).expand_as(scores)
    rest = scores.float().masked_fill(pooled, 0.0)
    total = rest.sum(dim=1, keepdim=True)
    uniform = (~pooled).float() / (~pooled).sum(dim=1, keepdim=True).clamp(min=1)
    rest = torch.where(total > 0, rest / total.clamp(min=torch.finfo(torch.float32).tiny), uniform)
    return torch.where(pooled, torch.ones_like(rest), rest)


def weighted_square_sums(activation: Tensor, token_weight: Tensor | None = None) -> Tensor:
    """Sums squared activations over tokens and samples, each token counted by its weight.

    Args:
        activation: Input of the out-projection, ``(B, N, h)``.
        token_weight: Non-negative weights ``(B, N)``; ``None`` counts every token once (Eq. 3).

    Returns:
        ``(h,)``, float32.

    Raises:
        ValueError: If the weights do not fit the activation.
    """
    squares = activation.detach().float().square()
    if token_weight is None:
        return squares.sum(dim=(0, 1))
    if token_weight.shape != activation.shape[:2]:
        raise ValueError(
            f"token_weight must be {tuple(activation.shape[:2])} like the activation's rows, "
            f"but got {tuple(token_weight.shape)}"
        )
    return token_weight.detach().float().flatten() @ squares.flatten(0, 1)


def parameter_importance(
    weight: Tensor, activation: Tensor, token_weight: Tensor | None = None
) -> Tensor:
    """Scores the hidden units of a sub-layer by what they carry into its out-projection.

    Args:
        weight: The out-projection as torch stores it, ``(d_out, h)``.
        activation: What feeds it, ``(B, N, h)``.
        token_weight: ``token_weights`` of the same rows, ``(B, N)``, for Eq. 4; ``None`` for
            Eq. 3.

    Returns:
        ``(h,)``, float32. Higher is more important.

    Raises:
        ValueError: If the shapes disagree.

    Source: CoMP (arXiv 2604.02956), Eq. (3) and (4); the form is Wanda's (arXiv 2306.11695).
    """
    if weight.shape[1] != activation.shape[-1]:
        raise ValueError(
            f"weight (d_out, h) and activation (B, N, h) must agree on h, but got "
            f"{weight.shape[1]} and {activation.shape[-1]}"
        )
    sums = weighted_square_sums(activation, token_weight)
    return scores_from_sums(weight, sums, activation.shape[0])


def scores_from_sums(weight: Tensor, square_sums: Tensor, num_samples: int) -> Tensor:
    """Finishes Eq. 3 and 4 from sums over a whole calibration set.

    Args:
        weight: The out-projection, ``(d_out, h)``.
        square_sums: ``weighted_square_sums`` added up, ``(h,)``.
        num_samples: Samples behind the sums; they are divided by it before the square root.

    Returns:
        ``(h,)``, float32.
    """
    return weight.detach().float().abs().mean(dim=0) * (square_sums / num_samples).sqrt()


class ActivationStatistics:
    """Adds up weighted squared activations of every unit group over a calibration set.

    Attributes:
        sums: Group name to ``weighted_square_sums`` so far, ``(h,)`` float32.
        num_samples: Samples seen.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.num_samples = 0

    def add(self, group: str, activation: Tensor, token_weight: Tensor | None) -> None:
        """Adds one batch of one group's activation, ``(B, N, h)``."""
        batch = weighted_square_sums(activation, token_weight)
        self.sums[group] = self.sums[group] + batch if group in self.sums else batch

    def scores(self, group: str, weight: Tensor) -> Tensor:
        """Returns the channel scores of a group, ``(h,)``.

        Raises:
            KeyError: If no forward pass went through the group.
        """
        return scores_from_sums(weight, self.sums[group], max(self.num_samples, 1))
