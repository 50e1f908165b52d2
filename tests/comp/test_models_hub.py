"""Directories and cached repositories of the hub: weights, tokenizer and image processor."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BlipImageProcessor, CLIPImageProcessor, LlavaProcessor

from comp.checkpoint import save_pruned
from comp.data.images import ImageTransform, normalize, transform_of
from comp.errors import CheckpointMismatch
from comp.evaluation import evaluate
from comp.models import attach, load_model
from comp.tasks.dialogue import dialogue_of
from comp.tasks.instruct import Conversation, InstructTask
from tests.hub_models import NAMES, SIDE, llava_tokenizer, save_hub_model

TASKS = {
    "blip-vqa-base": "vqa",
    "blip-image-captioning-base": "captioning",
    "blip-itm-base-coco": "retrieval",
    "clip-vit-tiny": "retrieval",
    "llava-1.5-tiny-hf": "instruct",
}


def same_weights(model: Any, other: Any) -> bool:
    states = [dict(one.state_dict()) for one in (model, other)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(tensor, states[1][name]) for name, tensor in states[0].items()
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_of_the_hub_gives_model_task_and_tokenizer(name: str, tmp_path: Path) -> None:
    stock = save_hub_model(name, tmp_path / name)
    loaded = load_model(tmp_path / name)
    assert same_weights(loaded.model, stock)
    assert (loaded.task, loaded.image_size) == (TASKS[name], SIDE)
    assert loaded.tokenizer.bos_token_id is not None
    config = loaded.model.config.text_config
    assert max(loaded.tokenizer.get_vocab().values()) == config.vocab_size - 1


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("blip-vqa-base", "[ENC]"),
        ("blip-itm-base-coco", "[CLS]"),
        ("clip-vit-tiny", "<|startoftext|>"),
    ],
)
def test_a_text_begins_as_the_authors_begin_it(name: str, first: str, tmp_path: Path) -> None:
    save_hub_model(name, tmp_path)
    words = load_model(tmp_path).tokenizer
    ids = words("is this a cat?")["input_ids"]
    assert words.convert_ids_to_tokens(ids)[:3] == [first, "is", "this"]


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("kind", ["blip", "clip"])
def test_images_are_made_as_the_processor_makes_them(kind: str, wide: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (37, 61, 3), dtype=np.uint8)
    image = Image.fromarray(pixels if wide else pixels.transpose(1, 0, 2))
    square = {"height": 24, "width": 24}
    processor: Any = (
        BlipImageProcessor(size=square, image_mean=[0.5] * 3, image_std=[0.2, 0.3, 0.5])
        if kind == "blip"
        else CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=square)
    )
    transform = transform_of(processor.to_dict(), 24)
    ours = normalize(transform.restated(transform(image)[None]))[0]
    theirs = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
    torch.testing.assert_close(ours, theirs.float(), atol=1e-4, rtol=0)


def test_the_way_of_the_images_goes_with_a_pruned_model(tmp_path: Path) -> None:
    save_hub_model("clip-vit-tiny", tmp_path / "dense")
    loaded = load_model(tmp_path / "dense")
    save_pruned(loaded.model, tmp_path / "again", tokenizer=loaded.tokenizer)
    again = load_model(tmp_path / "again")
    assert again.transform == loaded.transform == ImageTransform(SIDE, SIDE)
    assert again.tokenizer("a cat")["input_ids"] == loaded.tokenizer("a cat")["input_ids"]


def test_weights_in_shards_are_loaded(tmp_path: Path) -> None:
    stock = save_hub_model("llava-1.5-tiny-hf", tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert same_weights(load_model(tmp_path).model, stock)


def test_weights_in_a_pickle_are_read_as_data(tmp_path: Path) -> None:
    stock = save_hub_model("blip-vqa-base", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(stock.state_dict(), tmp_path / "pytorch_model.bin")
    assert same_weights(load_model(tmp_path).model, stock)


def test_older_names_of_tensors_are_known(tmp_path: Path) -> None:
    stock = save_hub_model("llava-1.5-tiny-hf", tmp_path / "llava")
    clip = save_hub_model("clip-vit-tiny", tmp_path / "clip")
    weights = load_file(tmp_path / "llava" / "model.safetensors")
    assert "language_model.lm_head.weight" in weights
    older = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in weights.items()
    }
    save_file(older, tmp_path / "llava" / "model.safetensors", metadata={"format": "pt"})
    assert same_weights(load_model(tmp_path / "llava").model, stock)
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    weights["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(weights, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    assert same_weights(load_model(tmp_path / "clip").model, clip)


def test_weights_of_another_model_are_named(tmp_path: Path) -> None:
    save_hub_model("clip-vit-tiny", tmp_path / "clip")
    save_hub_model("blip-vqa-base", tmp_path / "blip")
    shutil.copy(tmp_path / "blip" / "model.safetensors", tmp_path / "clip")
    with pytest.raises(
        CheckpointMismatch, match=r"does not fit the model, a .*missing \(logit_scale"
    ):
        load_model(tmp_path / "clip")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_a_repository_in_the_cache_is_loaded_without_a_network(cache: Path) -> None:
    commit = "0" * 40
    repository = cache / "models--openai--clip-vit-tiny"
    stock = save_hub_model("clip-vit-tiny", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    loaded = load_model("openai/clip-vit-tiny")
    assert loaded.name == "openai/clip-vit-tiny"
    assert same_weights(loaded.model, stock)


@pytest.mark.usefixtures("cache")
def test_a_repository_that_is_not_to_be_had_is_named() -> None:
    with pytest.raises(ValueError, match=r"'openai/clip-vit-x' is not in the cache .* pass its"):
        load_model("openai/clip-vit-x")


def test_a_prompt_is_that_of_the_hub(tmp_path: Path) -> None:
    save_hub_model("llava-1.5-tiny-hf", tmp_path)
    words: Any = llava_tokenizer()
    words.image_token = "<image>"
    square = {"height": SIDE, "width": SIDE}
    processor: Any = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square),
        words,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    text = "USER: <image>\nis this a cat? ASSISTANT: yes</s>"
    theirs = processor(images=Image.new("RGB", (SIDE, SIDE)), text=text)["input_ids"][0]
    spell = dialogue_of(words)
    asked = spell.question("is this a cat?", is_first=True, has_image=True)
    image = [words.convert_tokens_to_ids("<image>")] * 4
    ours = [*asked[: spell.image_place], *image, *asked[spell.image_place :]]
    assert [*ours, *spell.answer("yes")] == list(theirs)


def test_a_llava_of_the_hub_learns_turns_with_and_without_images(tmp_path: Path) -> None:
    save_hub_model("llava-1.5-tiny-hf", tmp_path)
    loaded = load_model(tmp_path)
    told = [
        Conversation(0, (("is this a cat?", "yes"), ("a dog?", "no"))),
        Conversation(None, (("what is left of the dog?", "a cat"),)),
    ]
    pixels = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)
    task = InstructTask({"train": told, "val": told}, pixels, loaded.tokenizer, augment=False)
    attach(loaded.model)
    before, _ = evaluate(loaded.model, task, "val")
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-2)
    loaded.model.train()
    for batch in [next(task.train_batches(batch_size=2, seed=0))] * 40:
        optimizer.zero_grad()
        task.loss(loaded.model, batch).backward()
        optimizer.step()
    after, _ = evaluate(loaded.model, task, "val")
    assert (before.metric, after.metric) == (0.0, 100.0)
    labels = next(task.batches("val", batch_size=2))["labels"]
    answers = [loaded.tokenizer.decode(row[row >= 0]) for row in labels]
    assert [text.replace(" ", "") for text in answers] == ["yes</s>no</s>", "acat</s>"]


def test_a_config_without_a_class_is_refused_with_those_known(tmp_path: Path) -> None:
    save_hub_model("clip-vit-tiny", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Blip2Model"]}))
    with pytest.raises(ValueError, match=r"holds a Blip2Model, .* known are .*BlipForNLVR"):
        load_model(tmp_path)
