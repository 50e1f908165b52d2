"""Captioning: batches, loss, generation, and pruning through all its four modes."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from comp.config import PruningConfig
from comp.data.layout import EncodedImage, Row
from comp.data.openmoji import load_openmoji
from comp.evaluation import evaluate
from comp.finetune import make_optimizer, train_step
from comp.models import attach
from comp.models.blip_build import BlipShape, build_blip
from comp.modes import PruningMode
from comp.pruner import Pruner
from comp.results import StageRecord
from comp.tasks import build_task
from comp.tasks.captioning import CaptioningTask
from comp.tasks.captions import CaptionedImage, stored_captions
from comp.tasks.text import build_tokenizer
from tests.tiny import check_prediction

SHAPE = BlipShape(width=32, heads=4, vision_layers=2, text_layers=2, image_size=64, patch_size=16)
FAST: dict[str, Any] = {"eval_samples": 16, "test_samples": 16, "eval_batch_size": 16}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="module")
def task(tokenizer: Any) -> Any:
    return build_task("captioning", tokenizer=tokenizer, image_size=64, num_train=200)


def small(tokenizer: Any) -> Any:
    model = build_blip("captioning", SHAPE, tokenizer, seed=0)
    attach(model).stock_when_idle = False
    return model


def two_images(tokenizer: Any, **options: Any) -> CaptioningTask:
    drawings = load_openmoji(64).pixels[:2]
    samples = [CaptionedImage(0, ("a flag", "a person")), CaptionedImage(1, ("a drink",))]

    def pixels(chosen: Any) -> Tensor:
        return drawings[list(chosen)]

    return CaptioningTask(
        {"train": samples, "val": samples, "test": samples}, pixels, tokenizer, **options
    )


def test_the_loss_is_that_of_the_stock_model(task: Any, tokenizer: Any) -> None:
    model = small(tokenizer).eval()
    assert model.text_decoder.label_smoothing == 0.1
    batch = next(task.train_batches(batch_size=6, seed=0))
    stock = model(
        pixel_values=batch["pixel_values"],
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
    ).loss
    torch.testing.assert_close(task.loss(model, batch), stock)


def test_a_prediction_has_a_row_for_every_word_behind_the_prompt(tokenizer: Any) -> None:
    task = two_images(tokenizer, prompt="a picture of", smoothing=0.0)
    batch = next(task.train_batches(batch_size=2, seed=0))
    words = batch["labels"][:, 1:]
    check_prediction(task, small(tokenizer).eval(), batch, words[words >= 0])


def test_the_prompt_is_given_and_not_predicted(tokenizer: Any) -> None:
    batch = next(two_images(tokenizer, prompt="a picture of").batches("val", batch_size=2))
    text = tokenizer.decode(batch["input_ids"][0])
    assert text.startswith("[DEC] a")
    assert "flag [SEP]" in text
    predicted = batch["labels"][0][batch["labels"][0] >= 0]
    assert tokenizer.decode(predicted) == "a flag [SEP]"


def test_all_references_of_an_image_judge_what_is_said(tokenizer: Any) -> None:
    task = two_images(tokenizer)
    batch = next(task.batches("val", batch_size=2))

    def said(*texts: str) -> Tensor:
        rows = torch.full((len(texts), 20), -100)
        for row, text in enumerate(texts):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            rows[row, : len(ids)] = torch.tensor(ids)
        return rows

    losses = torch.zeros(2)
    first, _ = task.score_features(said("a flag", "a drink"), batch["references"], losses)
    second, _ = task.score_features(said("a person", "a drink"), batch["references"], losses)
    wrong, _ = task.score_features(said("a drink", "a person"), batch["references"], losses)
    assert first[0] > 0
    assert second[0] > 0
    assert wrong.max() < min(float(first[0]), float(second[0]))


def test_training_captions_are_a_function_of_seed_and_step(task: Any) -> None:
    steps = list(itertools.islice(task.train_batches(batch_size=4, seed=3), 3))
    again = next(task.train_batches(batch_size=4, seed=3, start=2))
    for name, value in steps[2].items():
        torch.testing.assert_close(again[name], value)


def test_a_model_learns_to_tell_two_images_apart(tokenizer: Any) -> None:
    task = two_images(tokenizer, min_words=1, max_words=4, augment=False)
    model = small(tokenizer).train()
    config = PruningConfig(learning_rate=3e-3)
    optimizer = make_optimizer(model, config)
    same = itertools.repeat(next(task.batches("train", batch_size=2)))
    for _ in range(60):
        train_step(model, task, same, optimizer, config)
    model.eval()
    pixels = next(task.batches("val", batch_size=2))["pixel_values"]
    assert task.caption(model, pixels) == ["a flag", "a drink"]
    verdict, _ = evaluate(model, task, "val", batch_size=1)
    assert verdict.metric > 100  # CIDEr, times 100


def test_the_cost_does_not_depend_on_what_is_generated(task: Any, tokenizer: Any) -> None:
    model = small(tokenizer).eval()
    costs = []
    for words in (2, 12):
        task._max_words, task._min_words = words, words
        costs.append(evaluate(model, task, "val", batch_size=8, num_samples=8)[1].total_macs)
    assert costs[0] == costs[1]
    task._max_words, task._min_words = 20, 5


def test_pruning_runs_through_the_four_modes(task: Any, tokenizer: Any) -> None:
    config = PruningConfig(
        ratios=(0.3,),
        num_stages=6,
        steps_per_stage=1,
        fine_tune_steps=2,
        batch_size=4,
        calibration_samples=8,
        probe_samples=8,
        device="cpu",
        **FAST,
    )
    pruner = Pruner(build_blip("captioning", SHAPE, tokenizer, seed=0), task, config)
    modes = [mode for mode in PruningMode if mode is not PruningMode.LANGUAGE_TOKENS]
    assert pruner.modes == modes
    records = list(pruner.run())
    assert {r.mode for r in records if isinstance(r, StageRecord)} >= set(modes[:3])
    assert pruner.points[-1].ratio_reached == pytest.approx(0.3, abs=0.02)


def test_stored_captions_lose_the_marks_that_blip_never_sees() -> None:
    row = Row("7", "train", images=(EncodedImage(b""),), texts=("A dog; it barks!", "..."))
    assert stored_captions(row).captions == ("a dog it barks", "...")
