"""Retrieval: features of a split against each other, whatever the batches were."""

import itertools
import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BlipForImageTextRetrieval, CLIPModel, SiglipModel

from comp.checkpoint import load_pruned, save_pruned
from comp.config import PruningConfig
from comp.cost import Measurement
from comp.data.openmoji import OpenMoji
from comp.distillation import Teacher
from comp.evaluation import evaluate
from comp.finetune import make_optimizer, train_step
from comp.models import attach, detach
from comp.models.blip_build import BlipShape, build_blip
from comp.models.clip_build import build_clip
from comp.modes import PruningMode, Stream
from comp.pruner import Pruner
from comp.results import CurvePoint
from comp.tasks.base import Batch, ReportingTask, SplitTask
from comp.tasks.captions import CaptionedImage
from comp.tasks.encoders import (
    add_temperature_,
    encode_images,
    encode_texts,
    match_logits,
    similarity_factor,
)
from comp.tasks.questions import make_questions
from comp.tasks.retrieval import RetrievalTask
from comp.tasks.scenes import make_scenes, render_scenes
from comp.tasks.vqa import VqaTask
from comp.train import RECIPES
from tests.tiny import check_prediction, randomise_, siglip_config

TINY = BlipShape(width=16, heads=2, vision_layers=2, text_layers=2, image_size=64, patch_size=16)


@pytest.fixture(scope="module")
def task(openmoji: OpenMoji, tokenizer: Any) -> RetrievalTask:
    samples = {
        split: [
            CaptionedImage(scene, scene.captions, index)
            for index, scene in enumerate(make_scenes(openmoji.drawings, split, num_scenes=40))
        ]
        for split in ("train", "val", "test")
    }
    return RetrievalTask(
        samples,
        lambda scenes: render_scenes(scenes, openmoji.pixels),
        tokenizer,
        queue=20,
        top=5,
    )


def tiny_clip(tokenizer: Any) -> CLIPModel:
    model = build_clip(TINY, tokenizer)
    randomise_(model, 0)
    return model


def tiny_blip(tokenizer: Any) -> Any:
    model = build_blip("retrieval", TINY, tokenizer)
    assert isinstance(model, BlipForImageTextRetrieval)
    randomise_(model, 0)
    return model


def tiny(family: str, tokenizer: Any) -> Any:
    return tiny_clip(tokenizer) if family == "clip" else tiny_blip(tokenizer)


BOTH = pytest.mark.parametrize("family", ["clip", "blip"])


def test_a_sample_is_an_image_with_three_captions(task: RetrievalTask) -> None:
    batch = next(task.batches("val", batch_size=8))
    assert batch["pixel_values"].shape == (8, 3, 64, 64)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["input_ids"].shape[:2] == (8, 3)


def test_a_prediction_ranks_the_batch_both_ways(task: RetrievalTask, tokenizer: Any) -> None:
    batch = next(task.batches("val", batch_size=6))
    truth = torch.arange(6).repeat(2)
    check_prediction(task, tiny_clip(tokenizer).eval(), batch, truth)


def test_a_teacher_for_retrieval_draws_no_pairs(task: RetrievalTask, tokenizer: Any) -> None:
    batch = next(task.train_batches(batch_size=6, seed=0))
    config = PruningConfig(distillation=1.0)
    model, teacher = tiny_blip(tokenizer), Teacher(tiny_blip(tokenizer), task, config)
    attach(model).stock_when_idle = False
    task.prepare_(model)
    losses = []
    for lossy in (task.loss, teacher.loss):
        torch.manual_seed(0)
        losses.append(float(lossy(model.eval(), batch).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # of one weight, so they agree


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


def test_an_image_without_a_caption_is_refused(tokenizer: Any) -> None:
    task = RetrievalTask({"val": [CaptionedImage(0, (), 7)]}, lambda _: torch.empty(0), tokenizer)
    with pytest.raises(ValueError, match="must have a caption, but image 7 has none"):
        next(task.batches("val", batch_size=1))


def test_images_may_have_different_numbers_of_captions(
    task: RetrievalTask, openmoji: OpenMoji, tokenizer: Any
) -> None:
    samples = [
        CaptionedImage(one.image, one.captions[: 1 + index % 3], index)
        for index, one in enumerate(task.samples["val"])
    ]
    uneven = RetrievalTask(
        {"val": samples}, lambda s: render_scenes(s, openmoji.pixels), tokenizer
    )
    verdicts = []
    for batch_size in (1, 12):
        model = tiny_clip(tokenizer)
        attach(model)
        verdicts.append(evaluate(model, uneven, "val", batch_size=batch_size, num_samples=12)[0])
    assert verdicts[0].metric == verdicts[1].metric
    assert verdicts[0].loss == pytest.approx(verdicts[1].loss, rel=1e-4)


def test_clips_scale_and_blips_temperature_are_kept_in_their_bounds(tokenizer: Any) -> None:
    clip, blip = tiny_clip(tokenizer).train(), tiny_blip(tokenizer).train()
    add_temperature_(blip)
    torch.nn.init.constant_(clip.logit_scale, 50.0)
    torch.nn.init.constant_(blip.itc_temperature, 1e-6)
    for model, learned, bound, factor in (
        (clip, "logit_scale", math.log(100.0), 100.0),
        (blip, "itc_temperature", 0.001, 1000.0),
    ):
        assert similarity_factor(model).item() == pytest.approx(factor)
        assert getattr(model, learned).item() == pytest.approx(bound)
    torch.nn.init.constant_(blip.itc_temperature, 3.0)
    assert similarity_factor(blip).item() == 2.0


def evaluate_in(
    task: RetrievalTask, tokenizer: Any, batch_size: int, family: str = "clip"
) -> tuple[Any, Measurement]:
    model = tiny(family, tokenizer)
    handle = attach(model)
    handle.thresholds = {Stream.VISION: 0.7, Stream.TEXT: 0.7}
    return evaluate(model, task, "val", batch_size=batch_size, final=True)


@BOTH
def test_neither_metric_nor_loss_nor_cost_depends_on_the_batches(
    task: RetrievalTask, tokenizer: Any, family: str
) -> None:
    verdict, cost = evaluate_in(task, tokenizer, 40, family)
    for batch_size in (1, 7):
        other, other_cost = evaluate_in(task, tokenizer, batch_size, family)
        assert (other.metric, other.num_samples) == (verdict.metric, 40)
        assert other.details == pytest.approx(verdict.details)
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


def test_a_sample_of_a_model_that_matches_costs_one_reading_of_both_more(
    task: RetrievalTask, tokenizer: Any
) -> None:
    model = tiny_blip(tokenizer)
    handle = attach(model)
    _, measured = evaluate(model, task, "val", num_samples=1)
    batch = next(task.batches("val", batch_size=1))
    ids, mask = batch["input_ids"][:, 0], batch["attention_mask"][:, 0]
    with torch.no_grad(), handle.metering() as meter:
        rows = encode_images(model, batch["pixel_values"]).rows
        assert rows is not None
        encode_texts(model, ids, mask)
        match_logits(model, rows, ids, mask)
    meter.num_samples = 1
    assert measured == meter.measurement(handle.groups.values(), handle.alive())


def judged_by_hand(task: RetrievalTask, model: Any, num: int) -> Tensor:
    """BLIP's scores of all pairs: the head's logit plus the similarity, (images, texts)."""
    batch = next(task.batches("val", batch_size=num))
    ids, mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
    with torch.no_grad():
        images = encode_images(model, batch["pixel_values"])
        assert images.rows is not None
        similarity = images.features @ encode_texts(model, ids, mask).T
        rows = images.rows.repeat_interleave(len(ids), dim=0)
        logits = match_logits(model, rows, ids.repeat(num, 1), mask.repeat(num, 1))
    return similarity + logits[:, 1].view(num, -1)


def test_re_ranking_everything_ranks_by_the_matching_head(
    task: RetrievalTask, openmoji: OpenMoji, tokenizer: Any
) -> None:
    model = tiny_blip(tokenizer)
    attach(model)
    whole = RetrievalTask(
        {"val": list(task.samples["val"])},
        lambda scenes: render_scenes(scenes, openmoji.pixels),
        tokenizer,
        top=24,
    )
    verdict, _ = evaluate(model, whole, "val", num_samples=8, batch_size=3, final=True)
    scores = judged_by_hand(task, model, 8)  # (8, 24)
    owner = torch.arange(24) // 3
    found = owner[scores.topk(5, dim=1).indices] == torch.arange(8)[:, None]
    named = scores.topk(5, dim=0).indices == owner
    assert verdict.details["i2t_r5"] == pytest.approx(100 * float(found.any(1).float().mean()))
    assert verdict.details["t2i_r5"] == pytest.approx(100 * float(named.any(0).float().mean()))
    first = (found[:, 0].float().mean() + named[0].float().mean()) / 2
    assert verdict.metric == pytest.approx(100 * float(first))


def test_re_ranking_moves_nothing_into_its_lists(task: RetrievalTask, tokenizer: Any) -> None:
    details = evaluate_in(task, tokenizer, 40, "blip")[0].details
    for way in ("i2t", "t2i"):  # the lists are the first five by features
        assert details[f"{way}_r5"] == details[f"itc_{way}_r5"] == details[f"{way}_r10"]


def test_re_ranking_costs_a_list_of_readings_apart_from_the_sample(
    task: RetrievalTask, tokenizer: Any
) -> None:
    model = tiny_blip(tokenizer)
    attach(model)
    plain = evaluate(model, task, "val")
    final = evaluate(model, task, "val", final=True)
    assert plain[1] == final[1]
    assert plain[0].details == {}
    text_only = evaluate(tiny_clip_attached(tokenizer), task, "val", final=True)[0].details
    assert "rerank_gmacs" not in text_only
    assert final[0].details["rerank_gmacs"] > 0


def tiny_clip_attached(tokenizer: Any) -> CLIPModel:
    model = tiny_clip(tokenizer)
    attach(model)
    return model


@BOTH
def test_a_model_of_random_weights_is_near_chance(
    task: RetrievalTask, tokenizer: Any, family: str
) -> None:
    assert evaluate_in(task, tokenizer, 40, family)[0].metric < 20


def test_a_broken_matching_head_shows_in_the_loss_though_features_rank_alone(
    task: RetrievalTask, tokenizer: Any
) -> None:
    model = tiny_blip(tokenizer)
    attach(model)
    before, _ = evaluate(model, task, "val", num_samples=8)
    torch.nn.init.constant_(model.itm_head.bias, 50.0)
    model.itm_head.bias.data[1] = -50.0
    after, _ = evaluate(model, task, "val", num_samples=8)
    assert after.metric == before.metric
    assert after.loss > before.loss + 10


def test_only_tasks_with_features_are_judged_by_the_split(
    task: RetrievalTask, openmoji: OpenMoji, tokenizer: Any
) -> None:
    questions = make_questions(openmoji.drawings, "val", num_questions=4)
    vqa = VqaTask({"val": questions}, openmoji.pixels, ["yes"], tokenizer)
    assert isinstance(task, ReportingTask)
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


@BOTH
def test_a_few_steps_lower_the_loss(task: RetrievalTask, tokenizer: Any, family: str) -> None:
    model = tiny(family, tokenizer)
    attach(model).stock_when_idle = False
    config = PruningConfig(learning_rate=2e-3)
    optimizer = make_optimizer(model, config)
    batch: Batch = next(task.train_batches(batch_size=10, seed=0))
    losses = [
        train_step(model, task, itertools.repeat(batch), optimizer, config) for _ in range(25)
    ]
    assert losses[-1] < losses[4] - 0.5  # by then the queues are full and all targets in force


PRUNING = PruningConfig(
    ratios=(0.4,),
    num_stages=6,
    steps_per_stage=2,
    fine_tune_steps=2,
    batch_size=8,
    eval_samples=16,
    test_samples=16,
    calibration_samples=16,
    probe_samples=8,
    device="cpu",
)


@BOTH
def test_a_retriever_is_pruned_by_all_its_modes(
    task: RetrievalTask, tokenizer: Any, family: str
) -> None:
    pruner = Pruner(tiny(family, tokenizer), task, PRUNING)
    records = list(pruner.run())
    modes = [mode for mode in PruningMode if family == "blip" or mode != "cross_params"]
    assert {record.mode for record in pruner.stages[: len(modes)]} == set(modes)
    point = records[-1]
    assert isinstance(point, CurvePoint)
    assert point.ratio_reached == pytest.approx(0.4, abs=0.03)
    assert set(point.details) >= {"i2t_r1", "t2i_r10"}


def test_the_recipe_names_this_task() -> None:
    for name in ("clip-tiny-retrieval", "blip-tiny-retrieval"):
        assert RECIPES[name].task == RetrievalTask.name


def test_the_learned_temperature_is_saved_with_the_model(
    task: RetrievalTask, tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_blip(tokenizer)
    attach(model)
    task.prepare_(model)
    torch.nn.init.constant_(model.itc_temperature, 0.03)
    save_pruned(model, tmp_path)
    again = load_pruned(tmp_path)
    assert similarity_factor(again).item() == pytest.approx(1 / 0.03)
    detach(again)
    assert "itc_temperature" not in again.state_dict()
