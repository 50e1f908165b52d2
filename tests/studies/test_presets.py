"""Every preset is a spec that a person could have written, and its header tells the truth."""

import re

import pytest

from comp.models.presets import MODEL_PRESETS
from comp.tasks.names import TASKS
from studies.presets import preset_names, preset_path, preset_summary
from studies.spec import StudySpec
from studies.specfile import check_places, read_spec

NAMES = preset_names()


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_valid_and_named_like_its_file(name: str) -> None:
    spec = read_spec(name)
    check_places(spec)
    assert spec.name == name


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_uses_a_model_and_a_task_that_ship(name: str) -> None:
    spec = read_spec(name)
    assert spec.model in MODEL_PRESETS
    assert spec.task in TASKS


@pytest.mark.parametrize("name", NAMES)
def test_the_header_has_a_summary_a_command_and_a_time(name: str) -> None:
    header = re.match(r"(#.*\n)+", preset_path(name).read_text(encoding="utf-8"))
    assert header is not None
    assert 20 < len(preset_summary(name)) < 97
    kind = "study run" if isinstance(read_spec(name), StudySpec) else "prune"
    assert f"comp {kind} {name}" in header[0]
    assert re.search(r"minute|second|hour|day", header[0])


@pytest.mark.parametrize("task", ["vqa", "nlvr2"])
def test_a_demo_has_six_trials_or_more_two_at_a_time(task: str) -> None:
    spec = read_spec(f"demo-{task}")
    assert isinstance(spec, StudySpec)
    assert spec.n_trials >= 6
    assert spec.parallel == 2
