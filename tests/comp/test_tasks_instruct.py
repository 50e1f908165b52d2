from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from comp.data.openmoji import OpenMoji
from comp.handle import PruningHandle
from comp.models import attach
from comp.models.tokenizer import as_pretrained
from comp.modes import Stream
from comp.tasks.base import Batch
from comp.tasks.instruct import Conversation, InstructTask, make_conversations
from comp.tasks.questions import Question, make_questions
from tests.tiny import check_prediction, llava_config, random_masks, randomise_


def build(openmoji: OpenMoji, tokenizer: Any, **options: Any) -> InstructTask:
    conversations = {
        split: make_conversations(make_questions(openmoji.drawings, split, num_questions=600))
        for split in ("train", "val")
    }
    return InstructTask(conversations, openmoji.pixels, tokenizer, **options)


def tiny_model(tokenizer: Any) -> Any:
    config = llava_config()
    config.vision_config.image_size = 64
    config.text_config.vocab_size = len(tokenizer) + 1
    config.image_token_index = len(tokenizer)
    config.image_seq_length = 64
    return randomise_(LlavaForConditionalGeneration(config), 0)


def pruned(tokenizer: Any) -> PruningHandle:
    handle = attach(tiny_model(tokenizer))
    handle.masks = random_masks(handle)
    handle.thresholds = {Stream.VISION: 0.5, Stream.TEXT: 0.3}
    return handle


def same(first: Batch, second: Batch) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def task(openmoji: OpenMoji, tokenizer: Any) -> InstructTask:
    return build(openmoji, tokenizer)


def test_questions_about_one_image_become_conversations() -> None:
    asked = [Question(i, f"q{n}", f"a{n}", "x") for n, i in enumerate([5, 7, 5, 5, 5, 7])]
    assert make_conversations(asked, num_turns=3) == [
        Conversation(5, (("q0", "a0"), ("q2", "a2"), ("q3", "a3"))),
        Conversation(7, (("q1", "a1"), ("q5", "a5"))),
        Conversation(5, (("q4", "a4"),)),
    ]


def test_a_conversation_of_no_turns_is_refused() -> None:
    with pytest.raises(ValueError, match="num_turns must be at least 1, but got 0"):
        make_conversations([], num_turns=0)


def test_the_data_holds_conversations_of_several_turns(task: InstructTask) -> None:
    for conversations in task.conversations.values():
        assert {len(one.turns) for one in conversations} == {1, 2, 3}


def test_labels_are_the_answers_and_prompts_end_with_the_last_question(
    task: InstructTask, tokenizer: Any
) -> None:
    batch = next(task.batches("val", batch_size=40))
    conversations = task.conversations["val"][:40]
    assert batch["pixel_values"].shape == (40, 3, 64, 64)
    for row, conversation in enumerate(conversations):
        labels = [i for i in batch["labels"][row].tolist() if i != -100]
        said = " [SEP] ".join(answer for _, answer in conversation.turns)
        assert tokenizer.decode(labels) == f"{said} [SEP]"
        prompt = tokenizer.decode(batch["prompt_ids"][row][batch["prompt_mask"][row] == 1])
        question = tokenizer.decode(
            tokenizer(conversation.turns[-1][0], add_special_tokens=False)["input_ids"]
        )
        assert prompt.startswith(tokenizer.bos_token)
        assert prompt.endswith(f"{question} [SEP]")
        answer = [i for i in batch["answer_ids"][row].tolist() if i != -100]
        assert tokenizer.decode(answer) == f"{conversation.turns[-1][1]} [SEP]"


def test_training_batches_from_a_step_equal_skipping_to_it(task: InstructTask) -> None:
    early: Iterator[Batch] = task.train_batches(batch_size=8, seed=1)
    late = task.train_batches(batch_size=8, seed=1, start=9)
    skipped = list(islice(early, 12))[9:]
    assert all(same(a, b) for a, b in zip(skipped, late, strict=False))


def test_an_unknown_split_is_named(task: InstructTask) -> None:
    with pytest.raises(ValueError, match="one of train, val, but got 'dev'"):
        next(task.batches("dev", batch_size=8))


def test_a_tokenizer_that_cannot_begin_a_conversation_is_refused(
    openmoji: OpenMoji, tokenizer: Any
) -> None:
    other = as_pretrained(tokenizer.backend_tokenizer)
    other.bos_token = None
    with pytest.raises(ValueError, match="no bos_token"):
        build(openmoji, other)


def test_a_prediction_has_a_row_for_every_word_of_every_answer(
    task: InstructTask, tokenizer: Any
) -> None:
    """Also where the model drops tokens: answers never are."""
    batch = next(task.train_batches(batch_size=4, seed=0))
    model = pruned(tokenizer).model
    check_prediction(task, model, batch, batch["labels"][batch["labels"] >= 0])


def test_loss_trains_every_part_of_the_stock_model(task: InstructTask, tokenizer: Any) -> None:
    model = tiny_model(tokenizer)
    task.loss(model, next(task.train_batches(batch_size=8, seed=0))).backward()
    for part in (model.model.vision_tower, model.model.multi_modal_projector, model.lm_head):
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        assert sum(gradient.abs().sum() for gradient in gradients) > 0


def whole_sequences(task: InstructTask, batch: Batch, model: Any) -> Iterator[tuple[Tensor, int]]:
    """Ids of every conversation with its image, and where its last answer begins."""
    image = torch.full((model.config.image_seq_length,), model.config.image_token_id)
    for row, mask, prompt in zip(
        batch["input_ids"], batch["attention_mask"], batch["prompt_mask"], strict=True
    ):
        ids = row[mask == 1]
        yield torch.cat([ids[:1], image, ids[1:]]), len(image) + int(prompt.sum())


@torch.no_grad()
@pytest.mark.parametrize("attached", [False, True])
def test_scores_are_those_of_one_pass_over_the_whole_conversation(
    task: InstructTask, tokenizer: Any, attached: bool
) -> None:
    model = pruned(tokenizer).model if attached else tiny_model(tokenizer)
    batch = next(task.batches("val", batch_size=6))
    _, losses = task.score(model, batch)
    for row, (ids, start) in enumerate(whole_sequences(task, batch, model)):
        extra = {"prompt_length": start} if attached else {}
        logits = model(
            input_ids=ids[None], pixel_values=batch["pixel_values"][row : row + 1], **extra
        ).logits[0]
        expected = functional.cross_entropy(logits[start - 1 : -1], ids[start:])
        torch.testing.assert_close(losses[row], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_answer_is_right_when_generate_writes_it(task: InstructTask, tokenizer: Any) -> None:
    """The model's own answers are put in as the truth, with one token changed in some."""
    model: Any = pruned(tokenizer).model
    batch = next(task.batches("val", batch_size=6))
    for row, (ids, start) in enumerate(whole_sequences(task, batch, model)):
        written = model.generate(
            input_ids=ids[None, :start],
            pixel_values=batch["pixel_values"][row : row + 1],
            max_new_tokens=2,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, start:]
        batch["answer_ids"][row, :2] = written
        batch["answer_ids"][row, 2:] = -100
    batch["answer_ids"][1::2, 1] = (batch["answer_ids"][1::2, 1] + 1) % 50
    right, _ = task.score(model, batch)
    assert right.tolist() == [1, 0, 1, 0, 1, 0]


@torch.no_grad()
def test_scores_and_cost_do_not_depend_on_batch_mates(task: InstructTask, tokenizer: Any) -> None:
    handle = pruned(tokenizer)
    found = []
    for size in (6, 1):
        with handle.metering() as meter:
            scores = [
                task.score(handle.model, batch)[1]
                for batch in task.batches("val", batch_size=size, num_samples=6)
            ]
        meter.num_samples = 6
        macs = meter.measurement(handle.groups.values(), handle.alive()).total_macs
        found.append((torch.cat(scores), macs))
    (together, cost), (alone, same_cost) = found
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert cost == same_cost


@torch.no_grad()
def test_only_the_prompt_is_counted(task: InstructTask, tokenizer: Any) -> None:
    handle = pruned(tokenizer)
    batch = next(task.batches("val", batch_size=1))
    with handle.metering() as scored:
        task.score(handle.model, batch)
    (ids, start) = next(whole_sequences(task, batch, handle.model))
    with handle.metering() as prompt:
        handle.model(
            input_ids=ids[None, :start], pixel_values=batch["pixel_values"], logits_to_keep=1
        )
    scored.num_samples = prompt.num_samples = 1
    groups, alive = list(handle.groups.values()), handle.alive()
    assert (
        scored.measurement(groups, alive).total_macs
        == prompt.measurement(groups, alive).total_macs
    )
