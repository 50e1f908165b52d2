from itertools import islice
from typing import Any

import pytest
import torch
from transformers import BlipConfig

from comp.data.openmoji import OpenMoji
from comp.models.blip_nlvr import BlipForNLVR
from comp.tasks.base import Batch
from comp.tasks.nlvr import NlvrTask
from comp.tasks.statements import make_statements
from tests.tiny import check_prediction


@pytest.fixture(scope="module")
def task(openmoji: OpenMoji, tokenizer: Any) -> NlvrTask:
    statements = {
        split: make_statements(openmoji.drawings, split, num_statements=60)
        for split in ("train", "val")
    }
    return NlvrTask(statements, openmoji.pixels, tokenizer)


def same(first: Batch, second: Batch) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def tiny_model(tokenizer: Any) -> BlipForNLVR:
    torch.manual_seed(0)
    shared = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    }
    return BlipForNLVR(
        BlipConfig(
            text_config={
                **shared,
                "encoder_hidden_size": 32,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": 64,
            },
            vision_config={**shared, "image_size": 64, "patch_size": 16},
        )
    ).eval()


def test_a_prediction_has_a_row_for_every_statement(task: NlvrTask, tokenizer: Any) -> None:
    batch = next(task.train_batches(batch_size=8, seed=0))
    check_prediction(task, tiny_model(tokenizer), batch, batch["labels"])


def test_a_batch_holds_two_images_a_statement(task: NlvrTask) -> None:
    batch = next(task.batches("val", batch_size=8))
    assert batch["pixel_values"].shape == (8, 2, 3, 64, 64)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert set(batch["labels"].tolist()) <= {0, 1}


def test_left_comes_before_right(task: NlvrTask, openmoji: OpenMoji) -> None:
    pixels = next(task.batches("val", batch_size=8))["pixel_values"]
    raw = openmoji.pixels.float()
    for i, statement in enumerate(task.statements["val"][:8]):
        for side, image in enumerate(statement.images):
            dark = raw[image].mean((1, 2)) / 255.0
            seen = pixels[i, side].mean((1, 2))
            std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
            mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
            torch.testing.assert_close(seen * std + mean, dark, rtol=1e-4, atol=1e-4)


def test_training_batches_from_a_step_equal_skipping_to_it(task: NlvrTask) -> None:
    skipped = list(islice(task.train_batches(batch_size=8, seed=1), 12))[9:]
    late = task.train_batches(batch_size=8, seed=1, start=9)
    assert all(same(a, b) for a, b in zip(skipped, late, strict=False))


def test_evaluation_shows_the_same_pairs_in_the_same_order_every_time(task: NlvrTask) -> None:
    first, second = (next(task.batches("val", batch_size=4)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_unknown_split_is_named(task: NlvrTask) -> None:
    with pytest.raises(ValueError, match="one of train, val, but got 'dev'"):
        next(task.batches("dev", batch_size=8))


@torch.no_grad()
def test_score_agrees_with_the_logits(task: NlvrTask, tokenizer: Any) -> None:
    model = tiny_model(tokenizer)
    batch = next(task.batches("val", batch_size=12))
    right, loss = task.score(model, batch)
    output = model(**batch)
    assert torch.equal(right, (output.logits.argmax(1) == batch["labels"]).float())
    torch.testing.assert_close(loss.mean(), output.loss)


def test_loss_is_the_models_own(task: NlvrTask, tokenizer: Any) -> None:
    model = tiny_model(tokenizer)
    batch = next(task.train_batches(batch_size=8, seed=0))
    torch.testing.assert_close(task.loss(model, batch), model(**batch).loss)
