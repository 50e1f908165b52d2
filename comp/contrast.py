"""What image-text retrieval is trained with and judged by, as functions of features.

With s(i, t) the product of two features of length 1 times a learned factor, and s' the same for
the slow copy's features (``comp.momentum``) as queries:

    target  q(i, .) = a * softmax_t s'(i, t) + (1 - a) * uniform over the texts of the same image
    ITC     mean of -sum_t q(i, t) log softmax_t s(i, t) and the same from texts to images
    ITM     cross-entropy of "fits or not" for every pair, for its text with an image drawn by
            softmax_i s(i, t), and for its image with a text drawn alike; none of the same image

Candidates of both softmaxes are the slow copy's features: of this batch and of the queues.

Source: ALBEF (arXiv 2107.07651), sections 3.2 and 3.3; BLIP (arXiv 2201.12086), section 3.2; CLIP
(arXiv 2103.00020) trains with the first part alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Candidates:
    """What a batch is compared with: its own features and those in the queues, all of them slow.

    Attributes:
        images: Features of images, this batch's first, ``(M, D)``.
        texts: Features of texts, ``(M, D)``.
        ids: Equal where two samples have the same image, ``(M,)`` int64.
    """

    images: Tensor
    texts: Tensor
    ids: Tensor


def soft_targets(similarity: Tensor, same: Tensor, alpha: float) -> Tensor:
    """Returns what a contrastive loss aims at, ``(B, M)``, rows sum to 1.

    Args:
        similarity: Scaled similarities by the slow copy, ``(B, M)``.
        same: True where a candidate belongs to the same image, ``(B, M)``, at least one a row.
        alpha: Share of the slow copy's opinion, in [0, 1].
    """
    hard = same.float() / same.sum(dim=1, keepdim=True)
    return alpha * functional.softmax(similarity.float(), dim=1) + (1 - alpha) * hard


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy of every row against shares that sum to 1, ``(B,)``."""
    return -(targets * functional.log_softmax(logits.float(), dim=1)).sum(dim=1)


def contrastive_loss(
    images: Tensor, texts: Tensor, candidates: Candidates, factor: Tensor, alpha: float
) -> Tensor:
    """Returns the scalar contrastive loss (ITC) of a batch.

    Args:
        images: Features of length 1 by the trained model, ``(B, D)``.
        texts: The same of the texts.
        candidates: What they are compared with; the first ``B`` are this batch's own.
        factor: Learned factor on similarities, scalar.
        alpha: Share of the slow copy's opinion in the targets.
    """
    own = len(images)
    same = candidates.ids[:own, None] == candidates.ids
    losses = []
    for ours, theirs, slow in (
        (images, candidates.texts, candidates.images),
        (texts, candidates.images, candidates.texts),
    ):
        with torch.no_grad():
            targets = soft_targets(factor * slow[:own] @ theirs.mT, same, alpha)
        losses.append(soft_cross_entropy(factor * ours @ theirs.mT, targets).mean())
    return (losses[0] + losses[1]) / 2


def hard_negatives(similarity: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Draws one wrong candidate for every row that has one, the likelier the more alike.

    Args:
        similarity: Scaled similarities of the rows to the batch's other side, ``(B, B)``.
        same: True where a candidate would be right, ``(B, B)``.

    Returns:
        Rows that have a wrong candidate, and one drawn for each, ``(K,)`` each.
    """
    # Softmax over the wrong ones alone: beside a sure right one they would all be rounded to 0.
    wrong = similarity.detach().float().masked_fill(same, -torch.inf)
    rows = (~same).any(dim=1).nonzero().flatten()
    if not len(rows):
        return rows, rows
    return rows, torch.multinomial(functional.softmax(wrong[rows], dim=1), 1).flatten()


@dataclass(frozen=True)
class Ranks:
    """Where the right answer stands in every ranking, 0 being first.

    Attributes:
        of_texts: Place of the best of its own texts in every image's ranking, ``(S,)``.
        of_images: Place of its image in every text's ranking, ``(S, C)``.
        told: Which of the texts exist, ``(S, C)`` bool.
    """

    of_texts: Tensor
    of_images: Tensor
    told: Tensor

    def recall(self, k: int) -> tuple[float, float]:
        """Returns the share of images, and of texts, with a right answer among the first k."""
        found = (self.of_texts < k).double().mean()
        named = (self.of_images < k)[self.told].double().mean()
        return float(found), float(named)

    def hits(self) -> Tensor:
        """Returns per image ``(S,)`` what averages to the mean of both R@1."""
        first = ((self.of_images == 0) & self.told).sum(dim=1)
        share = first * (len(self.told) / self.told.sum())
        return ((self.of_texts == 0) + share).float() / 2


def rank_and_loss(
    images: Tensor, texts: Tensor, told: Tensor, *, chunk: int = 256
) -> tuple[Ranks, Tensor]:
    """Holds every image against every text. Of equally similar ones, the wrong stand first.

    Args:
        images: Features, already scaled, ``(S, D)``.
        texts: Features of the texts of each image, ``(S, C, D)``.
        told: Which of these exist, ``(S, C)`` bool, at least one a row.
        chunk: Images whose similarities are held in memory at once.

    Returns:
        The ranks, and per image ``(S,)`` the mean of both cross-entropies, several texts of one
        image being equally right.
    """
    num_texts = texts.shape[1]
    of_texts, of_images, losses = [], [], []
    with torch.autocast(images.device.type, enabled=False):
        images, texts = images.float(), texts.float()
        for start in range(0, len(images), chunk):
            own = torch.arange(start, min(start + chunk, len(images)), device=images.device)
            exists, count = told[own], told[own].sum(dim=1)
            by_image = (images[own] @ texts.flatten(0, 1).mT).masked_fill(
                ~told.flatten(), -torch.inf
            )  # (K, S * C)
            by_text = texts[own] @ images.mT  # (K, C, S)
            right = by_text.gather(2, own[:, None, None].expand(-1, num_texts, 1))[..., 0]
            best = right.masked_fill(~exists, -torch.inf).amax(dim=1, keepdim=True)
            # "Not less" and not "at least": features that are not a number find nothing.
            ahead = (~(by_image < best)).unflatten(1, (-1, num_texts))
            ahead[torch.arange(len(own)), own] = False
            of_texts.append(ahead.sum(dim=(1, 2)))
            of_images.append((~(by_text < right[..., None])).sum(dim=2) - 1)
            loss = by_image.logsumexp(dim=1)
            loss = loss + (by_text.logsumexp(dim=2) * exists).sum(dim=1) / count
            losses.append(loss / 2 - (right * exists).sum(dim=1) / count)
    return Ranks(torch.cat(of_texts), torch.cat(of_images), told), torch.cat(losses)
