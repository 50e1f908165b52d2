"""The command line as a person and as a script meet it: words, exit codes, JSON, speed."""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from orchestration.lock import hold_directory
from studies.cli import cli
from studies.report import read_report, write_report
from studies.yaml_text import write_yaml
from tests.studies.synthetic import STUDY, make_spec
from tests.studies.test_driver import plant_failure, run

ROOT = Path(__file__).parents[2]


def commands(group: click.Group, *path: str) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)


ALL = sorted(commands(cli))
LEAVES = [path for path in ALL if path not in {p[:-1] for p in ALL}]


def invoke(*words: str) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words], prog_name="comp")


def json_of(result: Result) -> dict[str, object]:
    values = json.loads(result.stdout.splitlines()[-1])
    assert isinstance(values, dict)
    return values


def comp(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "studies.cli", *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with one finished study of four trials, one of which failed."""
    root = tmp_path_factory.mktemp("runs")
    plant_failure(root, "s-0002")
    spec = make_spec(root, "n_trials=4", "tracking.enabled=false")
    run(spec)
    return root


@pytest.fixture
def spec_path(tmp_path: Path) -> Path:
    path = tmp_path / "my-study.yaml"
    path.write_text(write_yaml(STUDY), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_command_shows_a_real_example(path: tuple[str, ...]) -> None:
    result = invoke(*path, "--help")
    assert result.exit_code == 0
    assert "  Example:\n    comp " in result.stdout


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_command_takes_json_and_debug(path: tuple[str, ...]) -> None:
    text = invoke(*path, "--help").stdout
    assert "--json" in text
    assert "--debug" in text


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_examples_name_commands_and_options_that_exist(path: tuple[str, ...]) -> None:
    text = invoke(*path, "--help").stdout
    for line in text.partition("  Example:\n")[2].splitlines():
        words = line.split()
        assert tuple(words[1 : 1 + len(path)]) == path
        options = [word for word in words if word.startswith("--")]
        assert [option for option in options if option not in text] == []


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["stduy"], "study"),
        (["study", "rnu"], "run"),
        (["study", "run", "smoke", "--rot=x"], "--root"),
        (["study", "run", "smokee"], "did you mean 'smoke'"),
        (["presets", "show", "demo-vqaa"], "did you mean 'demo-vqa'"),
        (["study", "run", "smoke", "--set", "trails=3"], "did you mean 'n_trials'"),
        (
            ["study", "run", "smoke", "--set", "model=blip-tiny-vaq"],
            "did you mean 'blip-tiny-vqa'",
        ),
        (["study", "run", "smoke", "--set", "pruning.ratios=[85]"], "pass 0.85 for 85 %"),
        (["train", "blip-tiny-vaq"], "did you mean 'blip-tiny-vqa'"),
        (["evaluate", "blip-tiny-vaq"], "did you mean 'blip-tiny-vqa'"),
        (["diagnose", "blip-tiny-vaq"], "did you mean 'blip-tiny-vqa'"),
        (["diagnose", "blip-tiny-vqa", "--share", "25"], "--share must be in (0, 1), but got 25"),
        (["diagnose", "blip-tiny-vqa", "--plot", "a.pdf"], "--plot must name a .png file"),
        (["demo", "vq"], "'vqa', 'nlvr2'"),
        (["compare"], "Missing argument"),
    ],
)
def test_a_mistake_exits_with_2_and_a_hint(words: list[str], hint: str) -> None:
    result = invoke(*words)
    assert (result.exit_code, hint in result.stderr) == (2, True), result.stderr
    assert "Traceback" not in result.output


def test_a_mistake_is_json_too_for_scripts() -> None:
    result = invoke("study", "run", "smoke", "--set", "n_trials=0", "--json")
    values = json_of(result)
    assert values["exit_code"] == 2
    assert "n_trials must be" in str(values["error"])


def test_debug_shows_where_a_mistake_was_found() -> None:
    assert "Traceback" in invoke("study", "run", "nowhere", "--debug").stderr


def test_a_study_that_runs_elsewhere_exits_with_3(spec_path: Path, tmp_path: Path) -> None:
    with hold_directory(tmp_path / "studies" / "s", "s"):
        result = invoke("study", "run", str(spec_path), "--root", str(tmp_path), "--inline")
    assert result.exit_code == 3
    assert f"process {os.getpid()}" in result.stderr


def test_inline_says_that_there_are_no_other_workers(spec_path: Path, tmp_path: Path) -> None:
    words = ["--root", str(tmp_path), "--inline", "--set", "resources.workers=2"]
    with hold_directory(tmp_path / "studies" / "s", "s"):
        result = invoke("study", "run", str(spec_path), *words)
    assert "--inline runs a trial in this process alone, not in 2\n" in result.stderr


def test_a_study_of_another_spec_exits_with_2(root: Path, spec_path: Path) -> None:
    words = ["--root", str(root), "--set", "space.num_stages.high=50"]
    result = invoke("study", "run", str(spec_path), *words)
    assert result.exit_code == 2
    assert "started with space.num_stages.high = 40, but the spec now has 50" in result.stderr


def test_a_finished_study_prints_its_result_again_without_working(
    root: Path, spec_path: Path
) -> None:
    words = ["--root", str(root), "--set", "n_trials=4"]
    result = invoke("study", "run", str(spec_path), *words)
    assert result.exit_code == 0, result.output
    assert "best of 3 trials: trial" in result.stdout
    assert str(root / "studies" / "s" / "curves.png") in result.stdout
    assert (root / "studies" / "s" / "curves.png").stat().st_size > 10_000


def test_a_finished_study_needs_only_its_name(root: Path) -> None:
    result = invoke("study", "resume", "s", "--root", str(root), "--json")
    values = json_of(result)
    assert values["counts"] == {"complete": 3, "fail": 1}
    assert values["why"] == "finished"


def test_status_shows_every_trial_and_why_one_failed(root: Path) -> None:
    result = invoke("study", "status", "s", "--root", str(root))
    assert result.stdout.splitlines()[0] == "s: 3 complete, 1 fail of 4 trials"
    assert "run s-0002: loss is nan in stage 2" in result.stdout


def test_status_is_a_table_that_ends_with_the_best_trial(root: Path) -> None:
    head, *rows, last = invoke("study", "status", "s", "--root", str(root)).stdout.splitlines()[1:]
    assert head.split() == ["trial", "state", "value", "minutes", "chosen"]
    states = ["complete", "complete", "fail", "complete"]
    assert [row.split()[:2] for row in rows] == [[str(n), s] for n, s in enumerate(states)]
    assert re.search(
        r"1  complete  \d\d\.\d\d      0\.\d  .*num_stages \d+, exploration 0", rows[1]
    )
    values = {n: float(rows[n].split()[2]) for n in (0, 1, 3)}
    best = max(values, key=lambda number: values[number])
    assert last == f"best: trial {best}, {values[best]:.2f}"


def test_best_is_a_table_from_the_dense_model_on(root: Path) -> None:
    lines = invoke("study", "best", "s", "--root", str(root)).stdout.splitlines()
    number = json_of(invoke("study", "best", "s", "--root", str(root), "--json"))["number"]
    assert lines[0].startswith(f"best of 3 trials: trial {number}, validation at ratio 0.8 ")
    assert "(num_stages " in lines[0]
    assert lines[2].split() == [
        *("ratio", "GFLOPs", "parameters", "validation", "test", "latency", "ms", "speed-up"),
    ]
    assert [line.split()[0] for line in lines[3:6]] == ["dense", "0.500", "0.800"]
    assert lines[3].endswith("20.0 -> 20.0     1.00x")
    assert lines[-1] == str(root / "runs" / f"s-{number:04d}")


def test_what_is_enqueued_is_the_next_trial(tmp_path: Path) -> None:
    run(make_spec(tmp_path, "n_trials=1", "tracking.enabled=false"))
    words = ("study", "enqueue", "s", "num_stages=33", "--root", str(tmp_path))
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    assert result.stdout == "next: num_stages 33\n"
    more = "comp study resume s --set n_trials=2"
    assert result.stderr == f"the study has its 1 trials; {more!r} runs this one\n"
    run(make_spec(tmp_path, "n_trials=2", "tracking.enabled=false"))
    trials = json_of(invoke("study", "status", "s", "--root", str(tmp_path), "--json"))["trials"]
    assert isinstance(trials, list)
    assert trials[1]["params"]["num_stages"] == 33
    assert 0 <= trials[1]["params"]["exploration"] <= 0.5


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("num_stage=3", "'num_stage' is not searched by this study; did you mean 'num_stages'"),
        ("num_stages=99", "num_stages: 99 is not in the domain, whose nearest value is 40"),
        ("num_stages", "must be KEY=VALUE, for example num_stages=12, but got 'num_stages'"),
    ],
)
def test_what_cannot_be_tried_is_not_enqueued(root: Path, setting: str, complaint: str) -> None:
    result = invoke("study", "enqueue", "s", setting, "--root", str(root))
    assert (result.exit_code, complaint in result.stderr) == (2, True), result.stderr
    assert not (root / "studies" / "s" / "enqueued").exists()


def test_status_without_a_name_lists_the_studies(root: Path) -> None:
    result = invoke("study", "status", "--root", str(root), "--json")
    counts = {"complete": 3, "fail": 1}
    assert json_of(result) == {"studies": [{"name": "s", "counts": counts}]}


def test_best_names_settings_curve_and_directory(root: Path) -> None:
    values = json_of(invoke("study", "best", "s", "--root", str(root), "--json"))
    number = values["number"]
    assert values["directories"] == [str(root / "runs" / f"s-{number:04d}")]
    assert isinstance(values["table"], list)
    assert [row["ratio_asked"] for row in values["table"]] == [0.0, 0.5, 0.8]


def test_an_unknown_study_names_the_nearest(root: Path) -> None:
    result = invoke("study", "status", "t", "--root", str(root))
    assert result.exit_code == 2
    assert "studies there: s" in result.stderr


def test_compare_writes_what_it_is_asked_for(root: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("all.csv", "all.parquet", "all.png")]
    options = [f"--{path.suffix[1:]}={path}" for path in files]
    result = invoke("compare", "s", "--root", str(root), "--at", "0.65", *options, "--json")
    values = json_of(result)
    assert values["ratios"] == [0.65]
    assert values["files"] == [*map(str, files), str(tmp_path / "all.svg")]
    assert all(path.stat().st_size > 500 for path in files)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["compare", "s", "--at", "0.9"], "no run reaches ratio 0.9; the highest is 0.800"),
        (["compare", "s-0009"], "did you mean 's-000"),
        (["compare", "s", "--csv", "x.txt"], "must end in .csv"),
    ],
)
def test_compare_says_what_cannot_be_compared(
    root: Path, words: list[str], complaint: str
) -> None:
    result = invoke(*words, "--root", str(root))
    assert (result.exit_code, complaint in result.stderr) == (2, True), result.stderr


def test_a_study_that_does_not_use_mlflow_has_nothing_to_sync(tmp_path: Path) -> None:
    run(make_spec(tmp_path, "n_trials=1", "tracking.enabled=false"))
    result = invoke("study", "sync", "s", "--root", str(tmp_path))
    assert result.exit_code == 2
    assert "tracking.enabled: false" in result.stderr


def test_models_and_presets_are_listed() -> None:
    assert "blip-tiny-vqa" in json_of(invoke("models", "--json"))["models"]  # type: ignore[operator]
    assert "demo-vqa" in json_of(invoke("presets", "list", "--json"))["presets"]  # type: ignore[operator]
    assert invoke("presets").exit_code == 0


def test_a_preset_is_shown_as_the_file_it_is(tmp_path: Path) -> None:
    from studies.specfile import read_spec

    shown = tmp_path / "mine.yaml"
    shown.write_text(invoke("presets", "show", "demo-vqa").stdout, encoding="utf-8")
    assert read_spec(shown) == read_spec("demo-vqa")


def test_an_unexpected_failure_exits_with_1_and_one_sentence(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    def explode(*_: object) -> None:
        raise KeyError("loose end")

    monkeypatch.setattr("studies.summary.summarize", explode)
    result = invoke("study", "status", "s", "--root", str(root))
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert "KeyError: 'loose end'; --debug shows where" in result.stderr


def test_the_process_exits_with_the_code_and_ends_in_json() -> None:
    done = comp("presets", "show", "nothing", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["exit_code"] == 2


def test_help_is_there_in_less_than_four_tenths_of_a_second() -> None:
    def seconds() -> float:
        """Processor time of the child, so that a busy machine does not fail it."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert comp("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) <= 0.4


def test_the_report_is_written_beside_the_study(root: Path) -> None:
    from studies.folder import StudyFolder

    folder = StudyFolder.find(root, "s")
    names = {Path(path).name for path in write_report(folder, read_report(folder))}
    assert names == {"curves.png", "curves.svg", "curves.parquet", "report.md", "report.json"}


@pytest.mark.slow
def test_a_real_study_runs_from_the_command_line(tmp_path: Path) -> None:
    words = ["study", "run", "smoke", "--inline", "--root", str(tmp_path), "--json"]
    small = ["n_trials=1", "pruning.ratios=[0.1]", "objective={val_at: 0.1}"]
    small += ["pruning.eval_samples=16", "pruning.test_samples=16", "tracking.enabled=false"]
    small += ["pruning.steps_per_stage=1", "pruning.fine_tune_steps=1"]
    small += [f"pruning.{name}=8" for name in ("calibration_samples", "probe_samples")]
    done = comp(*words, *(word for change in small for word in ("--set", change)))
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout.splitlines()[-1])
    assert values["counts"] == {"complete": 1}
    model = tmp_path / "runs" / "smoke-0000"
    words = ["--json", "--threads", "1", "--batch-size", "8", "--repeats", "2"]
    measured = json_of(invoke("measure", str(model), *words))
    assert measured["repeats"] == 2
    evaluated = json_of(invoke("evaluate", str(model), "--samples", "16", "--json"))
    assert evaluated["num_samples"] == 16
    assert float(str(evaluated["gmacs"])) < 0.043  # the dense model has 0.0431


@pytest.mark.slow
def test_the_interference_of_a_model_is_measured_and_drawn(tmp_path: Path) -> None:
    words = ["blip-tiny-vqa", "--samples", "8", "--plot", str(tmp_path / "found.png"), "--json"]
    values = json_of(invoke("diagnose", *words))
    layers = values["layers"]
    assert isinstance(layers, list)
    assert {layer["encoder"] for layer in layers} == {"vision", "text"}
    assert all(0 <= layer["overlap"] <= 1 for layer in layers)
    assert {path.name for path in tmp_path.iterdir()} == {"found.png", "found.svg"}
