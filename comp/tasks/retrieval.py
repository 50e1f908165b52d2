"""Image-text retrieval: which image belongs to a caption, which caption to an image?

The training loss is BLIP's and CLIP's contrastive one against a slow copy of the model and its
queues, and for models with a matching head BLIP's matching loss (``comp.contrast``). The metric,
the mean of R@1 in both directions, compares all images and captions of a split by features, and so
does the loss that goes with it; neither depends on the batches in which the features were made.
What papers report of BLIP, ranks by the matching head, is ``report``.

A sample costs one image, its first caption, and one reading of the two together where the model
has a matching head. Features alone would never notice a pruned cross-attention, so the loss of a
split has the matching head's, too: on every image's first caption and on the next image's.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from comp.blocks import unmetered
from comp.contrast import Candidates, Ranks, contrastive_loss, hard_negatives, rank_and_loss
from comp.data.images import normalize
from comp.momentum import momentum_of
from comp.tasks.base import Batch, Prediction
from comp.tasks.batched import BatchedTask
from comp.tasks.batching import Streamed, split_of
from comp.tasks.captions import MAX_CAPTIONS, CaptionedImage, drawn_captions
from comp.tasks.encoders import (
    add_temperature_,
    encode_images,
    encode_texts,
    match_logits,
    matches,
    similarity_factor,
)
from comp.tasks.rerank import rerank
from comp.tasks.text import TextTokenizer, encode, pad, pad_mask

ALPHA = 0.4
"""Share of the slow copy's opinion in the targets (BLIP, arXiv 2201.12086)."""
QUEUE = 57_600
"""Samples in the queues (BLIP)."""
MAX_TOKENS = 77
"""Tokens of a caption that are read: CLIP's number; BLIP's is below."""
MAX_BERT_TOKENS = 35
CUTOFFS = (1, 5, 10)


class RetrievalTask(BatchedTask[CaptionedImage]):
    """Images with several captions each, for dual encoders and for BLIP's retrieval class.

    Args:
        samples: Samples by split, each image with an id of its own.
        images: Returns the pixels of some samples' images, 0..255, ``(B, 3, H, W)``.
        tokenizer: The model's tokenizer.
        augment: Whether training images are shifted and scaled a little (never mirrored).
        queue: Samples whose features training compares with, at most; rounded down to a multiple
            of the batch.
        top: How many of each ranking the matching head judges again (BLIP: 256 on COCO, 128 on
            Flickr30K).

    Attributes:
        samples: Samples by split.
    """

    name = "retrieval"
    metric_name = "mean R@1"

    def __init__(
        self,
        samples: Mapping[str, Sequence[CaptionedImage] | Streamed[CaptionedImage]],
        images: Callable[[Sequence[Any]], Tensor],
        tokenizer: TextTokenizer,
        *,
        augment: bool = True,
        queue: int = QUEUE,
        top: int = 16,
    ) -> None:
        super().__init__(samples, augment=augment)
        self._pixels = images
        self._tokenizer = tokenizer
        self._queue, self._top = queue, top
        self._pad_id = int(tokenizer.pad_token_id or 0)
        self._max_tokens = MAX_BERT_TOKENS if _vocabulary(tokenizer, "[SEP]") else MAX_TOKENS
        self._judge_id = _vocabulary(tokenizer, "[ENC]")

    def batches(
        self, split: str, *, batch_size: int, num_samples: int | None = None
    ) -> Iterator[Batch]:
        """Yields a split once in a fixed order; a sample is an image with its captions."""
        samples = split_of(self.samples, split)
        end = min(len(samples), num_samples or len(samples))
        for first in range(0, end, batch_size):
            last = min(first + batch_size, end)
            chosen = samples.fetch(range(first, last))
            others = [*chosen[1:], *samples.fetch([last % end])]
            batch = self._batch(chosen, self._images(chosen))
            yield batch | self._texts([_read(one)[:1] for one in others], "other_")

    def prepare_(self, model: nn.Module) -> None:
        """Gives BLIP's class the temperature that it learns and the stock class lacks."""
        add_temperature_(model)

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """Returns how alike the batch's images and texts are, both ways, from features alone.

        What the matching head says is left out: the pairs that it judges in training are drawn.
        """
        ids, mask = batch["input_ids"][:, 0], batch["attention_mask"][:, 0]
        images = encode_images(model, batch["pixel_values"]).features
        return _both_ways(similarity_factor(model) * images @ encode_texts(model, ids, mask).mT)

    def _judge(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Callable[[], Prediction]]:
        """Returns the contrastive loss, plus the matching loss where the model has the head.

        While training, candidates and targets are the slow copy's; in eval mode they are the
        batch's own.
        """
        ids, mask = batch["input_ids"][:, 0], batch["attention_mask"][:, 0]
        factor = similarity_factor(model)
        images = encode_images(model, batch["pixel_values"])
        texts = encode_texts(model, ids, mask)
        candidates, alpha = Candidates(images.features, texts, batch["image_id"]), 0.0
        if model.training:
            candidates, alpha = self._candidates(model, batch, ids, mask, texts.shape[1])
        loss = contrastive_loss(images.features, texts, candidates, factor, alpha)
        similarity = factor * images.features @ texts.mT
        if images.rows is not None:
            drawn_by = similarity.detach()
            loss = loss + self._matching(model, batch, images.rows, ids, mask, drawn_by)
        return loss, lambda: _both_ways(similarity)

    def score(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns both R@1 and the contrastive loss within the batch, of the first captions."""
        images, texts, _ = self._first(model, batch)
        told = torch.ones(texts.shape[:2], dtype=torch.bool, device=texts.device)
        ranks, loss = rank_and_loss(images, texts, told)
        return ranks.hits(), loss

    def features(self, model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        """Returns what the metric needs of every image.

        Returns:
            Features of the images, scaled, ``(B, D)``; of the captions, ``(B, C, D)``; which of
            these exist, ``(B, C)``; their token ids, padded with -1, ``(B, C, N)``; the matching
            head's loss, ``(B,)``.
        """
        images, first, fits = self._first(model, batch)
        matching = torch.zeros(len(images), device=images.device)
        with unmetered(model):
            if fits is not None:
                logits, rows = fits
                matching = self._both(model, batch, rows, logits)
            more = [
                encode_texts(model, batch["input_ids"][:, i], batch["attention_mask"][:, i])
                for i in range(1, batch["input_ids"].shape[1])
            ]
        texts = torch.stack([first[:, 0], *more], dim=1)
        told = batch["told"]
        ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -1)
        missing = self._max_tokens - ids.shape[2], MAX_CAPTIONS - ids.shape[1]
        return (
            images,
            functional.pad(texts, (0, 0, 0, missing[1])),
            functional.pad(told, (0, missing[1])),
            functional.pad(ids, (0, missing[0], 0, missing[1]), value=-1),
            matching,
        )

    def score_features(self, *features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean of both R@1 and the losses of every image, each ``(S,)``."""
        images, texts, told, _, matching = features
        ranks, loss = rank_and_loss(images, texts, told)
        return ranks.hits(), loss + matching

    def report(
        self, model: nn.Module, batches: Iterable[Batch], *features: Tensor
    ) -> tuple[float, dict[str, float]]:
        """Returns what papers report of a split; see ``ReportingTask``.

        Returns:
            The mean of both R@1, re-ranked if the model has a matching head, and R@1, R@5 and R@10
            of texts for an image (``i2t_r1``) and of images for a text (``t2i_r1``) in points of
            100. With re-ranking, those by features alone are named ``itc_i2t_r1`` and so on, and
            ``rerank_gmacs`` is what re-ranking one query costs beyond the features.
        """
        images, texts, told, ids, _ = features
        ranks, _ = rank_and_loss(images, texts, told)
        if not matches(model):
            return _headline(ranks), _recalls(ranks)
        images = functional.normalize(images, dim=1)

        def read(numbers: Tensor) -> tuple[Tensor, Tensor]:
            chosen = ids.flatten(0, 1)[numbers]
            chosen = chosen[:, : int((chosen >= 0).sum(dim=1).max())]
            known = chosen >= 0
            return self._for_judge(chosen.masked_fill(~known, self._pad_id)), known.long()

        again, macs = rerank(model, batches, images, texts, told, read, top=self._top)
        by_features = {f"itc_{name}": value for name, value in _recalls(ranks).items()}
        return _headline(again), _recalls(again) | by_features | {"rerank_gmacs": macs / 1e9}

    def _candidates(
        self, model: nn.Module, batch: Batch, ids: Tensor, mask: Tensor, width: int
    ) -> tuple[Candidates, float]:
        """Encodes the batch by the slow copy, and remembers it behind what was in the queues."""
        size = len(ids)
        slow = momentum_of(model, length=self._queue, batch=size, width=width)
        images = slow.encode(model, lambda m: encode_images(m, batch["pixel_values"]).features)
        texts = slow.encode(model, lambda m: encode_texts(m, ids, mask))
        own = (images, texts, batch["image_id"])
        found = [torch.cat(pair) for pair in _zip(own, slow.queues())]
        alpha = ALPHA * min(1.0, slow.seen / len(self.samples["train"]))
        slow.remember(*own)
        return Candidates(*found), alpha

    def _matching(
        self,
        model: nn.Module,
        batch: Batch,
        rows: Tensor,
        ids: Tensor,
        mask: Tensor,
        similarity: Tensor,
    ) -> Tensor:
        """Cross-entropy of all pairs, and of hard wrong images and texts (BLIP's ITM)."""
        same = batch["image_id"][:, None] == batch["image_id"]
        texts, wrong_images = hard_negatives(similarity.mT, same)
        images, wrong_texts = hard_negatives(similarity, same)
        own = torch.arange(len(ids), device=ids.device)
        pick_images = torch.cat([own, wrong_images, images])
        pick_texts = torch.cat([own, texts, wrong_texts])
        logits = match_logits(
            model, rows[pick_images], self._for_judge(ids[pick_texts]), mask[pick_texts]
        )
        labels = (torch.arange(len(logits), device=ids.device) < len(own)).long()
        return functional.cross_entropy(logits, labels)

    def _first(
        self, model: nn.Module, batch: Batch
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Features of images, scaled, and of first captions; logits and rows of the two."""
        ids, mask = batch["input_ids"][:, 0], batch["attention_mask"][:, 0]
        images = encode_images(model, batch["pixel_values"])
        texts = encode_texts(model, ids, mask).unsqueeze(1)
        scaled = similarity_factor(model) * images.features
        if images.rows is None:
            return scaled, texts, None
        logits = match_logits(model, images.rows, self._for_judge(ids), mask)
        return scaled, texts, (logits, images.rows)

    def _both(self, model: nn.Module, batch: Batch, rows: Tensor, fits: Tensor) -> Tensor:
        """Matching loss of every image on its own caption and on another's, ``(B,)``."""
        ids, mask = batch["other_input_ids"][:, 0], batch["other_attention_mask"][:, 0]
        other = match_logits(model, rows, self._for_judge(ids), mask)
        yes = functional.cross_entropy(fits, torch.ones_like(ids[:, 0]), reduction="none")
        no = functional.cross_entropy(other, torch.zeros_like(ids[:, 0]), reduction="none")
        return (yes + no) / 2

    def _for_judge(self, ids: Tensor) -> Tensor:
        """Texts that are read with an image begin with [ENC] where the tokenizer knows it."""
        if self._judge_id is None:
            return ids
        return torch.cat([torch.full_like(ids[:, :1], self._judge_id), ids[:, 1:]], dim=1)

    def _images(self, chosen: Sequence[CaptionedImage]) -> Tensor:
        return self._pixels([one.image for one in chosen])

    def _batch(
        self,
        chosen: Sequence[CaptionedImage],
        pixels: Tensor,
        drawn: tuple[int, int] | None = None,
    ) -> Batch:
        """While training an image has one caption, in stored order all of its own."""
        told: list[tuple[str, ...]]
        if drawn:
            told = [(text,) for text in drawn_captions(chosen, *drawn)]
        else:
            told = [_read(one) for one in chosen]
        return {
            "pixel_values": normalize(pixels),
            "image_id": torch.tensor([one.id for one in chosen]),
            "told": pad_mask([[1] * len(texts) for texts in told]).bool(),
            **self._texts(told),
        }

    def _texts(self, told: Sequence[tuple[str, ...]], prefix: str = "") -> Batch:
        """Token ids and masks, ``(B, C, N)``; the first text stands where one is missing."""
        most = max(len(texts) for texts in told)
        filled = [t for texts in told for t in (*texts, *(texts[:1] * (most - len(texts))))]
        ids = encode(self._tokenizer, filled, max_tokens=self._max_tokens)
        return {
            f"{prefix}input_ids": pad(ids, self._pad_id).unflatten(0, (len(told), most)),
            f"{prefix}attention_mask": pad_mask(ids).unflatten(0, (len(told), most)),
        }


def _both_ways(similarity: Tensor) -> Prediction:
    """Similarities ``(B, B)`` as rows: every image among the texts, every text among the images.

    Each counts as in the contrastive loss: half of a mean over the batch.
    """
    rows = torch.cat([similarity, similarity.mT])
    return Prediction(rows, rows.new_full((len(rows),), 1 / len(rows)))


def _read(sample: CaptionedImage) -> tuple[str, ...]:
    """The captions of an image that are read.

    Raises:
        ValueError: If it has none.
    """
    if not sample.captions:
        raise ValueError(f"every image must have a caption, but image {sample.id} has none")
    return sample.captions[:MAX_CAPTIONS]


def _zip(first: Any, second: Any) -> Iterator[tuple[Any, Any]]:
    return zip(first, second, strict=True)


def _headline(ranks: Ranks) -> float:
    return sum(ranks.recall(1)) / 2


def _recalls(ranks: Ranks) -> dict[str, float]:
    values: dict[str, float] = {}
    for k in CUTOFFS:
        found, named = ranks.recall(k)
        values |= {f"i2t_r{k}": 100 * found, f"t2i_r{k}": 100 * named}
    return values


def _vocabulary(tokenizer: Any, token: str) -> int | None:
    """A special token's id, if the tokenizer has it."""
    return dict(tokenizer.get_vocab()).get(token) if hasattr(tokenizer, "get_vocab") else None
