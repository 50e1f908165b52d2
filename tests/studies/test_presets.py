"""Every preset is a spec that a person could have written, and its header tells the truth."""

import re
from pathlib import Path
from typing import Any

import pytest

from comp.models.presets import MODEL_PRESETS
from comp.tasks.names import TASKS
from studies.errors import SpecError
from studies.presets import preset_names, preset_path, preset_summary
from studies.spec import StudySpec
from studies.specfile import check_places, read_spec, read_specs, read_values

NAMES = preset_names()


def yaml_values(name: str) -> dict[str, Any]:
    values = read_values(name)
    assert isinstance(values, dict)
    return values


MANY = [name for name in NAMES if "matrix" in yaml_values(name)]  # a study a model
SINGLE = [name for name in NAMES if name not in MANY]
SHIPPED = [name for name in SINGLE if yaml_values(name)["model"] in MODEL_PRESETS]


@pytest.mark.parametrize("name", SINGLE)
def test_a_preset_is_valid_and_named_like_its_file(name: str, tmp_path: Path) -> None:
    spec = read_spec(name, [] if name in SHIPPED else [f"model={tmp_path}"])
    check_places(spec)
    assert spec.name == name
    assert spec.task in TASKS


@pytest.mark.parametrize("name", MANY)
def test_a_preset_of_many_models_is_a_valid_study_for_each(name: str) -> None:
    specs = read_specs(name)
    assert [spec.name for spec in specs] == [
        f"{name}-{cell}" for cell in yaml_values(name)["matrix"]["cells"]
    ]
    assert len({(spec.model, spec.task) for spec in specs}) == 6
    with pytest.raises(SpecError, match=r"models/blip-nlvr2|data/nlvr2"):
        check_places(specs[0])


@pytest.mark.parametrize("name", sorted({*SINGLE} - {*SHIPPED}))
def test_a_preset_without_a_model_that_ships_says_what_to_set(name: str) -> None:
    with pytest.raises(SpecError, match="model must be a directory"):
        check_places(read_spec(name))
    assert "--set model=MODEL" in preset_path(name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "subject",
    [
        *("blip-nlvr2", "blip-vqa", "blip-retrieval", "blip-captioning"),
        *("clip-retrieval", "llava-instruct"),
    ],
)
def test_the_paper_has_a_preset_for_every_model_and_task(subject: str) -> None:
    pruning = read_spec(f"paper-{subject}").pruning
    paper = (pruning.exploration, pruning.temperature, pruning.history, pruning.horizon)
    assert paper == (0.2, 5.0, 0.4, 5)


def test_the_wide_search_leaves_nothing_out_that_the_method_leaves_to_choice() -> None:
    spec = read_spec("wide-search")
    assert isinstance(spec, StudySpec)
    assert {
        "num_stages",
        "prune_share",
        "quantum_cap",
        "exploration",
        "temperature",
        "history",
        "horizon",
        "decay_share",
        "learning_rate",
        "fine_tune_learning_rate",
        "merge",
        *("min_heads", "min_channels", "min_vision_tokens", "min_text_tokens"),
    } <= set(spec.space)


@pytest.mark.parametrize("name", NAMES)
def test_the_header_has_a_summary_a_command_and_a_time(name: str) -> None:
    header = re.match(r"(#.*\n)+", preset_path(name).read_text(encoding="utf-8"))
    assert header is not None
    assert 20 < len(preset_summary(name)) < 97
    kind = "study run" if isinstance(read_specs(name)[0], StudySpec) else "prune"
    assert f"comp {kind} {name}" in header[0]
    assert re.search(r"minute|second|hour|day", header[0], re.IGNORECASE)


@pytest.mark.parametrize("task", ["vqa", "nlvr2"])
def test_a_demo_has_six_trials_or_more_two_at_a_time(task: str) -> None:
    spec = read_spec(f"demo-{task}")
    assert isinstance(spec, StudySpec)
    assert spec.n_trials >= 6
    assert spec.parallel == 2
