import dataclasses
from pathlib import Path

import pytest
from click.testing import CliRunner

from studies.cli import cli
from studies.errors import SpecError
from studies.spec import StudySpec
from studies.specfile import load_prune, load_study, override, read_spec, write_spec
from studies.yaml_text import write_yaml
from tests.studies.synthetic import STUDY


@pytest.fixture
def spec_path(tmp_path: Path) -> Path:
    path = tmp_path / "my-study.yaml"
    path.write_text(write_yaml(STUDY), encoding="utf-8")
    return path


def test_overrides_reach_into_sections() -> None:
    values = override({"a": {"b": 1, "c": 2}}, ["a.b=3", "d.e=[1, 2]"])
    assert values == {"a": {"b": 3, "c": 2}, "d": {"e": [1, 2]}}


def test_later_overrides_win() -> None:
    assert override({}, ["a=1", "a=2"]) == {"a": 2}


def test_overrides_leave_the_original_alone() -> None:
    values = {"a": {"b": 1}}
    override(values, ["a.b=2"])
    assert values == {"a": {"b": 1}}


def test_an_override_may_hold_an_equals_sign() -> None:
    assert override({}, ["storage=sqlite:///x?timeout=3"]) == {"storage": "sqlite:///x?timeout=3"}


@pytest.mark.parametrize("text", ["n_trials", "=3", "a..b=1"])
def test_an_override_needs_a_key_and_a_value(text: str) -> None:
    with pytest.raises(SpecError, match="--set takes key=value"):
        override({}, [text])


def test_an_override_cannot_reach_into_a_scalar() -> None:
    with pytest.raises(SpecError, match="asks for a key 'x' inside 'demo'"):
        override({"name": "demo"}, ["name.x=2"])


def test_a_missing_file_names_the_nearest(spec_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"did you mean 'my-study\.yaml'"):
        read_spec(spec_path.parent / "my-stduy.yaml")


def test_a_missing_preset_names_the_nearest() -> None:
    with pytest.raises(FileNotFoundError, match="did you mean 'demo-vqa'"):
        read_spec("demo-vqaa")


def test_the_file_is_named_in_every_error(spec_path: Path) -> None:
    with pytest.raises(SpecError, match=r"my-study\.yaml: n_trials must be"):
        read_spec(spec_path, ["n_trials=0"])


def test_an_unknown_model_names_the_nearest(spec_path: Path) -> None:
    with pytest.raises(SpecError, match="did you mean 'blip-tiny-vqa'"):
        load_study(str(spec_path), ["model=blip-tiny-vaq"])


def test_an_unknown_task_names_the_nearest(spec_path: Path) -> None:
    with pytest.raises(SpecError, match=r"task must be one of vqa, nlvr2.*did you mean 'vqa'"):
        load_study(str(spec_path), ["task=vqaa"])


def test_a_model_of_another_task_is_refused(spec_path: Path) -> None:
    with pytest.raises(SpecError, match="was trained for task 'vqa', but task is 'nlvr2'"):
        load_study(str(spec_path), ["task=nlvr2"])


def test_missing_data_is_found_before_any_work(spec_path: Path) -> None:
    with pytest.raises(SpecError, match="there is none at 'no/where'"):
        load_study(str(spec_path), ["data=no/where"])


def test_an_address_that_mlflow_cannot_use_is_found_before_any_work(spec_path: Path) -> None:
    with pytest.raises(SpecError, match=r"tracking\.uri: the MLflow address must start with"):
        load_study(str(spec_path), ["tracking.uri=file:./mlruns"])


def test_a_spec_of_the_other_kind_names_its_command(spec_path: Path) -> None:
    with pytest.raises(SpecError, match=r"run it with 'comp study run .*my-study\.yaml'"):
        load_prune(str(spec_path), [])
    with pytest.raises(SpecError, match="run it with 'comp prune prune-vqa'"):
        load_study("prune-vqa", [])


def test_paths_become_absolute(
    spec_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    spec = load_study(str(spec_path), ["model=my-model"], "my-runs")
    assert (spec.model, spec.root) == (str(tmp_path / "my-model"), str(tmp_path / "my-runs"))


def test_a_written_spec_begins_with_what_it_is(spec_path: Path) -> None:
    text = write_spec(read_spec(spec_path))
    assert text.splitlines()[:3] == ["version: 1", "kind: study", "name: s"]


def extending(spec_path: Path, text: str) -> Path:
    path = spec_path.parent / "other.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_spec_states_what_is_otherwise_than_in_the_one_it_extends(spec_path: Path) -> None:
    path = extending(spec_path, "extends: my-study.yaml\nname: o\npruning: {batch_size: 8}\n")
    own, base = read_spec(path, ["seeds=[3]"]), read_spec(spec_path)
    assert (own.name, own.pruning.batch_size, own.model) == ("o", 8, base.model)
    assert own.pruning == dataclasses.replace(base.pruning, batch_size=8)
    assert isinstance(own, StudySpec)
    assert isinstance(base, StudySpec)
    assert (own.space, own.seeds) == (base.space, (3,))
    assert "extends" not in write_spec(own)


def test_a_preset_can_be_extended_and_shown_whole(tmp_path: Path) -> None:
    path = extending(tmp_path / "x", "extends: main-vqa\nname: main-vqa\n")
    assert read_spec(path) == read_spec("main-vqa")
    shown = CliRunner().invoke(cli, ["presets", "show", "cim-vqa", "--whole"]).stdout
    path.write_text(shown, encoding="utf-8")
    assert read_spec(path) == read_spec("cim-vqa")
    assert "extends" not in shown


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("extends: other.yaml\nname: o\n", "must be a spec that extends nothing itself"),
        ("extends: cim-vqa\nname: o\n", "must be a spec that extends nothing itself"),
        ("extends: main-vqa\n", "but got extends 'main-vqa' and name None"),
        ("extends: [main-vqa]\nname: o\n", r"but got extends \['main-vqa'\] and name 'o'"),
        ("extends: main-vqa\nname: o\nspice: {}\n", "unknown key 'spice'; did you mean 'space'"),
    ],
)
def test_an_extension_that_cannot_be_followed_is_refused(
    spec_path: Path, text: str, sentence: str
) -> None:
    with pytest.raises(SpecError, match=sentence):
        read_spec(extending(spec_path, text))


def test_a_spec_that_is_extended_must_be_there(spec_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no preset 'main-vqaa'; did you mean 'main-vqa'"):
        read_spec(extending(spec_path, "extends: main-vqaa\nname: o\n"))
