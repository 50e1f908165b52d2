"""Studies on a cluster's job server: submit, follow, detach, attach, stop."""

import json
import sys
import time
from typing import TYPE_CHECKING

import click

from studies.cli_base import (
    FAILURE,
    INTERRUPTED,
    LOCKED,
    answer,
    common,
    example,
    mistakes,
    say,
)

if TYPE_CHECKING:
    from orchestration.ray_jobs import JobState, RayJobs
    from studies.spec import StudySpec

SECOND_SECONDS = 3.0  # in which a second Ctrl-C stops the job that the first one left alone

address_option = click.option(
    "--address",
    metavar="URL",
    help="Run as a job of a Ray cluster: http://HOST:8265 (its dashboard) or ray://HOST:10001.",
)


class JobEnded(click.ClickException):
    """A job did not end well; the exit code is its driver's."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        vars(self)["exit_code"] = code


@click.command(epilog=example("comp study attach demo-vqa --address http://127.0.0.1:8265"))
@click.argument("name")
@click.option(
    "--address", metavar="URL", required=True, help="Where it runs as a job, see comp study run."
)
@common
def attach(name: str, address: str, as_json: bool) -> None:
    """Follow a study that runs as a job of a cluster.

    Ctrl-C detaches and the study goes on; a second Ctrl-C stops it. For a study that another
    process here runs there is 'comp study watch'.
    """
    from orchestration.ray_jobs import RayJobs

    with mistakes():
        jobs = RayJobs(address)
    state = jobs.find(name)
    if state is None:
        raise click.ClickException(
            f"no job at {jobs.address} runs study {name!r}; submit it with 'comp study run SPEC "
            f"--address {address}'"
        )
    follow(jobs, state.job, name, as_json=as_json)


def submit(spec: "StudySpec", address: str, words: list[str], *, as_json: bool) -> None:
    """Submits a study as a job and follows it.

    Args:
        spec: The checked spec.
        address: See ``RayJobs``.
        words: Further options for the job's ``comp study run``.
        as_json: See ``answer``.

    Raises:
        JobEnded: If the study is being run already, or does not end well.
    """
    from orchestration.ray_jobs import RayJobs
    from studies.specfile import write_spec

    with mistakes():
        jobs = RayJobs(address)
    known = jobs.find(spec.name)
    if known is not None and not known.has_ended:
        raise JobEnded(
            f"study {spec.name!r} is being run by job {known.job} at {jobs.address}; watch it "
            f"with 'comp study attach {spec.name} --address {address}'",
            LOCKED,
        )
    job = jobs.submit(spec.name, write_spec(spec), [*words, *(["--json"] if as_json else [])])
    say(f"submitted as job {job}; Ctrl-C detaches")
    follow(jobs, job, spec.name, as_json=as_json)


def follow(jobs: "RayJobs", job: str, study: str, *, as_json: bool) -> None:
    """Shows a job's output until it ends or Ctrl-C detaches.

    Raises:
        JobEnded: If it does not end well, or this process lets go of it.
    """
    tail: list[str] = []

    def write(text: str) -> None:
        tail[:] = [("".join(tail) + text)[-1_000_000:]]
        click.echo(text, nl=False, err=as_json)

    try:
        state = jobs.follow(job, write)
    except KeyboardInterrupt:
        _let_go(jobs, job, study)
        raise AssertionError("unreachable") from None
    if as_json:
        _repeat_json("".join(tail))
    if state.status != "SUCCEEDED":
        raise JobEnded(_reason(state), state.exit_code or FAILURE)


def _let_go(jobs: "RayJobs", job: str, study: str) -> None:
    """Detaches, or stops the job if Ctrl-C is pressed again soon.

    Raises:
        JobEnded: Always.
    """
    seconds = f"{SECOND_SECONDS:g} s"
    say(f"\ndetaching: job {job} goes on; press Ctrl-C again within {seconds} to stop it")
    try:
        time.sleep(SECOND_SECONDS)
    except KeyboardInterrupt:
        jobs.stop(job)
        raise JobEnded(
            f"job {job} is being stopped; finished stages are kept, and the same command goes on",
            INTERRUPTED,
        ) from None
    raise JobEnded(
        f"detached; watch it again with 'comp study attach {study} --address {jobs.address}'",
        INTERRUPTED,
    )


def _repeat_json(output: str) -> None:
    """Ends standard output with the job's line of JSON."""
    for line in reversed(output.splitlines()):
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict):
            answer(True, values, "")
            sys.stdout.flush()
            return


def _reason(state: "JobState") -> str:
    if state.status == "STOPPED":
        return f"job {state.job} was stopped; the same command goes on"
    code = "" if state.exit_code is None else f" with exit code {state.exit_code}"
    return f"job {state.job} ended{code}; its output is above"
