"""Drivers as processes of their own, to be killed, refused and watched."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from orchestration.storage import Storage
from studies.folder import StudyFolder
from studies.summary import StudySummary, summarize

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
from studies.cli import cli
import studies.session as session
from orchestration.job import DEFAULT_RUNNER
session.conduct_study.__kwdefaults__["runner"] = sys.argv[1]
sys.exit(cli.main(sys.argv[2:], standalone_mode=False))
"""


def start(runner: str, *words: str, log: Path, **environment: str) -> "subprocess.Popen[bytes]":
    """The command ``comp``, whose studies run another runner than real prunings.

    Args:
        runner: See ``Job.runner``.
        words: What follows ``comp``.
        log: File for its output.
        environment: Further variables.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment}
    command = [sys.executable, "-c", SCRIPT, runner, *words]
    with log.open("ab") as stream:
        return subprocess.Popen(
            command, env=env, stdout=stream, stderr=stream, preexec_fn=listen_to_ctrl_c
        )


def listen_to_ctrl_c() -> None:
    """Undoes what a suite that runs in the background hands down: that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(happened: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.2)  # what is looked at can cost a tenth of that


def summary_of(root: Path) -> StudySummary:
    return summarize(StudyFolder(str(root), "s"))


def num_records(run: Path) -> int:
    """Records of a run that is under way; those of one that has ended are in tables."""
    return len(Storage(run).names("records"))
