from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import BlipConfig, BlipForQuestionAnswering

from comp.data.layout import EncodedImage
from comp.data.openmoji import OpenMoji
from comp.models.tokenizer import as_pretrained
from comp.tasks.base import Batch
from comp.tasks.questions import all_answers, make_questions
from comp.tasks.text import tokenizer_from_texts
from comp.tasks.vqa import StoredQuestion, VqaTask
from tests.tiny import check_prediction


def build(openmoji: OpenMoji, tokenizer: Any, **options: Any) -> VqaTask:
    questions = {
        split: make_questions(openmoji.drawings, split, num_questions=60)
        for split in ("train", "val")
    }
    answers = all_answers(openmoji.drawings)
    return VqaTask(questions, openmoji.pixels, answers, tokenizer, **options)


def tiny_model(tokenizer: Any, *, spread: float = 0.5) -> BlipForQuestionAnswering:
    torch.manual_seed(0)
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = BlipConfig(
        text_config={
            **shared,
            "num_hidden_layers": 2,
            "encoder_hidden_size": 32,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 64,
            "bos_token_id": tokenizer.bos_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_range": spread,
        },
        vision_config={**shared, "num_hidden_layers": 2, "image_size": 64, "patch_size": 16},
    )
    return BlipForQuestionAnswering(config).eval()


def same(first: Batch, second: Batch) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def task(openmoji: OpenMoji, tokenizer: Any) -> VqaTask:
    return build(openmoji, tokenizer)


@pytest.fixture(scope="module")
def spelling(openmoji: OpenMoji) -> tuple[VqaTask, Any]:
    """A task whose answers have several tokens, and its tokenizer."""
    tokenizer = as_pretrained(tokenizer_from_texts(["is this a thing?"]))
    return build(openmoji, tokenizer, top_k=1000), tokenizer


def test_a_batch_holds_what_the_stock_model_takes(task: VqaTask, tokenizer: Any) -> None:
    batch = next(task.batches("val", batch_size=8))
    assert batch["pixel_values"].shape == (8, 3, 64, 64)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert (batch["input_ids"] != 0).equal(batch["attention_mask"].bool())
    for labels, index in zip(
        batch["labels"].tolist(), batch["answer_index"].tolist(), strict=True
    ):
        answer = tokenizer.convert_tokens_to_ids(task.answers[index])
        assert labels == [tokenizer.bos_token_id, answer, tokenizer.sep_token_id]


def test_training_batches_from_a_step_equal_skipping_to_it(task: VqaTask) -> None:
    early: Iterator[Batch] = task.train_batches(batch_size=8, seed=1)
    late = task.train_batches(batch_size=8, seed=1, start=9)
    skipped = list(islice(early, 12))[9:]
    assert all(same(a, b) for a, b in zip(skipped, late, strict=False))


def test_a_split_comes_whole_and_in_one_order(task: VqaTask) -> None:
    batches = list(task.batches("val", batch_size=25))
    assert [len(batch["labels"]) for batch in batches] == [25, 25, 10]
    assert same(batches[0], next(task.batches("val", batch_size=25)))


def test_the_first_samples_are_those_of_the_whole_split(task: VqaTask) -> None:
    few = list(task.batches("val", batch_size=8, num_samples=10))
    whole = next(task.batches("val", batch_size=10))
    index = torch.cat([batch["answer_index"] for batch in few])
    assert torch.equal(index, whole["answer_index"])


def test_an_unknown_split_is_named(task: VqaTask) -> None:
    with pytest.raises(ValueError, match="one of train, val, but got 'dev'"):
        next(task.batches("dev", batch_size=8))


def test_a_tokenizer_that_cannot_begin_an_answer_is_refused(
    openmoji: OpenMoji, tokenizer: Any
) -> None:
    other = as_pretrained(tokenizer.backend_tokenizer)
    other.bos_token = None
    with pytest.raises(ValueError, match="no bos_token"):
        build(openmoji, other)


def test_a_prediction_has_a_row_for_every_word_of_every_answer(
    task: VqaTask, tokenizer: Any
) -> None:
    batch = next(task.train_batches(batch_size=8, seed=0))
    words = batch["answers"][batch["answer_weights"] > 0][:, 1:]
    check_prediction(task, tiny_model(tokenizer), batch, words[words >= 0])


def test_loss_trains_every_part_of_the_stock_model(task: VqaTask, tokenizer: Any) -> None:
    model = tiny_model(tokenizer)
    task.loss(model, next(task.train_batches(batch_size=8, seed=0))).backward()
    for part in (model.vision_model, model.text_encoder, model.text_decoder):
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        assert sum(gradient.abs().sum() for gradient in gradients) > 0


@torch.no_grad()
def test_the_loss_is_the_sum_of_the_answers_losses_by_their_share_of_people(
    spelling: tuple[VqaTask, Any],
) -> None:
    task, tokenizer = spelling
    model = tiny_model(tokenizer).eval()
    image = EncodedImage(path="0")
    asked = [
        StoredQuestion("1", image, "what is it", ("flag", "person", "red"), (7, 2, 1)),
        StoredQuestion("2", image, "what colour", ("dark skin",), (10,)),
    ]
    pixels = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    batch = task._batch(asked, pixels)
    expected = 0.0
    for row, one in enumerate(asked):
        for answer, count in zip(one.answers, one.counts, strict=True):
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            labels = torch.tensor([[tokenizer.bos_token_id, *ids, tokenizer.sep_token_id]])
            mean = model(
                input_ids=batch["input_ids"][row : row + 1],
                attention_mask=batch["attention_mask"][row : row + 1],
                pixel_values=batch["pixel_values"][row : row + 1],
                labels=labels,
            ).loss
            expected += count / 10 * float(mean) * (labels.shape[1] - 1) / 2
    assert float(task.loss(model, batch)) == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_one_token_answers_are_ranked_by_the_first_step(task: VqaTask, tokenizer: Any) -> None:
    model = tiny_model(tokenizer)
    batch = next(task.batches("val", batch_size=30))
    right, loss = task.score(model, batch)
    logits = model.text_decoder(
        input_ids=batch["labels"][:, :1],
        encoder_hidden_states=model.text_encoder(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            encoder_hidden_states=model.vision_model(batch["pixel_values"]).last_hidden_state,
        ).last_hidden_state,
    ).logits[:, 0]
    answers = torch.tensor(tokenizer.convert_tokens_to_ids(list(task.answers)))
    guess = logits[:, answers].argmax(1)
    assert torch.equal(right, (guess == batch["answer_index"]).float())
    expected = functional.cross_entropy(logits, batch["labels"][:, 1], reduction="none")
    torch.testing.assert_close(loss, expected)


@torch.no_grad()
def test_longer_answers_are_ranked_by_all_their_tokens(spelling: tuple[VqaTask, Any]) -> None:
    task, tokenizer = spelling
    model = tiny_model(tokenizer)
    batch = next(task.batches("val", batch_size=3))
    right, loss = task.score(model, batch)
    for i in range(3):
        # The naive way: the stock forward on every answer of the list.
        costs = []
        for answer in task.answers:
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            labels = torch.tensor([[tokenizer.bos_token_id, *ids, tokenizer.sep_token_id]])
            mean = model(
                input_ids=batch["input_ids"][i : i + 1],
                attention_mask=batch["attention_mask"][i : i + 1],
                pixel_values=batch["pixel_values"][i : i + 1],
                labels=labels,
            ).loss
            costs.append(mean * (labels.shape[1] - 1))
        costs = torch.stack(costs)
        index = batch["answer_index"][i]
        assert right[i] == (costs.argmin() == index)
        torch.testing.assert_close(loss[i], costs[index], rtol=1e-4, atol=1e-4)


def test_a_model_that_learnt_the_answers_scores_one(task: VqaTask, tokenizer: Any) -> None:
    model = tiny_model(tokenizer, spread=0.02)
    batch = next(task.batches("val", batch_size=4))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    with torch.no_grad():
        right, loss = task.score(model, batch)
    assert right.tolist() == [1.0] * 4
    assert loss.max() < 1.0
