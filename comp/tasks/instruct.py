"""Visual instructions: conversations about an image, answers written by a LLaVA.

A conversation is one sequence, the same for every turn: start token, image, question, ``[SEP]``,
answer, ``[SEP]``, next question, and so on. The ``[SEP]`` behind a question is the instruction's
last token.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from comp.data.images import normalize
from comp.tasks.base import Batch
from comp.tasks.batching import jitter, training_order
from comp.tasks.questions import Question
from comp.tasks.text import TextTokenizer, pad, pad_mask

_IGNORED = -100  # what the loss leaves out


@dataclass(frozen=True)
class Conversation:
    """Questions about one image with their answers.

    Attributes:
        image: Index of the image.
        turns: Question and answer of every turn.
    """

    image: int
    turns: tuple[tuple[str, str], ...]


def make_conversations(questions: Sequence[Question], *, num_turns: int = 3) -> list[Conversation]:
    """Joins questions about the same image.

    Args:
        questions: In an order that is kept: a conversation stands where its first question did.
        num_turns: Questions of a conversation at most.

    Raises:
        ValueError: If ``num_turns`` is less than 1.
    """
    if num_turns < 1:
        raise ValueError(f"num_turns must be at least 1, but got {num_turns}")
    found: list[tuple[int, list[tuple[str, str]]]] = []
    growing: dict[int, list[tuple[str, str]]] = {}
    for question in questions:
        turns = growing.get(question.image)
        if turns is None or len(turns) == num_turns:
            turns = growing[question.image] = []
            found.append((question.image, turns))
        turns.append((question.text, question.answer))
    return [Conversation(image, tuple(turns)) for image, turns in found]


class InstructTask:
    """Conversations about one image each; the answer to the last question is judged.

    The model is called like the stock ``LlavaForConditionalGeneration``; the task puts the
    image's tokens behind the start token, as many as the model's config says. Training learns
    the answers of all turns. An answer counts as right when greedy decoding writes it word for
    word, behind a history of true answers.

    Args:
        conversations: Conversations by split.
        pixels: All images, 0..255, ``(U, 3, H, W)``, uint8.
        tokenizer: The model's tokenizer.
        augment: Whether training images are shifted, scaled and mirrored a little.
    """

    name = "instruct"
    metric_name = "exact match"

    def __init__(
        self,
        conversations: Mapping[str, Sequence[Conversation]],
        pixels: Tensor,
        tokenizer: TextTokenizer,
        *,
        augment: bool = True,
    ) -> None:
        self.conversations = {split: tuple(found) for split, found in conversations.items()}
        self._pixels = pixels
        self._augment = augment
        self._tokenizer = tokenizer
        self._pad_id = int(tokenizer.pad_token_id or 0)
        if tokenizer.bos_token_id is None:
            raise ValueError("the tokenizer has no bos_token; a conversation begins with it")

    def train_batches(self, *, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yields shuffled training batches without end; see ``Task``."""
        order = training_order(
            len(self.conversations["train"]), batch_size=batch_size, seed=seed, start=start
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
        if split not in self.conversations:
            raise ValueError(
                f"split must be one of {', '.join(self.conversations)}, but got {split!r}"
            )
        end = len(self.conversations[split])
        end = min(end, num_samples or end)
        for first in range(0, end, batch_size):
            indexes = list(range(first, min(first + batch_size, end)))
            yield self._batch(split, indexes, self._images(split, indexes))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the mean cross-entropy of all answers' tokens."""
        ids, mask = _with_image(model, batch["input_ids"], batch["attention_mask"])
        unlabelled = ids.shape[1] - batch["labels"].shape[1]
        loss: Tensor = model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=batch["pixel_values"],
            labels=_behind_first(batch["labels"], unlabelled, _IGNORED),
            use_cache=False,
        ).loss
        return loss

    def score(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns whether greedy decoding writes the last answer, and its mean cross-entropy.

        The prompt is read once; then the true answer runs through the cache. Greedy decoding
        writes the answer if and only if every token of it is the likeliest behind the true ones
        before it. The metered cost is that of reading the prompt, first answer token included.
        """
        from comp.blocks import unmetered

        ids, mask = _with_image(model, batch["prompt_ids"], batch["prompt_mask"])
        ids, mask = _padded_in_front(ids, mask)
        prompt = model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=batch["pixel_values"],
            logits_to_keep=1,
            use_cache=True,
        )
        answer = batch["answer_ids"]  # (B, A)
        known = (answer != _IGNORED).long()
        with unmetered(model):
            rest = model(
                input_ids=answer[:, :-1].clamp(min=0),
                attention_mask=torch.cat([mask, known[:, :-1]], dim=1),
                past_key_values=prompt.past_key_values,
            ).logits
        logits = torch.cat([prompt.logits, rest], dim=1).float()  # (B, A, V)
        right = ((logits.argmax(dim=-1) == answer) | (known == 0)).all(dim=1)
        losses = functional.cross_entropy(
            logits.mT, answer, reduction="none", ignore_index=_IGNORED
        )
        return right.float(), losses.sum(dim=1) / known.sum(dim=1)

    def _images(self, split: str, indexes: Sequence[int]) -> Tensor:
        return self._pixels[[self.conversations[split][index].image for index in indexes]]

    def _batch(self, split: str, indexes: Sequence[int], pixels: Tensor) -> Batch:
        spelled = [self._spell(self.conversations[split][index]) for index in indexes]
        whole = [[*prompt, *answer] for prompt, _, answer in spelled]
        labels = [[*labels, *answer] for _, labels, answer in spelled]
        prompts = [prompt for prompt, _, _ in spelled]
        return {
            "pixel_values": normalize(pixels),
            "input_ids": pad(whole, self._pad_id),
            "attention_mask": pad_mask(whole),
            "labels": pad(labels, _IGNORED),
            "prompt_ids": pad(prompts, self._pad_id),
            "prompt_mask": pad_mask(prompts),
            "answer_ids": pad([answer for _, _, answer in spelled], _IGNORED),
        }

    def _spell(self, conversation: Conversation) -> tuple[list[int], list[int], list[int]]:
        """Ids of the prompt, its labels, and ids of the last answer."""
        prompt, labels = [int(self._tokenizer.bos_token_id)], [_IGNORED]
        *history, (last, answer) = conversation.turns
        for question, said in history:
            asked, told = self._words(question), self._words(said)
            prompt += [*asked, *told]
            labels += [*([_IGNORED] * len(asked)), *told]
        asked = self._words(last)
        return [*prompt, *asked], [*labels, *([_IGNORED] * len(asked))], self._words(answer)

    def _words(self, text: str) -> list[int]:
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, int(self._tokenizer.sep_token_id)]


def _with_image(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Puts the image's tokens behind the first token of ids and mask, ``(B, N)`` each."""
    count = model.config.image_seq_length
    ids = _behind_first(ids, count, model.config.image_token_id)
    return ids, _behind_first(mask, count, 1)


def _behind_first(rows: Tensor, count: int, value: int) -> Tensor:
    inserted = rows.new_full((rows.shape[0], count), value)
    return torch.cat([rows[:, :1], inserted, rows[:, 1:]], dim=1)


def _padded_in_front(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves padding from behind to the front, so that all prompts end in the last column."""
    padding = (mask == 0).sum(dim=1, keepdim=True)
    order = (torch.arange(ids.shape[1], device=ids.device) - padding) % ids.shape[1]
    return ids.gather(1, order), mask.gather(1, order)
