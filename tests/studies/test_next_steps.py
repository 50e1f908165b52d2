import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from studies.folder import StudyFolder
from studies.next_steps import free_port, mlflow_command, next_steps
from studies.report import read_report
from studies.specfile import load_prune
from tests.studies.synthetic import make_spec
from tests.studies.test_driver import run


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """What is printed after a study in a directory whose name needs quoting."""
    spec = make_spec(tmp_path_factory.mktemp("a root"), "n_trials=1")
    run(spec)
    folder = StudyFolder.of(spec)
    return next_steps(read_report(folder), folder.location)


def test_there_are_three_commands_and_each_says_what_for(steps: list[tuple[str, str]]) -> None:
    assert [heading.partition(" ")[0] for heading, _ in steps] == ["all", "what", "the"]


def test_servers_are_started_on_loopback(steps: list[tuple[str, str]]) -> None:
    for _, command in steps[:2]:
        words = shlex.split(command)
        assert words[words.index("--host") + 1] == "127.0.0.1"


def test_the_spec_of_the_best_run_can_be_run_under_another_name(
    steps: list[tuple[str, str]],
) -> None:
    words = shlex.split(steps[2][1])
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    spec = load_prune(words[2], overrides)
    assert (spec.name, spec.model) == ("my-run", "blip-tiny-vqa")


def test_a_port_in_use_is_passed_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        assert free_port(taken) > taken


def test_a_tracking_server_is_named_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example:8443")
    assert mlflow_command(make_spec(tmp_path)) == "# open https://mlflow.example:8443"


@pytest.mark.slow
def test_the_dashboard_command_opens_the_study(steps: list[tuple[str, str]]) -> None:
    words = shlex.split(steps[1][1])
    words[0] = str(Path(sys.executable).parent / "optuna-dashboard")
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        found = wait_for(f"http://127.0.0.1:{words[-1]}/api/studies")
    finally:
        server.terminate()
        server.wait()
    assert '"study_name": "s"' in found or '"study_name":"s"' in found


def wait_for(address: str) -> str:
    for _ in range(150):
        try:
            with urllib.request.urlopen(address, timeout=2) as answer:
                return str(answer.read().decode())
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(address)
