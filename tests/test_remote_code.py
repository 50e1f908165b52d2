"""Attacks by a tokenizer that is a program, and whom the command line may allow it."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from transformers import dynamic_module_utils

from comp.checkpoint import save_pruned
from comp.errors import UnsupportedModelError
from comp.models import load_model
from comp.models.presets import preset_directory
from orchestration import worker
from orchestration.job import Failure
from orchestration.store import read_run
from studies import session
from studies.cli import cli
from studies.specfile import write_spec
from tests.orchestration.trials import make_job
from tests.studies.synthetic import RUNNER, make_spec
from tests.tiny import FAMILIES

CODE = """
from pathlib import Path
from transformers import TokenizersBackend
Path({trap!r}).touch()
class Own(TokenizersBackend):
    pass
"""


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that appears when the model's code is run."""
    modules = str(tmp_path / "modules")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    worker.load.cache_clear()
    return tmp_path / "trap"


@pytest.fixture
def model(tmp_path: Path, trap: Path) -> str:
    """A real model whose tokenizer is a program."""
    directory = tmp_path / f"model-{tmp_path.name}"  # transformers keeps modules by this name
    shutil.copytree(preset_directory("blip-tiny-vqa"), directory)
    (directory / "own.py").write_text(CODE.format(trap=str(trap)))
    change(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Own"]})
    return str(directory)


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def evaluate(model: str, *words: str) -> int:
    command = ["evaluate", model, "--samples", "4", "--task", "vqa", *words]
    return int(cli.main(command, standalone_mode=False))


def test_it_is_refused_with_what_to_do(
    model: str, trap: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(model) == 2
    assert "read that code and allow it with --trust-remote-code" in capsys.readouterr().err
    assert not trap.exists()


def test_the_command_line_allows_it(model: str, trap: Path) -> None:
    assert evaluate(model, "--trust-remote-code") == 0
    assert trap.exists()


def test_neither_the_environment_nor_a_spec_allows_it(
    tmp_path: Path, model: str, trap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TRUST_REMOTE_CODE", "COMP_TRUST_REMOTE_CODE", "COMP_EVALUATE_TRUST_REMOTE_CODE"):
        monkeypatch.setenv(name, "1")
    assert evaluate(model) == 2
    command = ["prune", "prune-vqa", "--root", str(tmp_path), "--set", f"model={model}"]
    command += ["--set", "tracking.enabled=false"]
    for override in ("trust_remote_code=true", "pruning.trust_remote_code=true"):
        assert cli.main([*command, "--set", override], standalone_mode=False) == 2
    assert cli.main(command, standalone_mode=False) == 2
    assert not trap.exists()


def test_code_of_another_repository_is_never_run(model: str, trap: Path) -> None:
    mapped = {"AutoTokenizer": [None, "owner/name--own.Own"]}
    change(Path(model, "tokenizer_config.json"), auto_map=mapped)
    with pytest.raises(UnsupportedModelError, match="code of another repository"):
        load_model(model, trust_remote_code=True)
    assert not trap.exists()


def test_a_trusted_tokenizer_does_not_bring_its_model_in(model: str, trap: Path) -> None:
    evil = trap.with_name("evil")
    Path(model, "evil.py").write_text(CODE.format(trap=str(evil)))
    mapped = {"AutoConfig": "evil.Own", "AutoModel": "evil.Own", "AutoTokenizer": "evil.Own"}
    change(Path(model, "config.json"), auto_map=mapped)
    load_model(model, trust_remote_code=True)
    assert trap.exists()
    assert not evil.exists()


def test_a_worker_that_has_run_it_refuses_the_next_job_that_may_not(
    tmp_path: Path, model: str, trap: Path
) -> None:
    worker.load(model, "vqa", None, True)
    trap.unlink()
    job = make_job(tmp_path, model=model, kind="dense")
    (end,) = worker.run(dataclasses.replace(job, runner="orchestration.worker:prune"))
    assert isinstance(end, Failure)
    assert end.error == UnsupportedModelError.__name__
    assert not trap.exists()


def test_a_model_that_was_saved_by_a_trusting_run_is_refused_again(
    tmp_path: Path, model: str
) -> None:
    loaded = load_model(model, trust_remote_code=True)
    saved = tmp_path / "saved"
    save_pruned(FAMILIES["blip-vqa"].build(0), saved, tokenizer=loaded.tokenizer)
    with pytest.raises(UnsupportedModelError, match="asks to run code"):
        load_model(saved)


def test_a_resumed_study_trusts_nobody_because_an_earlier_driver_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(session.conduct_study.__kwdefaults__ or {}, "runner", RUNNER)
    spec = tmp_path / "spec.yaml"
    spec.write_text(write_spec(make_spec(tmp_path, "n_trials=1", "tracking.enabled=false")))
    root = ["--inline", "--root", str(tmp_path)]
    run = ["study", "run", str(spec), "--trust-remote-code", *root]
    assert cli.main(run, standalone_mode=False) == 0
    resume = ["study", "resume", "s", "--set", "n_trials=2", *root]
    assert cli.main(resume, standalone_mode=False) == 0
    trusted = {
        path.parent.name: read_run(path.parent).job.trust_remote_code
        for path in tmp_path.glob("runs/*/job.json")
    }
    assert trusted == {"s-dense": True, "s-0000": True, "s-0001": False}
