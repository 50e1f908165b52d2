"""Re-ranking: of what features find first, the matching head judges each pair again.

Every image has a list of the texts most like it and every text one of images; a pair's new score
is the head's logit for "fits" plus the similarity, as BLIP scores (arXiv 2201.12086, section 4.1).
Pairs in both kinds of lists are judged once, image by image, so no image's rows are kept.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from comp.blocks import unmetered
from comp.contrast import Ranks
from comp.handle import handle_of
from comp.tasks.base import Batch
from comp.tasks.encoders import encode_images, match_logits

PAIRS_AT_ONCE = 128


@dataclass(frozen=True)
class _Lists:
    """Who is compared with whom: the first ``k`` of every ranking by features.

    Attributes:
        texts: For every image texts, as flat numbers, ``(S, k)``.
        images: For every text images, ``(S * C, k')``.
        similarity: Of every image to all texts, ``(S, S * C)``, -inf where there is none.
    """

    texts: Tensor
    images: Tensor
    similarity: Tensor


def rerank(
    model: nn.Module,
    batches: Iterable[Batch],
    images: Tensor,
    texts: Tensor,
    told: Tensor,
    read: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    top: int,
) -> tuple[Ranks, float]:
    """Ranks a split by the matching head within the first ``top`` by features.

    Args:
        model: An attached model that matches, in eval mode.
        batches: The split's images once more, in the order of the features.
        images: Features of length 1, ``(S, D)``.
        texts: Features of the texts of every image, ``(S, C, D)``.
        told: Which of these exist, ``(S, C)`` bool.
        read: Token ids and mask, each ``(P, N)``, of texts by flat number ``(P,)``.
        top: Length of the lists.

    Returns:
        The ranks (what is in no list stands last), and the mean multiply-adds that one query's
        list costs beyond the features.
    """
    lists = _lists(images, texts, told, top)
    num_texts = lists.similarity.shape[1]
    rows, places = torch.arange(len(images), device=images.device), told.flatten().nonzero()[:, 0]
    by_image = (rows[:, None] * num_texts + lists.texts).flatten()
    by_text = (lists.images[places] * num_texts + places[:, None]).flatten()
    pairs, where = torch.unique(torch.cat([by_image, by_text]), return_inverse=True)
    fits, macs = _judge(model, batches, pairs, num_texts, read)
    scores = (fits + lists.similarity.flatten()[pairs])[where]
    of_images = scores[: by_image.numel()].view(lists.texts.shape)
    of_texts = scores[by_image.numel() :].view(len(places), -1)
    own = lists.texts // told.shape[1] == rows[:, None]
    own &= torch.isfinite(of_images)
    right = lists.images[places] == (places // told.shape[1])[:, None]
    last = torch.full(told.shape, num_texts, device=told.device)
    last.view(-1)[places] = _place(of_texts, right, len(images))
    return Ranks(_place(of_images, own, num_texts), last, told), macs * lists.texts.shape[1]


def _lists(images: Tensor, texts: Tensor, told: Tensor, top: int) -> _Lists:
    similarity = images.float() @ texts.float().flatten(0, 1).mT
    similarity = similarity.masked_fill(~told.flatten(), -torch.inf)
    return _Lists(
        similarity.topk(min(top, similarity.shape[1]), dim=1).indices,
        similarity.mT.topk(min(top, len(images)), dim=1).indices,
        similarity,
    )


def _judge(
    model: nn.Module,
    batches: Iterable[Batch],
    pairs: Tensor,
    num_texts: int,
    read: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, float]:
    """Returns every pair's logit for "fits", ``(P,)``, and what one pair costs on average.

    ``pairs`` ascend, and a pair is ``image * num_texts + text``.
    """
    handle = handle_of(model)
    found = []
    first = 0
    with handle.metering() as meter:
        for batch in batches:
            with unmetered(model):
                rows = encode_images(model, batch["pixel_values"]).rows
            assert rows is not None
            last = first + len(rows)
            mine = pairs[(pairs >= first * num_texts) & (pairs < last * num_texts)]
            for part in mine.split(PAIRS_AT_ONCE):
                ids, mask = read(part % num_texts)
                found.append(match_logits(model, rows[part // num_texts - first], ids, mask)[:, 1])
            first = last
        meter.num_samples = len(pairs)
        return torch.cat(found), meter.measurement(handle.groups.values(), handle.alive()).macs


def _place(scores: Tensor, right: Tensor, last: int) -> Tensor:
    """Place of the best right one in every list ``(R, k)``; ``last`` where there is none."""
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    ahead = (~right & ~(scores < best)).sum(dim=1)
    return torch.where(right.any(dim=1), ahead, last)
