"""Several models in one spec: a study each, or one study that chooses among them."""

from pathlib import Path
from typing import Any

import pytest

from orchestration.store import read_run
from studies.driver import run_study
from studies.errors import SpecError
from studies.folder import StudyFolder
from studies.pool import slot_sizes
from studies.presets import preset_path
from studies.spec import StudySpec, spec_hash
from studies.specfile import override, read_specs, spec_of, write_spec
from studies.summary import summarize
from studies.yaml_text import read_yaml, write_yaml
from tests.studies.synthetic import RUNNER, STUDY, SlotsExecutor

CELLS = {
    "slow": {"model": "blip-tiny-vqa", "task": "vqa"},
    "fast": {"model": "blip-tiny-vqa", "task": "vqa", "pruning": {"learning_rate": 0.5}},
}
BOTH: dict[str, Any] = {
    **{key: value for key, value in STUDY.items() if key not in ("model", "task")},
    "matrix": {"studies": "one", "cells": CELLS},
}


def one_study(root: Path, *changes: str) -> StudySpec:
    spec = spec_of(override({**BOTH, "root": str(root)}, changes))
    assert isinstance(spec, StudySpec)
    return spec


def written(directory: Path, *changes: str) -> list[Any]:
    path = directory / "matrix.yaml"
    path.write_text(write_yaml(BOTH))
    return read_specs(path, changes)


def sized(**changes: Any) -> dict[str, Any]:
    """The two cells, of which one is another model that takes two GPUs."""
    large = {**CELLS["fast"], "model": "blip-tiny-nlvr2", "resources": {"gpus": 2}} | changes
    return {**BOTH["matrix"], "cells": {"small": CELLS["slow"], "large": large}}


def test_what_a_run_asks_for_follows_its_cell(tmp_path: Path, ray_cluster: str) -> None:
    spec = spec_of({**BOTH, "matrix": sized(), "resources": {"gpus": 0.5}, "root": str(tmp_path)})
    assert isinstance(spec, StudySpec)
    gpus = {model: size.gpus for (model, _, _), size in slot_sizes(spec).items()}
    assert gpus == {"blip-tiny-vqa": 0.5, "blip-tiny-nlvr2": 2}


def test_cells_of_one_model_ask_for_the_most_of_them(tmp_path: Path, ray_cluster: str) -> None:
    cells = sized(model="blip-tiny-vqa")
    spec = spec_of({**BOTH, "matrix": cells, "resources": {"gpus": 0.5}, "root": str(tmp_path)})
    assert isinstance(spec, StudySpec)
    assert [size.gpus for size in slot_sizes(spec).values()] == [2]


def test_the_paper_asks_for_several_workers_for_llava_alone(
    tmp_path: Path, ray_cluster: str
) -> None:
    workers = {}
    for spec in read_specs(preset_path("paper-main"), (f"root={tmp_path}",)):
        assert isinstance(spec, StudySpec)
        workers |= {model: size.workers for (model, _, _), size in slot_sizes(spec).items()}
    assert workers.pop("llava-hf/llava-1.5-7b-hf") == 4
    assert set(workers.values()) == {1}


def test_a_cell_whose_batches_its_workers_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 32 cannot be shared by 3 workers"):
        spec_of({**BOTH, "matrix": sized(resources={"workers": 3})})


def test_a_study_of_a_cell_asks_for_what_the_cell_does(tmp_path: Path) -> None:
    path = tmp_path / "matrix.yaml"
    path.write_text(write_yaml({**BOTH, "matrix": {**sized(), "studies": "each"}}))
    assert [spec.resources.gpus for spec in read_specs(path, ())] == ["auto", 2]


def test_what_a_cell_asks_for_may_change_when_a_study_goes_on(tmp_path: Path) -> None:
    specs = [spec_of({**BOTH, "matrix": cells}) for cells in (sized(), sized(resources=None))]
    assert spec_hash(specs[0]) == spec_hash(specs[1])


def test_a_study_for_every_cell_and_seed(tmp_path: Path) -> None:
    specs = written(tmp_path, "matrix.studies=each", "matrix.seeds=[0, 7]")
    assert [spec.name for spec in specs] == ["s-slow-s0", "s-slow-s7", "s-fast-s0", "s-fast-s7"]
    assert [spec.seeds for spec in specs] == [(0,), (7,), (0,), (7,)]
    assert [spec.pruning.learning_rate for spec in specs[1:3]] == [3e-5, 0.5]
    assert all(spec.matrix is None for spec in specs)


def test_one_study_chooses_the_cell_and_runs_its_model_and_config(tmp_path: Path) -> None:
    spec = one_study(tmp_path)
    executor = SlotsExecutor(2)
    assert run_study(spec, lambda: executor, runner=RUNNER).counts == {"complete": 6}
    assert executor.submitted[:2] == ["s-dense-slow", "s-dense-fast"]
    trials = summarize(StudyFolder.of(spec)).trials
    assert trials[0].params["cell"] == "slow"
    assert {trial.params["cell"] for trial in trials} == {"slow", "fast"}
    for trial in trials:
        config = read_run(tmp_path / "runs" / trial.runs[0]).job.config
        assert (config["learning_rate"] == 0.5) == (trial.params["cell"] == "fast")


def test_a_spec_with_a_matrix_reads_back_equal(tmp_path: Path) -> None:
    spec = one_study(tmp_path)
    assert spec_of(read_yaml(write_spec(spec))) == spec


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("matrix.studies=both", "matrix.studies must be 'each' or 'one', but got 'both'"),
        ("matrix.cells.fast.task=nlvr2", "cells of one study must share the task"),
        (
            "matrix.cells.fast.modl=x",
            "matrix.cells.fast: unknown key 'modl'; did you mean 'model'",
        ),
        ("matrix.cells={}", "matrix.cells must name at least one model and task"),
        ("matrix.seeds=[1]", "seeds must stand beside the matrix of one study"),
        ("model=blip-tiny-vqa", "model must be left out beside a matrix"),
        ("matrix.cells.fast.pruning={num_stage: 3}", "did you mean 'num_stages'?"),
    ],
)
def test_a_wrong_matrix_is_a_sentence(tmp_path: Path, change: str, complaint: str) -> None:
    with pytest.raises(SpecError) as caught:
        one_study(tmp_path, change)
    assert complaint in str(caught.value)


def test_a_cell_without_a_matrix_is_refused() -> None:
    with pytest.raises(SpecError, match=r"space\.cell needs a matrix beside it"):
        spec_of(override(STUDY, ["space.cell={kind: categorical, choices: [a]}"]))
