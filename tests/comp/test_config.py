"""A config is checked in full when it is made, and survives JSON."""

import dataclasses
import json
from typing import Any

import pytest

from comp.config import PruningConfig
from comp.methods import METHODS
from comp.words import nearest


@pytest.mark.equations("Eq. 9", "Eq. 10")
def test_the_defaults_are_the_papers() -> None:
    config = PruningConfig()
    assert (config.exploration, config.temperature) == (0.2, 5.0)
    assert (config.history, config.horizon) == (0.4, 5)
    assert config.switches == METHODS["comp"]


def test_a_config_survives_json() -> None:
    config = PruningConfig(ratios=(0.5, 0.7), modes=("vision_params",), stage_quantum=0.02)
    assert PruningConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_lists_become_tuples() -> None:
    config = PruningConfig(ratios=[0.1, 0.2], modes=["vision_tokens"])  # type: ignore[arg-type]
    assert config.ratios == (0.1, 0.2)
    assert config.modes == ("vision_tokens",)
    hash(config)


def test_the_quantum_is_the_last_ratio_over_the_stages() -> None:
    assert PruningConfig(ratios=(0.4, 0.8), num_stages=40).quantum == pytest.approx(0.02)
    assert PruningConfig(stage_quantum=0.05).quantum == 0.05


def test_own_switches_go_over_the_methods() -> None:
    config = PruningConfig(method="sjp", cip=True, schedule="mps")
    expected = dataclasses.replace(METHODS["sjp"], cip=True, schedule="mps")
    assert config.switches == expected


def test_the_ablations_of_the_paper_are_methods() -> None:
    assert (METHODS["cim"].cip, METHODS["cim"].cit, METHODS["cim"].schedule) == (
        True,
        True,
        "joint",
    )
    assert (METHODS["sjp"].cip, METHODS["sjp"].cit) == (False, False)
    assert not METHODS["param"].tokens
    assert not METHODS["token"].parameters
    assert METHODS["sjp_tp"].schedule == "tokens_first"
    assert METHODS["sjp_pt"].schedule == "params_first"


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5])
def test_ratios_lie_between_zero_and_one(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"ratios must lie in \(0, 1\), but got {ratio}"):
        PruningConfig(ratios=(ratio,))


def test_a_ratio_in_per_cent_is_explained() -> None:
    with pytest.raises(ValueError, match=r"but got 85; pass 0\.85 for 85 %"):
        PruningConfig(ratios=(85,))


@pytest.mark.parametrize("ratios", [0.5, "0.5", ("0.5",), (None,), (True,)])
def test_ratios_are_a_list_of_numbers(ratios: Any) -> None:
    with pytest.raises(ValueError, match=r"ratios must be a list of numbers in \(0, 1\), but got"):
        PruningConfig(ratios=ratios)


@pytest.mark.parametrize("ratios", [(0.5, 0.3), (0.5, 0.5)])
def test_ratios_ascend(ratios: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ratios must ascend without repeats, but got"):
        PruningConfig(ratios=ratios)


def test_there_is_a_ratio() -> None:
    with pytest.raises(ValueError, match="ratios must name at least one ratio"):
        PruningConfig(ratios=())


def test_an_unknown_method_suggests_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"method must be one of .*'commp'; did you mean 'comp'\?"
    ):
        PruningConfig(method="commp")


def test_an_unknown_mode_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'vision_token'; did you mean 'vision_tokens'\?"):
        PruningConfig(modes=("vision_token",))


def test_an_unknown_key_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'ratio'.*did you mean 'ratios'\?"):
        PruningConfig.from_dict({"ratio": [0.5]})


@pytest.mark.parametrize(
    "name", ["schedule", "mask_site", "merge", "val_metric", "shrink", "cost", "version"]
)
def test_a_choice_that_is_none_of_them_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of .*, but got 'no such'"):
        PruningConfig(**{name: "no such"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_stages", 0),
        ("steps_per_stage", 0),
        ("exploration", 1.5),
        ("temperature", 0.0),
        ("history", -0.1),
        ("horizon", 0),
        ("stage_quantum", 0.0),
        ("quantum_cap", 0.0),
        ("min_quantum", 0.2),
        ("tolerance", -0.1),
        ("max_stages", 0),
        ("decay_share", 1.1),
        ("min_heads", 0),
        ("min_channels", 0),
        ("min_vision_tokens", 0),
        ("min_text_tokens", 0),
        ("learning_rate", -1.0),
        ("batch_size", 0),
        ("fine_tune_steps", -1),
        ("eval_samples", 0),
        ("seed", -1),
        ("learning_rate", float("nan")),
    ],
)
def test_a_number_out_of_bounds_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be in \[.*\], but got {value}"):
        PruningConfig(**{name: value})


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PruningConfig().seed = 3  # type: ignore[misc]


def test_nothing_near_is_not_suggested() -> None:
    assert nearest("zebra", ["comp", "param"]) == ""


@pytest.mark.parametrize(
    "name", [f.name for f in dataclasses.fields(PruningConfig) if f.type in (bool, bool | None)]
)
def test_what_is_true_or_false_is_nothing_else(name: str) -> None:
    for value in ("no", 1):
        with pytest.raises(ValueError, match=f"{name} must be true or false, but got {value!r}"):
            PruningConfig(**{name: value})


@pytest.mark.parametrize("init", ["probe", "rehearsal"])
def test_trials_are_refused_where_no_cost_is_asked_for(init: Any) -> None:
    with pytest.raises(ValueError, match=rf"init '{init}' gives first costs.*use 'sweep'"):
        PruningConfig(method="param", init=init)
