"""Captioning: BLIP's decoder tells what an image shows, judged by CIDEr against references.

The loss is next-word prediction after the prompt, with smoothed labels. The
metered cost of a sample is that of the image and of one pass over its first reference, so that it
does not depend on what a model happens to say; generating is not metered.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from comp.blocks import unmetered
from comp.data.images import normalize
from comp.metrics import cider
from comp.tasks.base import Batch, Prediction
from comp.tasks.batched import BatchedTask
from comp.tasks.batching import Streamed
from comp.tasks.captions import MAX_CAPTIONS, CaptionedImage, drawn_captions
from comp.tasks.text import TextTokenizer, pad, pad_mask, word_prediction

_IGNORED = -100  # what the loss leaves out
MAX_TOKENS = 40
"""Tokens of a caption that are learnt, with the prompt (BLIP)."""
MAX_REFERENCE = 64
"""Tokens of a reference that the metric reads."""


class CaptioningTask(BatchedTask[CaptionedImage]):
    """Images with references, for models called like ``BlipForConditionalGeneration``.

    Args:
        samples: Samples by split.
        images: Returns the pixels of some samples' images, 0..255, ``(B, 3, H, W)``.
        tokenizer: The model's tokenizer.
        prompt: Words that every caption begins with; they are given, not predicted.
        beams: Beams of the search while evaluating (paper: 3).
        max_words: Longest caption that is generated, in tokens (paper: 20).
        min_words: Shortest one (paper: 5).
        smoothing: Label smoothing of the training loss (paper: 0.1).
        augment: Whether training images are shifted and scaled a little (never mirrored).

    Source: BLIP (arXiv 2201.12086), Section 3.2 and the supplement.
    """

    name = "captioning"
    metric_name = "CIDEr"

    def __init__(
        self,
        samples: Mapping[str, Sequence[CaptionedImage] | Streamed[CaptionedImage]],
        images: Callable[[Sequence[Any]], Tensor],
        tokenizer: TextTokenizer,
        *,
        prompt: str = "",
        beams: int = 3,
        max_words: int = 20,
        min_words: int = 5,
        smoothing: float = 0.1,
        augment: bool = True,
    ) -> None:
        super().__init__(samples, augment=augment)
        self._pixels = images
        self._tokenizer: Any = tokenizer
        self._smoothing = smoothing
        self._beams, self._max_words, self._min_words = beams, max_words, min_words
        self._pad_id = int(tokenizer.pad_token_id or 0)
        if tokenizer.bos_token_id is None:
            raise ValueError("the tokenizer has no bos_token; captions begin with BLIP's [DEC]")
        self._start = [int(tokenizer.bos_token_id), *self._spell(prompt)]

    def _judge(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Callable[[], Prediction]]:
        """Returns the mean cross-entropy of the words after the prompt, smoothed."""
        logits = self._predict(model, batch, self._encode(model, batch))
        words = batch["labels"][:, 1:]
        loss = functional.cross_entropy(
            logits.float().flatten(0, 1),
            words.flatten(),
            ignore_index=_IGNORED,
            label_smoothing=self._smoothing,
        )
        return loss, lambda: word_prediction(logits, words)

    def score(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the share of the first reference's words predicted right, and their loss."""
        return self._teacher_forced(self._predict(model, batch, self._encode(model, batch)), batch)

    def features(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the generated tokens, the references' tokens and the loss of the first one.

        Returns:
            ``(B, L)``, ``(B, C, L')``, both padded with -100, and ``(B,)``.
        """
        image = self._encode(model, batch)
        _, losses = self._teacher_forced(self._predict(model, batch, image), batch)
        with unmetered(model):
            spoken = self._generate(model, image)
        return spoken, batch["references"], losses

    def score_features(
        self, spoken: Tensor, references: Tensor, losses: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns CIDEr-D of every image (1 is the 100 of the papers) and the losses, ``(S,)``."""
        told = [
            [self._text(one) for one in texts if bool(one.ge(0).any())] for texts in references
        ]
        scores = cider([self._text(one) for one in spoken], told)
        return torch.tensor(scores, device=losses.device), losses

    def caption(self, model: nn.Module, pixel_values: Tensor) -> list[str]:
        """Returns what the model says about normalised images ``(B, 3, H, W)``."""
        image = self._encode(model, {"pixel_values": pixel_values})
        return [self._text(one) for one in self._generate(model, image)]

    def _encode(self, model: nn.Module, batch: Batch) -> Tensor:
        parts: Any = model
        rows: Tensor = parts.vision_model(pixel_values=batch["pixel_values"]).last_hidden_state
        return rows

    def _predict(self, model: nn.Module, batch: Batch, image: Tensor) -> Tensor:
        """Logits of every next word, ``(B, N - 1, V)``."""
        parts: Any = model
        logits: Tensor = parts.text_decoder(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            encoder_hidden_states=image,
            use_cache=False,
        ).logits
        return logits[:, :-1]

    @staticmethod
    def _teacher_forced(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        wanted = batch["labels"][:, 1:]
        counted = wanted.ne(_IGNORED)
        number = counted.sum(dim=1)
        losses = functional.cross_entropy(
            logits.float().transpose(1, 2), wanted, ignore_index=_IGNORED, reduction="none"
        )
        right = (logits.argmax(dim=-1).eq(wanted) & counted).sum(dim=1)
        return right / number, losses.sum(dim=1) / number

    def _generate(self, model: nn.Module, image: Tensor) -> Tensor:
        parts: Any = model
        start = torch.tensor([self._start], device=image.device).expand(len(image), -1)
        ids: Tensor = parts.text_decoder.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:2], device=image.device),
            eos_token_id=int(self._tokenizer.sep_token_id),
            pad_token_id=self._pad_id,
            num_beams=self._beams,
            max_new_tokens=self._max_words,
            min_new_tokens=self._min_words,
            do_sample=False,
        )
        new = ids[:, start.shape[1] :]
        padded = functional.pad(new, (0, self._max_words - new.shape[1]), value=self._pad_id)
        return padded.masked_fill(padded == self._pad_id, _IGNORED)

    def _images(self, chosen: Sequence[CaptionedImage]) -> Tensor:
        return self._pixels([one.image for one in chosen])

    def _batch(
        self,
        chosen: Sequence[CaptionedImage],
        pixels: Tensor,
        drawn: tuple[int, int] | None = None,
    ) -> Batch:
        """In stored order the first reference is the one to predict."""
        told = drawn_captions(chosen, *drawn) if drawn else [one.captions[0] for one in chosen]
        end = int(self._tokenizer.sep_token_id)
        heads = [[*self._start, *self._spell(text)][: MAX_TOKENS - 1] for text in told]
        ids = [[*head, end] for head in heads]
        labels = [[_IGNORED] * len(self._start) + one[len(self._start) :] for one in ids]
        return {
            "pixel_values": normalize(pixels),
            "input_ids": pad(ids, self._pad_id),
            "attention_mask": pad_mask(ids),
            "labels": pad(labels, _IGNORED),
            "references": self._references(chosen),
        }

    def _references(self, chosen: Sequence[CaptionedImage]) -> Tensor:
        """Tokens of all references, ``(B, MAX_CAPTIONS, MAX_REFERENCE)``, padded with -100.

        The size is fixed so that the batches of a split fit together.
        """
        table = torch.full((len(chosen), MAX_CAPTIONS, MAX_REFERENCE), _IGNORED)
        for row, one in enumerate(chosen):
            for column, text in enumerate(one.captions[:MAX_CAPTIONS]):
                ids = self._spell(text)[:MAX_REFERENCE]
                table[row, column, : len(ids)] = torch.tensor(ids)
        return table

    def _spell(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _text(self, ids: Tensor) -> str:
        real = ids[ids >= 0].tolist()
        text: str = self._tokenizer.decode(real, skip_special_tokens=True)
        return text
