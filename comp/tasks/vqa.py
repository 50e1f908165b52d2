"""Visual question answering: BLIP's encoder and decoder, answers ranked as BLIP ranks them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from comp.data.images import normalize
from comp.tasks.base import Batch
from comp.tasks.batching import jitter, training_order
from comp.tasks.questions import Question
from comp.tasks.text import TextTokenizer, encode, pad, pad_mask

_IGNORED = -100  # what the loss leaves out


class VqaTask:
    """Questions about one image each, with an answer out of a list.

    The model is called like the stock ``BlipForQuestionAnswering``. An answer counts as right
    when it is the one that the model ranks first.

    Args:
        questions: Questions by split.
        pixels: All images, 0..255, ``(U, 3, H, W)``, uint8.
        answers: All candidate answers.
        tokenizer: The model's tokenizer.
        augment: Whether training images are shifted, scaled and mirrored a little.
        top_k: Answers that are ranked in full when answers have several tokens.

    Attributes:
        answers: All candidate answers; ``answer_index`` of a batch points into them.
        questions: Questions by split.
        pixels: All images, ``(U, 3, H, W)``, uint8.
    """

    name = "vqa"
    metric_name = "accuracy"

    def __init__(
        self,
        questions: Mapping[str, Sequence[Question]],
        pixels: Tensor,
        answers: Sequence[str],
        tokenizer: TextTokenizer,
        *,
        augment: bool = True,
        top_k: int = 16,
    ) -> None:
        self.answers = tuple(answers)
        self.questions = {split: tuple(asked) for split, asked in questions.items()}
        self.pixels = pixels
        self._augment = augment
        self._top_k = min(top_k, len(self.answers))
        self._pad_id = int(tokenizer.pad_token_id or 0)
        self._text_ids = {
            split: encode(tokenizer, [question.text for question in asked])
            for split, asked in self.questions.items()
        }
        self._answer_ids = [
            [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.sep_token_id]
            for answer in self.answers
        ]
        self._bos_id = _bos_id(tokenizer)
        self._position = {answer: index for index, answer in enumerate(self.answers)}

    def train_batches(self, *, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yields shuffled training batches without end; see ``Task``."""
        order = training_order(
            len(self.questions["train"]), batch_size=batch_size, seed=seed, start=start
        )
        for step, indexes in order:
            pixels = self._images("train", indexes)
            if self._augment:
                pixels = jitter(pixels, seed=seed, step=step, flip=True)
            yield self._batch("train", indexes, pixels)

    def batches(
        self, split: str, *, batch_size: int, num_samples: int | None = None
    ) -> Iterator[Batch]:
        """Yields a split once in a fixed order; see ``Task``."""
        if split not in self.questions:
            raise ValueError(
                f"split must be one of {', '.join(self.questions)}, but got {split!r}"
            )
        end = len(self.questions[split])
        end = min(end, num_samples or end)
        for first in range(0, end, batch_size):
            indexes = list(range(first, min(first + batch_size, end)))
            yield self._batch(split, indexes, self._images(split, indexes))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the mean cross-entropy of the answer's tokens."""
        labels = batch["labels"]
        loss: Tensor = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pixel_values=batch["pixel_values"],
            decoder_input_ids=labels.masked_fill(labels == _IGNORED, self._pad_id),
            labels=labels,
        ).loss
        return loss

    def score(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns whether the first-ranked answer is right, and its cross-entropy.

        Image and question are encoded once. The decoder's first step gives the ``top_k`` answers
        with the likeliest first token; if answers have several tokens, these are then ranked by
        the likelihood of all their tokens (BLIP's ``rank`` inference, arXiv 2201.12086, section
        5.3). The metered cost is that of the first step.
        """
        memory = self._encode(model, batch)
        target = batch["answer_index"]
        start = torch.full((memory.shape[0], 1), self._bos_id, device=memory.device)
        first = self._decode(model, start, memory)[:, 0]  # (B, V)
        first_ids = torch.tensor([ids[0] for ids in self._answer_ids], device=memory.device)
        scores = first[:, first_ids]  # (B, A)
        if all(len(ids) == 2 for ids in self._answer_ids):
            loss = -scores.gather(1, target.clamp(min=0)[:, None])[:, 0]
            return (scores.argmax(1) == target).float(), loss
        return self._rank(model, memory, scores, target)

    def _rank(
        self, model: nn.Module, memory: Tensor, scores: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        from comp.blocks import unmetered

        top = scores.topk(self._top_k, dim=1).indices  # (B, K)
        wanted = torch.cat([top, target.clamp(min=0)[:, None]], dim=1)  # (B, K + 1)
        with unmetered(model):
            likelihood = self._likelihood(model, memory, wanted)
        best = top.gather(1, likelihood[:, :-1].argmax(1, keepdim=True))[:, 0]
        return (best == target).float(), -likelihood[:, -1]

    def _likelihood(self, model: nn.Module, memory: Tensor, candidates: Tensor) -> Tensor:
        """Returns the log-likelihood of candidate answers (indexes), ``(B, K)``."""
        num, k = candidates.shape
        ids = pad([self._answer_ids[index] for index in candidates.flatten().tolist()], _IGNORED)
        ids = ids.to(memory.device)  # (B * K, L)
        start = torch.full((num * k, 1), self._bos_id, device=memory.device)
        inputs = torch.cat([start, ids[:, :-1].masked_fill(ids[:, :-1] < 0, self._pad_id)], dim=1)
        logs = self._decode(model, inputs, memory.repeat_interleave(k, dim=0))  # (B * K, L, V)
        chosen = logs.gather(2, ids.clamp(min=0)[..., None])[..., 0]
        return chosen.masked_fill(ids < 0, 0.0).sum(1).view(num, k)

    def _encode(self, model: nn.Module, batch: Batch) -> Tensor:
        parts: Any = model
        image = parts.vision_model(pixel_values=batch["pixel_values"]).last_hidden_state
        memory: Tensor = parts.text_encoder(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            encoder_hidden_states=image,
        ).last_hidden_state
        return memory

    def _decode(self, model: nn.Module, ids: Tensor, memory: Tensor) -> Tensor:
        parts: Any = model
        logits = parts.text_decoder(
            input_ids=ids, encoder_hidden_states=memory, use_cache=False
        ).logits
        return functional.log_softmax(logits.float(), dim=-1)

    def _images(self, split: str, indexes: Sequence[int]) -> Tensor:
        return self.pixels[[self.questions[split][index].image for index in indexes]]

    def _batch(self, split: str, indexes: Sequence[int], pixels: Tensor) -> Batch:
        texts = [self._text_ids[split][index] for index in indexes]
        answers = [self._position[self.questions[split][index].answer] for index in indexes]
        return {
            "pixel_values": normalize(pixels),
            "input_ids": pad(texts, self._pad_id),
            "attention_mask": pad_mask(texts),
            "labels": pad([[self._bos_id, *self._answer_ids[i]] for i in answers], _IGNORED),
            "answer_index": torch.tensor(answers),
        }


def _bos_id(tokenizer: TextTokenizer) -> int:
    if tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer has no bos_token; VQA answers begin with BLIP's [DEC]")
    return int(tokenizer.bos_token_id)
