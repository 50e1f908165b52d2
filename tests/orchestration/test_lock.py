"""One driver per study directory, however the other one ends."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestration.lock import LockHeld, hold_directory

HOLD = """
import sys, pathlib
from orchestration.lock import hold_directory
with hold_directory(pathlib.Path(sys.argv[1]), "demo"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "study")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_driver_is_told_who_the_first_is(
    tmp_path: Path, holder: "subprocess.Popen[str]"
) -> None:
    with pytest.raises(LockHeld) as caught, hold_directory(tmp_path / "study", "demo"):
        pytest.fail("two drivers")
    assert caught.value.pid == holder.pid
    assert f"study 'demo' is being run by process {holder.pid} on " in str(caught.value)


@pytest.mark.chaos
def test_a_killed_driver_holds_nothing(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    holder.kill()
    holder.wait()
    with hold_directory(tmp_path / "study", "demo"):
        pass


def test_a_lock_is_free_again_after_its_context(tmp_path: Path) -> None:
    for _ in range(2):
        with hold_directory(tmp_path, "demo"):
            pass
