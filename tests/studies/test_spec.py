import pytest

from studies.domains import CONFIG_KEYS
from studies.errors import SpecError
from studies.spec import StudySpec, identity, spec_hash
from studies.specfile import override, spec_of, write_spec
from studies.yaml_text import read_yaml
from tests.studies.synthetic import STUDY


def study(*overrides: str) -> StudySpec:
    spec = spec_of(override({**STUDY, "tracking": {"uri": "sqlite:///a.db"}}, overrides))
    assert isinstance(spec, StudySpec)
    return spec


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("trails=3", "unknown key 'trails'; did you mean 'n_trials'?"),
        ("pruning.num_stage=3", "pruning: unknown key 'num_stage'; did you mean 'num_stages'?"),
        ("resources.gpu=1", "resources: unknown key 'gpu'; did you mean 'gpus'?"),
        ("space.explration={kind: float, low: 0, high: 1}", "did you mean 'exploration'?"),
        ("pruning.ratios=[85]", "ratios must lie in (0, 1), but got 85.0; pass 0.85 for 85 %"),
        ("pruning.ratios=85", "pass 0.85 for 85 %"),
        ("objective={val_at: 80}", "val_at must be in [0, 1), but got 80; pass 0.8 for 80 %"),
        ("objective={area: [0.8, 0.5]}", "area must be two ascending ratios, but got [0.8, 0.5]"),
        ("objective={test_at: 0.8}", "the test split is never the objective"),
        ("objective={val_at: 0.9}", "up to ratio 0.9, but a trial may end at 0.8"),
        ("storage=sqlite:///a.db", "must be two databases, because Optuna and MLflow both keep"),
        ("objective={val_at: fin}", "val_at must be a ratio or 'end', but got 'fin'"),
        ("objective={val_up: 0.8}", "but got 'val_up'; did you mean 'val_at'?"),
        ("objective=[{val_at: 0.8}, {val_at: 0.8}]", "must not name a measure twice"),
        (
            "constraints=[{drop_at: 0.8}]",
            "a constraint must be a measure with at_most or at_least",
        ),
        (
            "constraints=[{drop_at: 0.9, at_most: 2}]",
            "up to ratio 0.9, but a trial may end at 0.8",
        ),
        ("sampler={kind: cmas}", "but got 'cmas'; did you mean 'cmaes'?"),
        ("sampler={kind: grid}", "space.exploration: step is missing, and a grid needs one"),
        ("sampler={kind: random, startup_trials: 3}", "unknown key 'startup_trials'"),
        ("pruner={kind: medan}", "but got 'medan'; did you mean 'median'?"),
        ("pruner={kind: wilcoxon}", "after 4 seeds at the earliest, so seeds must be more than"),
        ("enqueue=[{num_stage: 3}]", "enqueue.0: 'num_stage' is not searched by this study; did"),
        ("enqueue=[{num_stages: 99}]", "num_stages: 99 is not in the domain, whose nearest value"),
        ("space.exploration.step=0.3", "high must be a whole number of steps above low"),
        ("space.exploration.when=x", "when must be a mapping such as {schedule: mps}"),
        ("n_trials=0", "n_trials must be greater than or equal to 1, but got 0"),
        ("n_trials=many", "n_trials must be a valid integer, but got 'many'"),
        ("pruning.num_stages=true", "num_stages must not be true or false, but got True"),
        ("pruning.num_stages=no", "pruning.num_stages must be a valid integer, but got 'no'"),
        ("pruning.method=cmop", "but got 'cmop'; did you mean 'comp'?"),
        ("pruning.seed=4", "a study has no pruning.seed; write 'seeds: [4]' beside it"),
        ("space.num_stages.kind=itn", "but got 'itn'; did you mean 'int'?"),
        ("space.num_stages.low=50", "low must not be above high, but got low 50 and high 40"),
        ("space.num_stages.low=0", "low must be above 0 with log: true, but got 0"),
        ("space.exploration.high=2", "space.exploration: exploration must be in [0.0, 1.0]"),
        ("space.num_stages=3", "space.num_stages must be a mapping, but got 3"),
        ("space.seed={kind: int, low: 0, high: 1}", "seed cannot be searched"),
        ("space.eval_samples={kind: fixed, value: 9}", "set pruning.eval_samples"),
        ("space.modes={kind: categorical, choices: [[a]]}", "a choice must be a scalar"),
        ("space.modes={kind: categorical, choices: {x: [a]}}", "space.modes: modes must be among"),
        ("space.modes={kind: categorical, choices: []}", "choices must be a list of scalars"),
        ("seeds=[0, 0]", "seeds must be one or more different numbers, but got [0, 0]"),
        ("storage=mysql://x", "storage must be 'journal' or a URL"),
        ("name=../x", "name must be 1 to 128 letters"),
        ("name=8", "name must be text, but got 8; quote it"),
        (f"name={'x' * 101}", "name must have at most 100 characters, but got 101"),
        ("model=", "model must be text, but got None"),
        ("kind=prunee", "kind must be one of 'prune', 'study', but got 'prunee'; did you mean"),
        ("version=2", "version must be 1, but got 2"),
        ("resources.threads=0", "resources.threads must be greater than or equal to 1"),
        ("resources.gpus=1.5", "gpus must be auto, a share of one or a whole number, but got 1.5"),
        ("resources.shard=true", "shard needs workers to share with; set workers to 2 or more"),
        ("resources.gpus=some", "resources.gpus must be auto, a share of one or a whole"),
        ("sampler=random", "sampler must be a mapping, but got 'random'"),
        ("deadline_minutes=-1", "deadline_minutes must be greater than 0, but got -1"),
    ],
)
def test_a_mistake_is_named_with_value_rule_and_remedy(change: str, complaint: str) -> None:
    with pytest.raises(SpecError) as caught:
        study(change)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        study("n_trials=0", "parallel=0")
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("key", ["name", "kind", "model", "task", "space", "objective"])
def test_what_has_no_default_must_be_there(key: str) -> None:
    with pytest.raises(SpecError, match=f"{key} .*(missing|is)"):
        spec_of({k: v for k, v in STUDY.items() if k != key})


def test_a_spec_must_be_a_mapping() -> None:
    with pytest.raises(SpecError, match="the spec must be a mapping"):
        spec_of([1])


def test_numbers_written_with_an_exponent_are_numbers() -> None:
    assert study("pruning.learning_rate=1e-4").pruning.learning_rate == 1e-4


def test_one_ratio_needs_no_brackets() -> None:
    assert study("pruning.ratios=0.8").pruning.ratios == (0.8,)


def test_a_written_spec_reads_back_equal() -> None:
    spec = study("seeds=[0, 1]", "deadline_minutes=3", "data=some/where")
    assert spec_of(read_yaml(write_spec(spec))) == spec


def test_a_written_spec_spells_every_default_out() -> None:
    assert set(read_yaml(write_spec(study()))["pruning"]) == {*CONFIG_KEYS, "version"}


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        study().name = "other"


@pytest.mark.parametrize(
    "change", ["n_trials=9", "parallel=7", "resources.cpus=2", "root=x", "tracking.enabled=false"]
)
def test_what_does_not_touch_results_leaves_the_hash_alone(change: str) -> None:
    assert spec_hash(study(change)) == spec_hash(study())


@pytest.mark.parametrize(
    "change", ["seeds=[1]", "pruning.num_stages=11", "space.num_stages.high=9", "task=nlvr2"]
)
def test_what_decides_results_changes_the_hash(change: str) -> None:
    assert spec_hash(study(change)) != spec_hash(study())


def test_identity_is_plain_json() -> None:
    import json

    assert json.loads(json.dumps(identity(study()))) == identity(study())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            ["objective=[{val_at: 0.8}, {gflops_at: end}]", "pruner={kind: median}"],
            "pruner must be left out of a study with several objectives",
        ),
        (
            ["objective=[{val_at: 0.8}, {gflops_at: end}]", "sampler={kind: cmaes}"],
            "sampler cmaes takes one objective",
        ),
        (
            [
                "space.num_stages={kind: int, low: 1, high: 9999}",
                "space.exploration.step=0.001",
                "sampler={kind: grid}",
            ],
            "the grid has 5009499 combinations, which is more than 100000",
        ),
    ],
)
def test_what_does_not_go_together_is_a_sentence(changes: list[str], complaint: str) -> None:
    with pytest.raises(SpecError) as caught:
        study(*changes)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
