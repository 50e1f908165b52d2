"""Recipes of the dense models: their names, their schedule and what they refuse."""

from dataclasses import replace
from pathlib import Path

import pytest

from comp.models.presets import MODEL_PRESETS, preset_directory
from comp.train import RECIPES, Recipe, recipe_of, schedule, train_dense


def test_every_shipped_model_has_its_recipe() -> None:
    assert set(MODEL_PRESETS) <= set(RECIPES)
    for name, preset in MODEL_PRESETS.items():
        assert recipe_of(name).task == preset.task


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    recipe = Recipe(task="vqa", steps=12, warmup=4, learning_rate=2.0)
    rates = [schedule(step, recipe) for step in range(13)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[8] == pytest.approx(1.0)
    assert rates[12] == pytest.approx(0.0)


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"recipe must be one of .*did you mean 'blip-tiny-vqa'\?"
    ):
        recipe_of("blip-tiny-vqaa")


@pytest.mark.parametrize("align_steps", [0, 1])
def test_the_parts_of_a_recipe_count_their_steps_on(tmp_path: Path, align_steps: int) -> None:
    recipe = replace(
        RECIPES["blip-tiny-nlvr2"], align_steps=align_steps, steps=2, tune_steps=2, batch_size=2
    )
    seen: list[tuple[int, float]] = []

    def on_step(step: int, loss: float) -> None:
        seen.append((step, loss))
        if step == recipe.total_steps - 1:
            raise KeyboardInterrupt  # what follows evaluates whole splits

    with pytest.raises(KeyboardInterrupt):
        train_dense(
            recipe, tmp_path, init=preset_directory("blip-tiny-vqa"), device="cpu", on_step=on_step
        )
    assert [step for step, _ in seen] == list(range(align_steps + 4))
    assert all(0 < loss < 10 for _, loss in seen)


def test_a_recipe_that_starts_from_another_model_needs_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="starts from blip-tiny-vqa; pass its directory as init"):
        train_dense(RECIPES["blip-tiny-nlvr2"], tmp_path)
    assert list(tmp_path.iterdir()) == []
