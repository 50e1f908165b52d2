"""Attacks: files, specs and names that want to run code or to write elsewhere."""

import ast
import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from comp.checkpoint import save_pruned
from comp.models import load_model
from orchestration.job import Job
from orchestration.storage import Storage
from studies.cli import cli
from studies.errors import SpecError
from studies.folder import StudyFolder
from studies.specfile import read_spec
from studies.yaml_text import write_yaml
from tests.studies.synthetic import make_spec
from tests.tiny import FAMILIES

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for n in ("comp", "orchestration", "studies") for p in (ROOT / n).rglob("*.py"))

# Calls that run what a file says, by the last two parts of their name.
DANGEROUS = {
    "pickle.load",
    "pickle.loads",
    "torch.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "joblib.load",
    "shelve.open",
    "marshal.loads",
    "os.system",
    "eval",
    "exec",
}


def calls(path: Path) -> set[str]:
    """What a file calls, ``torch.load`` apart where it says that it reads data only."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return {
        ast.unparse(node.func)
        for node in nodes
        if "weights_only=True" not in map(ast.unparse, node.keywords)
    }


def keywords(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return {ast.unparse(node) for node in nodes if isinstance(node, ast.keyword)}


def test_no_source_calls_what_runs_a_file() -> None:
    assert {str(p): calls(p) & DANGEROUS for p in SOURCES if calls(p) & DANGEROUS} == {}


def test_no_source_trusts_code_of_others_or_starts_a_shell() -> None:
    wrong = {"trust_remote_code=True", "shell=True", "weights_only=False"}
    assert {str(p): keywords(p) & wrong for p in SOURCES if keywords(p) & wrong} == {}


class Trap:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_the_trap_works_where_it_is_stepped_on(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "trap")))
    assert (tmp_path / "trap").is_dir()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickled_weights_are_not_loaded(tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    save_pruned(FAMILIES["blip-nlvr"].build(0), model)
    (model / "model.safetensors").unlink()
    torch.save({"weight": Trap(tmp_path / "trap")}, model / name)
    with pytest.raises(Exception, match="cannot be read as data"):
        load_model(model)
    assert not (tmp_path / "trap").exists()


def test_code_that_comes_with_a_models_config_is_not_run(tmp_path: Path) -> None:
    model, trap = tmp_path / "model", tmp_path / "trap"
    save_pruned(FAMILIES["blip-nlvr"].build(0), model)
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(trap)!r})\nclass Evil: pass\n")
    config = json.loads((model / "config.json").read_text())
    mapped = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    (model / "config.json").write_text(json.dumps({**config, "auto_map": mapped}))
    load_model(model)
    assert not trap.exists()


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir [{trap}]",
        "name: !!python/object/new:os.mkdir [{trap}]",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
    ],
)
def test_a_spec_runs_nothing_and_does_not_explode(tmp_path: Path, text: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text.replace("{trap}", str(tmp_path / "trap")))
    with pytest.raises(ValueError, match=r"not readable as YAML|aliases"):
        read_spec(path)
    assert not (tmp_path / "trap").exists()


CLIMBERS = ["../up", "a/b", "/etc/x", "..", ".hidden", "a\0b", "a\nb", "-rf", "a" * 200, ""]


@pytest.mark.parametrize("name", CLIMBERS)
def test_names_cannot_climb_out_of_the_root(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match=r"name must (be 1 to|have at most)"):
        make_spec(tmp_path, f"name={write_yaml(name).strip()}")
    with pytest.raises(ValueError, match=r"run_id must be 1 to 128"):
        Job.from_dict(
            {
                "run_id": name,
                "study": "s",
                "trial": 0,
                "model": "m",
                "task": "t",
                "config": {},
                "seed": 0,
                "method": "comp",
                "run_dir": str(tmp_path),
            }
        )
    with pytest.raises(ValueError, match="run must be 1 to 128"):
        StudyFolder(str(tmp_path), "s").run(name)


@pytest.mark.parametrize("name", ["../up", "a/../../up", "/etc/x"])
def test_files_cannot_climb_out_of_a_storage(tmp_path: Path, name: str) -> None:
    storage = Storage(tmp_path / "in")
    for act in (
        lambda: storage.write(name, b"x"),
        lambda: storage.write_tree(name, Path.mkdir),
        lambda: storage.remove(name),
        lambda: storage.read(name),
        lambda: storage.child(name),
    ):
        with pytest.raises(ValueError, match="must stay inside it"):
            act()
    assert not (tmp_path / "up").exists()


@pytest.mark.parametrize("command", ["status", "best", "resume", "sync"])
def test_commands_do_not_follow_names_out_of_the_root(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["study", command, "../../etc", "--root", str(tmp_path)]
    assert cli.main(words, standalone_mode=False) == 2
    assert "study must be 1 to 128 letters" in capsys.readouterr().err
