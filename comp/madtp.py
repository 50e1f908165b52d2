"""MADTP's dynamic token pruning, a baseline: token scores and thresholds from alignment tokens.

A table of learnable alignment tokens e_t is shared by both modalities. In plain text, per layer
and sample, over the unprotected tokens i of the layer's input x, with the attention A, the pooled
token p and the context o_h of every head:

    s1_i = Norm(sum_n max_h A[h, n, i])                                 Eq. 6 of CoMP
    s2_i = Norm(max(0, max_t x_i . e_t))
    s3_i = Norm(sum_h A[h, p, i] * |o_h,i| / sum_h' |o_h',i|)           without p: left out
    S    = mean of these
    theta = min_t sum_i softmax_i(x_i . e_t / tau) S_i,  keep S_i > theta

The temperature tau is what a stage raises; 0 switches dropping off, and with infinity a layer
keeps the tokens above its mean. It is given in units of the square root of the table's width.
While training, the two modalities' tokens as the table sees them are pulled together:

    L = task loss + 0.1 * (1 - cos) between sums over layers of softmax_i(x . e^T / sqrt(D))^T x

What differs from the released code: s2 is cut at zero and s3 is normalised, so that both are
shares (raw products change sign, and their sum comes near zero); every sample keeps its own
number of tokens in their old order; padding takes no part; and the FLOPs target is steered stage
by stage like that of all methods here, on training samples, with a temperature per modality.

Source: MADTP (arXiv 2403.02991), Section 3.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comp.importance import normalise_scores, token_importance
from comp.modes import Stream
from comp.tokens import keep_if

NUM_TOKENS = 100
LOSS_WEIGHT = 0.1


class Alignment(nn.Module):
    """The table of alignment tokens.

    Args:
        widths: Width of every stream's hidden states; the table has the largest, and narrower
            streams are mapped to it.
        num_tokens: Alignment tokens (T).
        seed: Seed of the table.

    Attributes:
        features: Encoder name to what the table sees of a training batch, ``(B, T, D)``; the
            first pass of every encoder since ``loss`` was last called.
    """

    def __init__(
        self, widths: Mapping[Stream, int], num_tokens: int = NUM_TOKENS, seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.width = max(widths.values())
        self.table = nn.Parameter(torch.randn(num_tokens, self.width, generator=generator))
        self.maps = nn.ModuleDict()
        for stream, width in widths.items():
            if width != self.width:
                self.maps[stream.value] = _seeded_linear(width, self.width, generator)
        self.features: dict[str, tuple[Stream, Tensor]] = {}

    def map(self, hidden: Tensor, stream: Stream) -> Tensor:
        """Brings a stream's rows ``(B, N, d)`` to the table's width ``(B, N, D)``."""
        mapped: Tensor = self.maps[stream.value](hidden) if stream.value in self.maps else hidden
        return mapped

    def logits(self, mapped: Tensor) -> Tensor:
        """Products of mapped rows with the table, over the root of its width, ``(B, N, T)``."""
        products: Tensor = mapped @ self.table.T.to(mapped.dtype) / self.width**0.5
        return products

    def macs(self, tokens: int, stream: Stream) -> int:
        """Multiply-adds that scoring ``tokens`` rows costs."""
        own = sum(p.numel() for n, p in self.maps.named_parameters() if n.startswith(stream.value))
        return tokens * (self.table.numel() + own)

    def note(self, encoder: str, stream: Stream, features: Tensor) -> None:
        """Keeps what the table saw of an encoder's batch, for ``loss``."""
        self.features.setdefault(encoder, (stream, features))

    def loss(self) -> Tensor:
        """How far the modalities' features are apart: mean of 1 - cosine; forgets them.

        Returns:
            A scalar; 0 if only one modality ran.

        Raises:
            ValueError: If neither batch is a multiple of the other.
        """
        seen = {stream: features for stream, features in self.features.values()}
        self.features = {}
        if len(seen) < 2:
            return self.table.new_zeros(())
        image, text = _paired(seen[Stream.VISION], seen[Stream.TEXT])
        return (1 - F.cosine_similarity(image.float(), text.float(), dim=-1)).mean()


def _seeded_linear(width: int, target: int, generator: torch.Generator) -> nn.Linear:
    linear = nn.Linear(width, target, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(target, width, generator=generator) / width**0.5)
    return linear


def _paired(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Averages several images of one text; repeats an image that several texts speak of."""
    images, texts = len(image), len(text)
    if images % texts == 0:
        return image.unflatten(0, (texts, -1)).mean(dim=1), text
    if texts % images == 0:
        return image.repeat_interleave(texts // images, dim=0), text
    raise ValueError(
        f"method 'madtp' pairs images with texts, but a batch has {images} images and {texts} "
        "texts, and neither is a multiple of the other"
    )


def seen_by_table(mapped: Tensor, logits: Tensor, valid: Tensor) -> Tensor:
    """What every alignment token gathers from a sample: ``softmax_i(logits)^T x``.

    Args:
        mapped: Rows at the table's width, ``(B, N, D)``.
        logits: ``Alignment.logits`` of them, ``(B, N, T)``.
        valid: True for real rows, ``(B, N)``.

    Returns:
        ``(B, T, D)``.
    """
    shares = _over_tokens(logits, valid)
    return shares.to(mapped.dtype).transpose(1, 2) @ mapped


def _over_tokens(logits: Tensor, among: Tensor) -> Tensor:
    """Softmax over a sample's tokens in question, float32, ``(B, N, T)``; 0 on the others."""
    chosen = logits.float().masked_fill(~among.unsqueeze(2), -torch.inf)
    return torch.nan_to_num(torch.softmax(chosen, dim=1))


def aligned_importance(
    attention: Tensor,
    context: Tensor,
    logits: Tensor,
    valid: Tensor,
    protected: Tensor,
    pooled: Tensor | None = None,
    head_mask: Tensor | None = None,
) -> Tensor:
    """Scores tokens as MADTP does; see the module docstring.

    Args:
        attention: Probabilities, ``(B, H, N, N)``.
        context: The heads' outputs side by side, ``(B, N, H * d)``.
        logits: ``Alignment.logits`` of the layer's input, ``(B, N, T)``.
        valid: True for real tokens, ``(B, N)``.
        protected: Tokens that are never dropped, ``(B, N)``.
        pooled: The token that stands for the sample, ``(B, N)``; ``None`` leaves s3 out.
        head_mask: Soft head masks, ``(H,)``; ``None`` leaves Eq. 7 of CoMP out.

    Returns:
        ``(B, N)``, float32, detached: sums to 1 over valid unprotected tokens, 0 elsewhere.

    Source: MADTP (arXiv 2403.02991), token importance.
    """
    scored = valid & ~protected
    parts = [
        token_importance(attention, head_mask, valid, protected),
        normalise_scores(logits.detach().float().amax(dim=2).clamp(min=0), scored),
    ]
    if pooled is not None:
        heads = attention.shape[1]
        norms = context.detach().float().unflatten(-1, (heads, -1)).norm(dim=-1)  # (B, N, H)
        shares = norms / norms.sum(dim=-1, keepdim=True).clamp(min=1e-30)
        row = torch.einsum("bq,bhqn->bnh", pooled.float(), attention.detach().float())
        if head_mask is not None:
            row = row * head_mask.detach().float()
        parts.append(normalise_scores((row * shares).sum(dim=-1), scored))
    return torch.stack(parts).mean(dim=0)


def keep_aligned(
    scores: Tensor,
    logits: Tensor,
    temperature: float,
    valid: Tensor,
    protected: Tensor,
    min_tokens: int,
) -> Tensor:
    """Decides which tokens survive MADTP's threshold.

    Args:
        scores: Token importance, 0 on padding and on protected tokens, ``(B, N)``.
        logits: ``Alignment.logits`` of the layer's input, ``(B, N, T)``.
        temperature: tau over the root of the table's width; 0 keeps all.
        valid: True for real tokens, ``(B, N)``.
        protected: Tokens that always survive, ``(B, N)``.
        min_tokens: Unprotected tokens kept at least.

    Returns:
        True for the survivors, ``(B, N)`` bool.

    Source: MADTP (arXiv 2403.02991), the learnable threshold.
    """
    if temperature <= 0:
        return valid
    shares = _over_tokens(logits.detach() / temperature, valid & ~protected)
    threshold = (shares * scores.unsqueeze(2)).sum(dim=1).amin(dim=1, keepdim=True)  # (B, 1)
    return keep_if(scores > threshold, scores, valid, protected, min_tokens)
