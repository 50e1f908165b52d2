"""Visual instructions: conversations about an image, answers written by a LLaVA.

A conversation is one sequence, the same for every turn; ``comp.tasks.dialogue`` says how it is
spelled.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
from comp.tasks.dialogue import dialogue_of
from comp.tasks.questions import Question
from comp.tasks.text import TextTokenizer, pad, pad_mask, word_prediction

_IGNORED = -100  # what the loss leaves out


@dataclass(frozen=True)
class Conversation:
    """Questions about one image with their answers.

    Attributes:
        image: Index of the image, or ``None``.
        turns: Question and answer of every turn.
    """

    image: int | None
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class StoredConversation:
    """Turns about one encoded image, or about none.

    Attributes:
        image: The image, or ``None``.
        turns: What the human and the model said, by turns.
    """

    image: EncodedImage | None
    turns: tuple[tuple[str, str], ...]


AnyConversation = Conversation | StoredConversation


def stored_conversation(row: Row) -> StoredConversation:
    """Makes a conversation of a row of kind ``conversations``."""
    image = row.images[0] if row.images else None
    return StoredConversation(image, tuple(zip(row.texts, row.labels, strict=True)))


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


class InstructTask(BatchedTask[AnyConversation]):
    """Conversations about one image each or none; the answer to the last question is judged.

    The model is called like the stock ``LlavaForConditionalGeneration``; the task puts the
    image's tokens where the dialogue has them, as many as the model's config says. Training learns
    the answers of all turns. An answer counts as right when greedy decoding writes it word for
    word, behind a history of true answers.

    Args:
        conversations: Conversations by split.
        pixels: All images, 0..255, ``(U, 3, H, W)``, uint8, or where to decode them.
        tokenizer: The model's tokenizer.
        augment: Whether training images are shifted and scaled a little.
        flip: Whether it also mirrors half of them; wrong where texts speak of left or right.
    """

    name = "instruct"
    metric_name = "exact match"

    def __init__(
        self,
        conversations: Mapping[str, Sequence[Conversation] | Streamed[StoredConversation]],
        pixels: Tensor | Images,
        tokenizer: TextTokenizer,
        *,
        augment: bool = True,
        flip: bool = True,
    ) -> None:
        super().__init__(conversations, augment=augment, flip=flip)
        self.conversations = self.samples
        self._pixels = pixels if isinstance(pixels, Images) else Images(pixels)
        self._pad_id = int(tokenizer.pad_token_id or 0)
        self._dialogue = dialogue_of(tokenizer)
        self._image_place = self._dialogue.image_place

    def _judge(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Callable[[], Prediction]]:
        """Returns the mean cross-entropy of all answers' tokens."""
        shown = batch["has_image"]
        place = self._image_place
        ids, mask = _with_image(model, batch["input_ids"], batch["attention_mask"], shown, place)
        unlabelled = ids.shape[1] - batch["labels"].shape[1]
        labels = _inserted(batch["labels"], place, unlabelled, _IGNORED, shown, _IGNORED)
        said = model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=_given(batch["pixel_values"]),
            labels=labels,
            use_cache=False,
        )
        return said.loss, lambda: word_prediction(said.logits[:, :-1], labels[:, 1:])

    def score(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns whether greedy decoding writes the last answer, and its mean cross-entropy.

        The prompt is read once; then the true answer runs through the cache. Greedy decoding
        writes the answer if and only if every token of it is the likeliest behind the true ones
        before it. The metered cost is that of reading the prompt, first answer token included.
        """
        from comp.blocks import unmetered

        ids, mask = _with_image(
            model,
            batch["prompt_ids"],
            batch["prompt_mask"],
            batch["has_image"],
            self._image_place,
        )
        ids, mask = _padded_in_front(ids, mask)
        prompt = model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=_given(batch["pixel_values"]),
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

    def _images(self, told: Sequence[AnyConversation]) -> Tensor:
        """Returns the images of the conversations that have one."""
        found = [one.image for one in told if one.image is not None]
        return self._pixels(found) if found else torch.zeros(0, 3, 1, 1, dtype=torch.uint8)

    def _batch(
        self, told: Sequence[AnyConversation], pixels: Tensor, drawn: tuple[int, int] | None = None
    ) -> Batch:
        spelled = [self._spell(one) for one in told]
        whole = [[*prompt, *answer] for prompt, _, answer in spelled]
        labels = [[*labels, *answer] for _, labels, answer in spelled]
        prompts = [prompt for prompt, _, _ in spelled]
        return {
            "input_ids": pad(whole, self._pad_id),
            "attention_mask": pad_mask(whole),
            "labels": pad(labels, _IGNORED),
            "prompt_ids": pad(prompts, self._pad_id),
            "prompt_mask": pad_mask(prompts),
            "answer_ids": pad([answer for _, _, answer in spelled], _IGNORED),
            "has_image": torch.tensor([one.image is not None for one in told]),
            "pixel_values": normalize(pixels),  # of those that have one
        }

    def _spell(self, conversation: AnyConversation) -> tuple[list[int], list[int], list[int]]:
        """Ids of the prompt, its labels, and ids of the last answer."""
        prompt: list[int] = []
        labels: list[int] = []
        *history, (last, answer) = conversation.turns
        spell, has_image = self._dialogue, conversation.image is not None
        for question, said in history:
            asked = spell.question(question, is_first=not prompt, has_image=has_image)
            told = spell.answer(said)
            prompt += [*asked, *told]
            labels += [*([_IGNORED] * len(asked)), *told]
        asked = spell.question(last, is_first=not prompt, has_image=has_image)
        return (
            [*prompt, *asked],
            [*labels, *([_IGNORED] * len(asked))],
            spell.answer(answer),
        )


def _given(pixels: Tensor) -> Tensor | None:
    return pixels if len(pixels) else None


def _with_image(
    model: Any, ids: Tensor, mask: Tensor, shown: Tensor, place: int
) -> tuple[Tensor, Tensor]:
    """Puts the image's tokens behind the first ``place`` tokens of ids and mask, ``(B, N)`` each.

    Rows without an image, ``shown`` being false, are padded behind instead.
    """
    count, token, padding = model.config.image_seq_length, model.config.image_token_id, 0
    if not bool(shown.any()):
        return ids, mask
    ids = _inserted(ids, place, count, token, shown, padding)
    return ids, _inserted(mask, place, count, 1, shown, 0)


def _inserted(
    rows: Tensor, place: int, count: int, value: int, shown: Tensor, padding: int
) -> Tensor:
    block = rows.new_full((rows.shape[0], count), value)
    inserted = torch.cat([rows[:, :place], block, rows[:, place:]], dim=1)
    padded = torch.cat([rows, torch.full_like(block, padding)], dim=1)
    return torch.where(shown[:, None], inserted, padded)


def _padded_in_front(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves padding from behind to the front, so that all prompts end in the last column."""
    padding = (mask == 0).sum(dim=1, keepdim=True)
    order = (torch.arange(ids.shape[1], device=ids.device) - padding) % ids.shape[1]
    return ids.gather(1, order), mask.gather(1, order)
