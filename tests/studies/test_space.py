import re
from typing import Any

import optuna
import pytest
from pydantic import TypeAdapter

from comp.config import PruningConfig
from studies.domains import Domain
from studies.space import check_space, config_of, label_of, starting_point, suggest

DOMAINS: TypeAdapter[dict[str, Domain]] = TypeAdapter(dict[str, Domain])


def space(**domains: dict[str, Any]) -> dict[str, Domain]:
    return DOMAINS.validate_python(domains)


EVERY_KIND = space(
    num_stages={"kind": "int", "low": 4, "high": 40, "log": True},
    steps_per_stage={"kind": "int", "low": 10, "high": 50, "step": 10},
    exploration={"kind": "float", "low": 0.0, "high": 0.5},
    method={"kind": "categorical", "choices": ["comp", "sjp"]},
    ratios={"kind": "categorical", "choices": {"two": [0.5, 0.8], "three": [0.5, 0.7, 0.8]}},
    history={"kind": "fixed", "value": 0.3},
)


def study() -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))


def test_a_trial_becomes_a_config_of_the_space() -> None:
    for _ in range(20):
        config = suggest(study().ask(), PruningConfig(), EVERY_KIND)
        assert 4 <= config.num_stages <= 40
        assert config.steps_per_stage in (10, 20, 30, 40, 50)
        assert 0 <= config.exploration <= 0.5
        assert config.ratios in ((0.5, 0.8), (0.5, 0.7, 0.8))
        assert config.history == 0.3


def test_keys_outside_the_space_come_from_the_base() -> None:
    base = PruningConfig(learning_rate=1e-3)
    assert suggest(study().ask(), base, EVERY_KIND).learning_rate == 1e-3


def test_optuna_stores_names_of_choices_and_nothing_of_fixed_values() -> None:
    trial = study().ask()
    suggest(trial, PruningConfig(), EVERY_KIND)
    assert trial.params["ratios"] in ("two", "three")
    assert "history" not in trial.params


def test_an_adopted_trial_keeps_its_values() -> None:
    owner = study()
    first = suggest(owner.ask(), PruningConfig(), EVERY_KIND)
    adopted = optuna.trial.Trial(owner, owner.trials[0]._trial_id)
    assert suggest(adopted, PruningConfig(), EVERY_KIND) == first


def test_the_target_ratio_replaces_the_ratios_above_it() -> None:
    base = PruningConfig(ratios=(0.5, 0.7, 0.8))
    assert config_of(base, {"target_ratio": 0.9}).ratios == (0.5, 0.7, 0.8, 0.9)
    assert config_of(base, {"target_ratio": 0.6}).ratios == (0.5, 0.6)
    assert config_of(base, {"target_ratio": 0.7}).ratios == (0.5, 0.7)


def test_the_starting_point_is_the_base() -> None:
    base = PruningConfig(num_stages=10, ratios=(0.5, 0.8))
    found = starting_point(base, EVERY_KIND)
    assert found == {
        "num_stages": 10,
        "steps_per_stage": 50,
        "exploration": 0.2,
        "method": "comp",
        "ratios": "two",
    }


@pytest.mark.parametrize(
    ("domain", "moved"),
    [
        ({"kind": "int", "low": 50, "high": 60}, 50),
        ({"kind": "int", "low": 2, "high": 9}, 9),
        ({"kind": "int", "low": 1, "high": 100, "step": 7}, 36),
        ({"kind": "categorical", "choices": [7, 8]}, 7),
    ],
)
def test_a_base_outside_the_domain_is_moved_into_it(domain: dict[str, Any], moved: int) -> None:
    assert starting_point(PruningConfig(), space(num_stages=domain)) == {"num_stages": moved}


def test_the_starting_point_can_be_enqueued_without_a_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    owner = study()
    owner.enqueue_trial(starting_point(PruningConfig(), EVERY_KIND))
    suggest(owner.ask(), PruningConfig(), EVERY_KIND)
    assert [str(w.message) for w in recwarn if "range" in str(w.message)] == []


def test_both_ends_of_a_domain_are_tried() -> None:
    wide = space(exploration={"kind": "float", "low": 0.5, "high": 1.5})
    with pytest.raises(ValueError, match=r"space\.exploration: exploration must be in .* got 1.5"):
        check_space(PruningConfig(), wide, 0.8)


def test_every_trial_must_reach_the_objective() -> None:
    targets = space(target_ratio={"kind": "float", "low": 0.6, "high": 0.9})
    with pytest.raises(ValueError, match=r"up to ratio 0\.8, but a trial may end at 0\.6"):
        check_space(PruningConfig(), targets, 0.8)
    check_space(PruningConfig(), targets, 0.6)


def test_ends_that_do_not_fit_together_are_found() -> None:
    pair = space(
        batch_size={"kind": "int", "low": 31, "high": 32},
        accumulate={"kind": "categorical", "choices": [1, 2]},
    )
    with pytest.raises(ValueError, match=r"space\.accumulate: accumulate must divide batch_size"):
        check_space(PruningConfig(), pair, 0.5)


def test_a_step_budget_is_split_between_stages_and_fine_tuning() -> None:
    base = PruningConfig(ratios=(0.5, 0.8), num_stages=10, steps_per_stage=30, fine_tune_steps=50)
    config = config_of(base, {"prune_share": 0.25, "step_budget": 800, "num_stages": 20})
    assert (config.steps_per_stage, config.fine_tune_steps) == (10, 300)
    same = config_of(base, {"prune_share": 0.75})
    assert (same.steps_per_stage, same.fine_tune_steps) == (30, 50)
    split = space(prune_share={"kind": "float", "low": 0.1, "high": 0.9})
    assert starting_point(base, split) == {"prune_share": 0.75}


def test_the_start_of_a_key_that_others_decide_is_what_they_say() -> None:
    base = PruningConfig(ratios=(0.8,), num_stages=40, learning_rate=3e-5)
    keys = space(
        stage_quantum={"kind": "float", "low": 0.001, "high": 0.1},
        fine_tune_learning_rate={"kind": "float", "low": 1e-6, "high": 1e-3, "log": True},
    )
    start = starting_point(base, keys)
    assert start == {"stage_quantum": 0.02, "fine_tune_learning_rate": 3e-5}


@pytest.mark.parametrize(
    ("domains", "complaint"),
    [
        (
            {"exploration": {"kind": "float", "low": 0, "high": 1, "when": {"method": "comp"}}},
            "space.exploration: when names 'method', which must be a key above it",
        ),
        (
            {
                "method": {"kind": "categorical", "choices": ["comp", "sjp"]},
                "exploration": {"kind": "float", "low": 0, "high": 1, "when": {"method": "cmop"}},
            },
            "when asks for method = 'cmop', but that is comp, sjp; did you mean 'comp'?",
        ),
        (
            {"step_budget": {"kind": "int", "low": 10, "high": 20}},
            "space.step_budget needs prune_share",
        ),
        (
            {
                "prune_share": {"kind": "float", "low": 0.1, "high": 0.5},
                "fine_tune_steps": {"kind": "int", "low": 1, "high": 2},
            },
            "space.fine_tune_steps must be left out beside prune_share",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_named(
    domains: dict[str, dict[str, Any]], complaint: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        check_space(PruningConfig(), space(**domains), 0.5)


def test_a_label_is_found_for_a_config_value_or_refused() -> None:
    assert label_of(EVERY_KIND["ratios"], (0.5, 0.8)) == "two"
    with pytest.raises(ValueError, match=r"55 is not in the domain, whose nearest value is 50"):
        label_of(EVERY_KIND["steps_per_stage"], 55)
