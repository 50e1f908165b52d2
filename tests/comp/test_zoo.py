"""The dense models in the package are what their cards say."""

import pytest
import torch

from comp.models import load_model
from comp.models.presets import MODEL_PRESETS, preset_directory
from comp.tasks import build_task
from comp.train import RECIPES, saved_accuracy

MAX_BYTES = 5_000_000


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_the_weights_give_the_accuracy_on_the_card_for_the_first_test_samples(name: str) -> None:
    loaded = load_model(name)
    task = build_task(loaded.task, tokenizer=loaded.tokenizer, image_size=loaded.image_size)
    number, on_card = loaded.card["first"]["samples"], loaded.card["first"]["test"]
    place = preset_directory(name)
    found = saved_accuracy(place, task, torch.device("cpu"), ["test"], num_samples=number)
    assert found["test"] == pytest.approx(on_card, abs=0.41)  # two samples of 500


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_every_preset_has_a_recipe_and_one_to_three_million_parameters(name: str) -> None:
    card = load_model(name).card
    recipe = RECIPES[name]
    assert card["task"] == recipe.task == MODEL_PRESETS[name].task
    assert (card["recipe"]["steps"], card["recipe"]["seed"]) == (recipe.steps, recipe.seed)
    assert 1e6 <= card["parameters"] <= 3e6


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_weights_are_small_enough_for_git(name: str) -> None:
    assert (preset_directory(name) / "model.safetensors").stat().st_size <= MAX_BYTES
