"""The results page: hand-made outcomes give the rows and tables that arithmetic asks for."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from click.testing import CliRunner

from comp.results import pack_outcomes
from studies.cli import cli
from studies.collection import POINTS, STAGES, collect, read_collection
from studies.folder import StudyFolder
from studies.reproduction import ResultRow, rows_of
from studies.reproduction_across import rows_across
from studies.reproduction_page import fill, timelines_of, write_results
from tests.studies.synthetic import make_spec
from tests.studies.test_driver import run

SAMPLES = 100


def point(setting: str, seed: int, val: float, right: int, **own: Any) -> dict[str, Any]:
    """A point whose first ``right`` test samples of 100 are answered rightly."""
    outcomes = [1.0] * right + [0.0] * (SAMPLES - right)
    values = {
        "study": "main",
        "run_id": f"{setting}-s{seed}",
        "data": "OpenMoji",
        "model": "tiny",
        "task": "vqa",
        "method": setting,
        "setting": setting,
        "is_own": setting == "comp",
        "seed": seed,
        "ratio_asked": 0.8,
        "ratio_reached": 0.799,
        "gmacs": 0.2,
        "val": val,
        "test": float(right),
        "outcomes": pack_outcomes(outcomes),
    }
    return values | own


def stage(setting: str, mode: str, macs: float) -> dict[str, Any]:
    own = {"setting": setting, "seed": 0, "mode": mode, "choice": "greedy", "ratio": 1 - macs}
    return {"study": "main"} | own


def write(directory: Path, points: Sequence[Any], stages: Sequence[Any] = ()) -> None:
    tables = ((POINTS, points), (STAGES, stages or [stage("sjp", "a", 1.0)]))
    for name, rows in tables:
        pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), directory / name)


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, ResultRow]:
    """Two seeds each; ``token`` is best by test, but ``sjp`` by validation."""
    points = [point("sjp", seed, 60.0, 50 + seed) for seed in (0, 1)]
    points += [point("token", seed, 59.0, 70) for seed in (0, 1)]
    points += [point("comp", seed, 65.0, 56 + seed) for seed in (1, 0)]
    write(tmp_path, points)
    return {row.method: row for row in rows_of(read_collection(tmp_path))}


def test_the_baseline_is_chosen_by_validation_and_never_by_test(
    rows: dict[str, ResultRow],
) -> None:
    assert {row.baseline for row in rows.values()} == {"sjp"}
    assert rows["sjp"].difference is None


def test_a_difference_pairs_seeds_and_samples(rows: dict[str, ResultRow]) -> None:
    """Every seed answers just the same six samples more, so only samples make the interval."""
    difference = rows["comp"].difference
    assert difference is not None
    assert difference.mean == pytest.approx(6.0)
    assert difference.low is not None
    assert 1 < difference.low < 4
    assert difference.num == 2


def test_a_row_has_mean_and_sample_deviation_over_its_seeds(rows: dict[str, ResultRow]) -> None:
    assert rows["comp"].test.mean == pytest.approx(56.5)
    assert rows["comp"].test.std == pytest.approx(0.5**0.5)
    assert rows["comp"].seeds == (0, 1)


def test_seeds_that_the_baseline_lacks_are_not_compared(tmp_path: Path) -> None:
    write(tmp_path, [point("sjp", 0, 60, 50), point("comp", 0, 60, 52), point("comp", 1, 60, 90)])
    found = {row.method: row for row in rows_of(read_collection(tmp_path))}["comp"].difference
    assert found is not None
    assert found.mean == pytest.approx(2.0)


def test_a_metric_that_is_no_mean_is_ownared_by_seed(tmp_path: Path) -> None:
    points = [point("sjp", s, 60, 50, outcomes="") for s in (0, 1)]
    points += [point("comp", s, 60, 51 + 2 * s, outcomes="") for s in (0, 1)]
    write(tmp_path, points)
    found = {row.method: row for row in rows_of(read_collection(tmp_path))}["comp"].difference
    assert found is not None
    assert (found.mean, found.low, found.high) == (2.0, 1.0, 3.0)


def test_the_page_gets_its_tables_and_keeps_its_words(tmp_path: Path) -> None:
    points = [point("sjp", 0, 60.0, 50), point("comp", 0, 60.0, 55, ratio_reached=0.81)]
    points.append(point("comp", 0, 70.0, 71, method="dense", ratio_asked=0.0, gmacs=1e-9))
    stages = [stage("comp", "vision_tokens", 0.5), stage("comp", "language_params", 0.25)]
    stages.append(stage("sjp", "vision_tokens+vision_params", 0.2))
    write(tmp_path, points, stages)
    page = tmp_path / "results.md"
    places = ("test main", "differences main", "modes main")
    page.write_text(
        "# Words\n" + "\n".join(f"<!-- begin {p} -->\n<!-- end {p} -->" for p in places)
    )
    written = write_results(tmp_path, page)
    text = page.read_text()
    assert text.startswith("# Words\n")
    assert "| `comp` | 1 | 2.0 | 55.00* |" in text  # a per cent off the asked ratio is said
    assert "| `sjp` | 1 | 1.0 | baseline |" in text
    assert "| vision_tokens | 1 | 67% |" in text
    (first, second) = json.loads((tmp_path / "results.json").read_text())
    assert (first["method"], second["diff_to_best_baseline"]) == ("sjp", 5.0)
    assert (tmp_path / "main.png").read_bytes()[1:4] == b"PNG"
    assert {tmp_path / "main.png", tmp_path / "main-modes.png"} <= {*written}
    assert write_results(tmp_path, page)
    assert page.read_text() == text


TERMS = {"model": "tiny", "quantum": 0.07, "fine_tune_steps": 60}


def two_studies(directory: Path, terms: dict[str, Any] | None = None, **own: Any) -> None:
    """A study of sjp, and one of token with its own terms and values; a dense point each."""
    found = []
    for study, setting, right in (("main", "sjp", 50), ("tokens", "token", 56)):
        changed, more = (terms or {}, own) if study == "tokens" else ({}, {})
        values = {"study": study, "terms": json.dumps(TERMS | changed), "params": 7}
        dense = {"method": "dense", "ratio_asked": 0.0}
        found.append(point(setting, 0, 70.0, 71, **values, **dense))
        found.append(point(setting, 0, 60.0, right) | values | more)
    write(directory, found)


def test_settings_of_two_studies_on_equal_terms_share_a_table(tmp_path: Path) -> None:
    two_studies(tmp_path)
    page = tmp_path / "results.md"
    places = ("across main tokens", "test across main tokens")
    page.write_text("".join(f"<!-- begin {place} --><!-- end {place} -->" for place in places))
    write_results(tmp_path, page)
    assert "| `token` | 1 | 0.0 | 56.00 |" in page.read_text()
    assert "| `sjp` | 1 | 1.0 | baseline |" in page.read_text()
    assert "| `token` | 1 | 0.0 | " in page.read_text()
    values = json.loads((tmp_path / "results.json").read_text())
    joined = [value for value in values if value["study"] == "main tokens"]
    assert [value["diff_to_best_baseline"] for value in joined] == [None, 6.0]


def test_settings_can_be_compared_with_one_by_name(tmp_path: Path) -> None:
    two_studies(tmp_path)
    page = tmp_path / "results.md"
    places = [f"against {setting} main tokens" for setting in ("token", "madtp")]
    page.write_text("".join(f"<!-- begin {place} --><!-- end {place} -->" for place in places))
    write_results(tmp_path, page)
    assert "| `token` | 1 | 0.0 | baseline |" in page.read_text()
    assert "| `sjp` | 1 | 1.0 | **-6.00" in page.read_text()
    assert "Not compared: no setting is 'madtp'; there are sjp, token." in page.read_text()


def test_runs_of_two_methods_in_a_study_keep_their_stages_apart() -> None:
    rows = [stage("comp", "tokens", 0.5), stage("comp_plus", "params", 0.25)]
    found = timelines_of([*rows, {**rows[0], "study": "alone"}])
    assert found == {
        "alone": {"seed 0": [("tokens", "greedy", 0.5)]},
        "main": {
            "comp, seed 0": [("tokens", "greedy", 0.5)],
            "comp_plus, seed 0": [("params", "greedy", 0.75)],
        },
    }


@pytest.mark.parametrize(
    ("terms", "own", "sentence"),
    [
        ({"quantum": 0.06}, {}, r"main and tokens differ in quantum \(0.07 and 0.06\)$"),
        ({"searched": 1}, {}, None),
        ({}, {"seed": 1}, "share no seed"),
        ({}, {"ratio_asked": 0.7}, "share no ratio"),
    ],
)
def test_what_is_not_equal_is_said(
    tmp_path: Path, terms: Any, own: Any, sentence: str | None
) -> None:
    two_studies(tmp_path, terms, **own)
    if sentence is None:
        assert len(rows_across(read_collection(tmp_path), ["main", "tokens"])) == 2
        return
    with pytest.raises(ValueError, match=sentence):
        rows_across(read_collection(tmp_path), ["main", "tokens"])


def test_seeds_that_one_of_two_studies_lacks_are_left_out(tmp_path: Path) -> None:
    two_studies(tmp_path)
    points = pyarrow.parquet.read_table(tmp_path / POINTS).to_pylist()
    more = point("token", 1, 60.0, 90, study="tokens", terms=json.dumps(TERMS), params=7)
    write(tmp_path, [*points, more])
    found = {row.method: row for row in rows_across(read_collection(tmp_path), ["main", "tokens"])}
    assert (found["token"].seeds, found["token"].test.mean) == ((0,), 56.0)


def test_studies_that_were_collected_without_terms_are_named(tmp_path: Path) -> None:
    write(tmp_path, [point("sjp", 0, 60, 50), point("token", 0, 60, 50, study="tokens")])
    with pytest.raises(ValueError, match="'main' was collected before terms were kept"):
        rows_across(read_collection(tmp_path), ["main", "tokens"])


def test_a_list_of_changes_is_compared_with_what_it_changes(tmp_path: Path) -> None:
    space = "space={distillation: {kind: categorical, choices: [0.0, 1.0]}}"
    spec = make_spec(
        tmp_path, "sampler={kind: start}", space, "enqueue=[{distillation: 1.0}]", "n_trials=2"
    )
    run(spec)
    collect([StudyFolder.of(spec)], tmp_path / "data")
    found = {
        row.method: row
        for row in rows_of(read_collection(tmp_path / "data"))
        if row.ratio_asked == 0.8
    }
    assert {row.baseline for row in found.values()} == {"comp"}
    assert found["comp distillation=1.0"].difference is not None
    assert not found["comp distillation=1.0"].is_own


def test_a_place_without_data_is_named() -> None:
    with pytest.raises(ValueError, match="a place for 'test x', but the data gives test y"):
        fill("<!-- begin test x --><!-- end test x -->", {"test y": ""})


def test_runs_are_collected_with_what_their_study_varies(tmp_path: Path) -> None:
    space = (
        "space={cit: {kind: categorical, choices: [true, false]}, cip: {kind: fixed, value: true}}"
    )
    spec = make_spec(tmp_path, "sampler={kind: grid}", space, "seeds=[0, 1]", "n_trials=2")
    run(spec)
    assert collect([StudyFolder.of(spec)], tmp_path / "data") == 4
    found = {
        row.method: row
        for row in rows_of(read_collection(tmp_path / "data"))
        if row.ratio_asked == 0.8
    }
    assert {name: row.is_own for name, row in found.items()} == {
        "comp": True,
        "comp cit=false": False,
    }
    assert found["comp cit=false"].seeds == (0, 1)


def test_the_commands_collect_and_write(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, "n_trials=1", "seeds=[3]")
    run(spec)
    page, data = tmp_path / "page.md", tmp_path / "data"
    page.write_text(f"<!-- begin differences {spec.name} --><!-- end differences {spec.name} -->")
    command = CliRunner().invoke
    words = ["results", "collect", spec.name, "--root", str(tmp_path), "--out", str(data)]
    assert command(cli, words).output == f"1 runs in {data}\n"
    written = command(cli, ["results", "write", str(data), "--page", str(page)])
    assert str(page.with_suffix(".json")) in written.output
    assert "baseline" in page.read_text()
    page.write_text("<!-- begin test other --><!-- end test other -->")
    wrong = command(cli, ["results", "write", str(data), "--page", str(page)])
    assert wrong.exit_code == 2
    assert "a place for 'test other'" in wrong.output
