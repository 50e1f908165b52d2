"""Visual question answering: BLIP's encoder and decoder, answers ranked as BLIP ranks them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from comp.data.images import normalize
from comp.data.layout import EncodedImage, Row
from comp.tasks.base import Batch, Prediction
from comp.tasks.batched import BatchedTask
from comp.tasks.batching import (
    Images,
    Streamed,
)
from comp.tasks.questions import Question
from comp.tasks.text import TextTokenizer, encode, pad, pad_mask, without_marks, word_prediction
from comp.tasks.vqa_answers import answer_accuracy, normalize_answer

_IGNORED = -100  # what the loss leaves out
MAX_TOKENS = 35
"""Tokens of a question that are read (BLIP)."""


@dataclass(frozen=True)
class StoredQuestion:
    """A question about an encoded image.

    Attributes:
        id: What the publisher calls it.
        image: The image.
        text: The question.
        answers: The distinct answers, the most frequent first; none where they are secret.
        counts: How many people gave each.
    """

    id: str
    image: EncodedImage
    text: str
    answers: tuple[str, ...]
    counts: tuple[int, ...]


AnyQuestion = Question | StoredQuestion


def stored_question(row: Row) -> StoredQuestion:
    """Makes a question of a row of kind ``questions``, without the marks BLIP never sees."""
    text = without_marks(row.texts[0])
    return StoredQuestion(row.id, row.images[0], text, tuple(row.labels), tuple(row.counts))


class VqaTask(BatchedTask[AnyQuestion]):
    """Questions about one image each, with an answer out of a list.

    The model is called like the stock ``BlipForQuestionAnswering``. The answer that it ranks first
    counts as VQA's accuracy says: 1 or 0 where there is one true answer, by the share of people
    who gave it where many were asked.

    Args:
        questions: Questions by split.
        pixels: All images, 0..255, ``(U, 3, H, W)``, uint8, or where to decode them.
        answers: All candidate answers.
        tokenizer: The model's tokenizer.
        augment: Whether training images are shifted and scaled a little.
        flip: Whether it also mirrors half of them; wrong where questions ask for left or right.
        top_k: Answers that are ranked in full when answers have several tokens.

    Attributes:
        answers: All candidate answers; ``answer_index`` of a batch points into them.
        questions: Questions by split.
    """

    name = "vqa"
    metric_name = "accuracy"

    def __init__(
        self,
        questions: Mapping[str, Sequence[Question] | Streamed[StoredQuestion]],
        pixels: Tensor | Images,
        answers: Sequence[str],
        tokenizer: TextTokenizer,
        *,
        augment: bool = True,
        flip: bool = True,
        top_k: int = 16,
    ) -> None:
        self.answers = tuple(answers)
        super().__init__(questions, augment=augment, flip=flip)
        self.questions = self.samples
        self._pixels = pixels if isinstance(pixels, Images) else Images(pixels)
        self._top_k = min(top_k, len(self.answers))
        self._tokenizer = tokenizer
        self._pad_id = int(tokenizer.pad_token_id or 0)
        self._answer_ids = [self._spell(answer) for answer in self.answers]
        self._bos_id = _bos_id(tokenizer)
        self._position = {answer: index for index, answer in enumerate(self.answers)}
        self._plain: dict[str, list[int]] = {}
        self._normalized: dict[str, list[int]] = {}
        for index, answer in enumerate(self.answers):
            self._plain.setdefault(answer.strip(), []).append(index)
            self._normalized.setdefault(normalize_answer(answer), []).append(index)

    def submission(self, model: nn.Module, batches: Iterable[Batch]) -> list[dict[str, Any]]:
        """Returns what VQA's server takes: ``question_id`` and ``answer`` of every question.

        Args:
            model: A model on the batches' device, in eval mode.
            batches: Questions with or without answers.
        """
        found = []
        for batch in batches:
            best = self._best(model, batch)[0].tolist()
            for question, index in zip(batch["question_id"].tolist(), best, strict=True):
                found.append({"question_id": question, "answer": self.answers[index]})
        return found

    def _judge(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Callable[[], Prediction]]:
        """Returns the mean over questions of their answers' losses, each by its share of people.

        An answer's loss is the cross-entropy of all its tokens, smoothed as the model says. Image
        and question are encoded once (BLIP, arXiv 2201.12086, the VQA fine-tuning).
        """
        shares = batch["answer_weights"]  # (B, A)
        question, answer = shares.nonzero(as_tuple=True)
        ids, weights = batch["answers"][question, answer], shares[question, answer]  # (K, L), (K,)
        words, parts = ids[:, 1:], cast(Any, model)
        logits = parts.text_decoder(
            input_ids=ids[:, :-1].masked_fill(ids[:, :-1] == _IGNORED, self._pad_id),
            encoder_hidden_states=self._encode(model, batch)[question],
            use_cache=False,
        ).logits
        losses = functional.cross_entropy(
            logits.float().mT,
            words,
            ignore_index=_IGNORED,
            reduction="none",
            label_smoothing=float(parts.text_decoder.label_smoothing),
        ).sum(dim=1)
        loss: Tensor = (weights * losses).sum() / len(shares)
        return loss, lambda: word_prediction(logits, words, weights / len(shares))

    def score(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the accuracy of the first-ranked answer, and the true one's cross-entropy.

        Image and question are encoded once. The decoder's first step gives the ``top_k`` answers
        with the likeliest first token; if answers have several tokens, these are then ranked by
        the likelihood of all their tokens (BLIP's ``rank`` inference, arXiv 2201.12086, section
        5.3). The metered cost is that of the first step.
        """
        if bool((batch["num_answers"] == 0).any()):
            raise ValueError(
                "these questions have no answers to compare with; write a file for the server "
                "with comp evaluate --submission FILE"
            )
        best, loss = self._best(model, batch, with_loss=True)
        return batch["accuracy"].gather(1, best[:, None])[:, 0], loss

    def _best(
        self, model: nn.Module, batch: Batch, *, with_loss: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Returns the first-ranked answers and the cross-entropy of the labels, each ``(B,)``."""
        from comp.blocks import unmetered

        memory = self._encode(model, batch)
        start = torch.full((memory.shape[0], 1), self._bos_id, device=memory.device)
        first = self._decode(model, start, memory)[:, 0]  # (B, V)
        first_ids = torch.tensor([ids[0] for ids in self._answer_ids], device=memory.device)
        scores = first[:, first_ids]  # (B, A)
        labels = batch["labels"][:, 1:]
        if all(len(ids) == 2 for ids in self._answer_ids):
            best = scores.argmax(1)
            if labels.shape[1] == 2:
                return best, -first.gather(1, labels[:, :1])[:, 0]
        else:
            top = scores.topk(self._top_k, dim=1).indices  # (B, K)
            with unmetered(model):
                likelihood = self._likelihood(model, memory, top)
            best = top.gather(1, likelihood.argmax(1, keepdim=True))[:, 0]
        if not with_loss:
            return best, torch.zeros_like(best)
        with unmetered(model):
            return best, self._label_loss(model, batch["labels"], memory)

    def _label_loss(self, model: nn.Module, labels: Tensor, memory: Tensor) -> Tensor:
        known = labels[:, 1:] != _IGNORED
        inputs = labels[:, :-1].masked_fill(labels[:, :-1] == _IGNORED, self._pad_id)
        logs = self._decode(model, inputs, memory)  # (B, L, V)
        chosen = logs.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        return -chosen.masked_fill(~known, 0.0).sum(1)

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

    def _images(self, asked: Sequence[AnyQuestion]) -> Tensor:
        return self._pixels([one.image for one in asked])

    def _batch(
        self, asked: Sequence[AnyQuestion], pixels: Tensor, drawn: tuple[int, int] | None = None
    ) -> Batch:
        texts = encode(self._tokenizer, [one.text for one in asked], max_tokens=MAX_TOKENS)
        answers = [_most_frequent(one) for one in asked]
        return {
            "pixel_values": normalize(pixels),
            "input_ids": pad(texts, self._pad_id),
            "attention_mask": pad_mask(texts),
            "labels": pad([[self._bos_id, *self._spell(one)] for one in answers], _IGNORED),
            **self._answers(asked),
            "answer_index": torch.tensor([self._position.get(one, -1) for one in answers]),
            "accuracy": self._accuracy(asked),
            "num_answers": torch.tensor([len(one.answers) for one in asked]),
            "question_id": torch.tensor([int(one.id or 0) for one in asked]),
        }

    def _answers(self, asked: Sequence[AnyQuestion]) -> Batch:
        """All answers, ``(B, A, L)``, and the share of people who gave each, ``(B, A)``."""
        most = max(max(len(one.answers) for one in asked), 1)
        spelled = [
            [[self._bos_id, *self._spell(answer)] for answer in one.answers] for one in asked
        ]
        rows = [ids for told in spelled for ids in (*told, *([[]] * (most - len(told))))]
        weights = torch.zeros(len(asked), most)
        for row, one in enumerate(asked):
            counts = torch.tensor(one.counts or [1] * len(one.answers)).float()
            weights[row, : len(counts)] = counts / counts.sum()
        return {
            "answers": pad(rows, _IGNORED).unflatten(0, weights.shape),
            "answer_weights": weights,
        }

    def _accuracy(self, asked: Sequence[AnyQuestion]) -> Tensor:
        """Returns the accuracy that each candidate answer would have, ``(B, A)``."""
        accuracy = torch.zeros(len(asked), len(self.answers))
        for row, one in enumerate(asked):
            candidates = self._normalized if len(one.answers) > 1 else self._plain
            for answer, value in answer_accuracy(one.answers, one.counts).items():
                for index in candidates.get(answer, ()):
                    accuracy[row, index] = value
        return accuracy

    def _spell(self, answer: str) -> list[int]:
        ids = self._tokenizer(answer, add_special_tokens=False)["input_ids"]
        return [*ids, int(self._tokenizer.sep_token_id)]


def _most_frequent(question: AnyQuestion) -> str:
    return question.answers[0] if question.answers else ""  # they are stored in that order


def _bos_id(tokenizer: TextTokenizer) -> int:
    if tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer has no bos_token; VQA answers begin with BLIP's [DEC]")
    return int(tokenizer.bos_token_id)
