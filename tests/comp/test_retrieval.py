"""Retrieval: features of a split against each other, whatever the batches were."""

import itertools
import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, SiglipModel

from comp.config import PruningConfig
from comp.cost import Measurement
from comp.data.openmoji import OpenMoji
from comp.evaluation import evaluate
from comp.finetune import make_optimizer, train_step
from comp.models import attach
from comp.models.blip_build import BlipShape
from comp.models.clip_build import build_clip
from comp.modes import PruningMode, Stream
from comp.pruner import Pruner
from comp.results import CurvePoint
from comp.tasks.base import Batch, SplitTask
from comp.tasks.captions import CaptionedImage
from comp.tasks.questions import make_questions
from comp.tasks.retrieval import RetrievalTask, compare
from comp.tasks.scenes import make_scenes, render_scenes
from comp.tasks.vqa import VqaTask
from comp.train import RECIPES
from tests.tiny import randomise_, siglip_config

TINY = BlipShape(width=16, heads=2, vision_layers=2, text_layers=2, image_size=64, patch_size=16)


@pytest.fixture(scope="module")
def task(openmoji: OpenMoji, tokenizer: Any) -> RetrievalTask:
    samples = {
        split: [
            CaptionedImage(scene, scene.captions)
            for scene in make_scenes(openmoji.drawings, split, num_scenes=40)
        ]
        for split in ("train", "val", "test")
    }

    def images(scenes: Sequence[Any]) -> Tensor:
        return render_scenes(scenes, openmoji.pixels)

    return RetrievalTask(samples, images, tokenizer)


def tiny_clip(tokenizer: Any) -> CLIPModel:
    model = build_clip(TINY, tokenizer)
    randomise_(model, 0)
    return model


def metric_of(features: Tensor, texts: Tensor) -> list[float]:
    values: list[float] = compare(features, texts)[0].tolist()
    return values


def test_a_sample_is_an_image_with_three_captions(task: RetrievalTask) -> None:
    batch = next(task.batches("val", batch_size=8))
    assert batch["pixel_values"].shape == (8, 3, 64, 64)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["input_ids"].shape[:2] == (8, 3)


def test_training_takes_one_caption_of_each_image_in_turn(task: RetrievalTask) -> None:
    batches = list(islice(task.train_batches(batch_size=8, seed=0), 3))
    assert all(batch["input_ids"].shape[:2] == (8, 1) for batch in batches)


def test_training_goes_on_where_it_stopped(task: RetrievalTask) -> None:
    whole = list(islice(task.train_batches(batch_size=12, seed=3), 6))
    rest = list(islice(task.train_batches(batch_size=12, seed=3, start=4), 2))
    for first, second in zip(whole[4:], rest, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_unknown_split_is_named(task: RetrievalTask) -> None:
    with pytest.raises(ValueError, match="one of train, val, test, but got 'dev'"):
        next(task.batches("dev", batch_size=1))


def test_captions_that_are_not_there_neither_find_nor_are_found(tokenizer: Any) -> None:
    images = torch.eye(2)
    texts = torch.stack([torch.eye(2), torch.eye(2)[[1, 1]] * 0.5])
    texts[0, 1] = 9 * images[1]  # would win every search of the second image
    known = torch.tensor([[True, False], [True, True]])
    assert compare(images, texts, known)[0].mean() == 1.0
    texts[1, 1] = images[0]  # one caption of three names the wrong image
    assert compare(images, texts, known)[0].mean() == pytest.approx((1 + 2 / 3) / 2)


def test_a_loss_over_captions_that_are_there_is_that_without_the_others() -> None:
    images, texts = torch.randn(3, 4), torch.randn(3, 2, 4)
    known = torch.tensor([[True, False]] * 3)
    torch.testing.assert_close(compare(images, texts, known), compare(images, texts[:, :1]))


def test_a_perfect_model_finds_everything() -> None:
    images = torch.eye(5)
    assert metric_of(images, images[:, None].expand(-1, 3, -1)) == [1.0] * 5


def test_any_caption_of_its_own_is_right_for_an_image() -> None:
    images = torch.eye(2)
    texts = torch.stack([torch.eye(2), torch.eye(2)[[1, 1]]])  # the first image's second is wrong
    texts[0, 1] = torch.tensor([0.0, 0.9])
    assert metric_of(images, texts) == [0.75, 1.0]


def test_the_loss_with_one_caption_is_clips() -> None:
    images, texts = torch.randn(2, 7, 4)
    logits, target = images @ texts.T, torch.arange(7)
    both = functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
    torch.testing.assert_close(compare(images, texts[:, None])[1].mean(), both / 2)


def test_chunks_change_nothing() -> None:
    images, texts = torch.randn(11, 4), torch.randn(11, 3, 4)
    whole, parts = compare(images, texts), compare(images, texts, chunk=4)
    torch.testing.assert_close(parts, whole)


def test_the_similarities_are_bounded(task: RetrievalTask, tokenizer: Any) -> None:
    model = tiny_clip(tokenizer)
    batch = next(task.batches("val", batch_size=4))
    torch.nn.init.constant_(model.logit_scale, 50.0)
    images, _, _ = task.features(model, batch)
    torch.testing.assert_close(images.norm(dim=1), torch.full((4,), 100.0))


def evaluate_in(task: RetrievalTask, tokenizer: Any, batch_size: int) -> tuple[Any, Measurement]:
    model = tiny_clip(tokenizer)
    handle = attach(model)
    handle.thresholds = {Stream.VISION: 0.7, Stream.TEXT: 0.7}
    return evaluate(model, task, "val", batch_size=batch_size)


def test_neither_metric_nor_loss_nor_cost_depends_on_the_batches(
    task: RetrievalTask, tokenizer: Any
) -> None:
    verdict, cost = evaluate_in(task, tokenizer, 40)
    for batch_size in (1, 7):
        other, other_cost = evaluate_in(task, tokenizer, batch_size)
        assert (other.metric, other.num_samples) == (verdict.metric, 40)
        assert other.loss == pytest.approx(verdict.loss, rel=1e-4)
        assert other_cost == cost


def test_a_sample_costs_one_image_and_one_caption(task: RetrievalTask, tokenizer: Any) -> None:
    model = tiny_clip(tokenizer)
    handle = attach(model)
    _, measured = evaluate(model, task, "val", num_samples=1)
    batch = next(task.batches("val", batch_size=1))
    with torch.no_grad(), handle.metering() as meter:
        model.get_image_features(batch["pixel_values"])
        model.get_text_features(batch["input_ids"][:, 0], batch["attention_mask"][:, 0])
    meter.num_samples = 1
    assert measured == meter.measurement(handle.groups.values(), handle.alive())


def test_a_model_of_random_weights_is_near_chance(task: RetrievalTask, tokenizer: Any) -> None:
    assert evaluate_in(task, tokenizer, 40)[0].metric < 20


def test_only_tasks_with_features_are_judged_by_the_split(
    task: RetrievalTask, openmoji: OpenMoji, tokenizer: Any
) -> None:
    questions = make_questions(openmoji.drawings, "val", num_questions=4)
    vqa = VqaTask({"val": questions}, openmoji.pixels, ["yes"], tokenizer)
    assert isinstance(task, SplitTask)
    assert not isinstance(vqa, SplitTask)


def test_siglip_runs_it_too(task: RetrievalTask, tokenizer: Any) -> None:
    config = siglip_config()
    config.text_config.vocab_size = len(tokenizer)
    config.text_config.max_position_embeddings = 64
    config.vision_config.image_size = 64
    model = randomise_(SiglipModel(config), 0)
    attach(model)
    verdict, _ = evaluate(model, task, "val", num_samples=8)
    assert math.isfinite(verdict.loss)


def test_a_few_steps_lower_the_loss(task: RetrievalTask, tokenizer: Any) -> None:
    model = build_clip(TINY, tokenizer)
    attach(model).stock_when_idle = False
    config = PruningConfig(learning_rate=2e-3)
    optimizer = make_optimizer(model, config)
    batch: Batch = next(task.train_batches(batch_size=16, seed=0))
    losses = [
        train_step(model, task, itertools.repeat(batch), optimizer, config) for _ in range(25)
    ]
    assert losses[-1] < losses[0] - 0.5


def test_a_clip_is_pruned_by_all_four_modes(task: RetrievalTask, tokenizer: Any) -> None:
    config = PruningConfig(
        ratios=(0.4,),
        num_stages=6,
        steps_per_stage=2,
        fine_tune_steps=2,
        batch_size=8,
        eval_samples=16,
        calibration_samples=16,
        probe_samples=8,
        device="cpu",
    )
    pruner = Pruner(build_clip(TINY, tokenizer), task, config)
    records = list(pruner.run())
    assert {record.mode for record in pruner.stages[:4]} == {
        mode.value for mode in PruningMode if mode is not PruningMode.CROSS_PARAMS
    }
    assert isinstance(records[-1], CurvePoint)
    assert records[-1].ratio_reached == pytest.approx(0.4, abs=0.03)


def test_the_recipe_names_this_task() -> None:
    assert RECIPES["clip-tiny-retrieval"].task == "retrieval"
