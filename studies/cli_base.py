"""What every command shares: exit codes, ``--json``, ``--debug``, and no traceback by surprise."""

import contextlib
import errno
import json
import logging
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from studies.folder import StudyFolder

FAILURE, MISTAKE, LOCKED, INTERRUPTED = 1, 2, 3, 130
DEFAULT_ROOT = "comp-runs"

Function = TypeVar("Function", bound=Callable[..., Any])


class Mistake(click.ClickException):
    """A user's mistake: one sentence, exit code 2."""

    exit_code = MISTAKE


class Interrupted(click.ClickException):
    """Stopped by Ctrl-C or SIGTERM with everything finished kept; exit code 130."""

    exit_code = INTERRUPTED


@contextlib.contextmanager
def mistakes() -> Iterator[None]:
    """Turns what checks raise into a ``Mistake``. For checks, not for work."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise Mistake(str(error)) from error


class CompGroup(click.Group):
    """The root command: maps every exception to a sentence and an exit code."""

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> int:
        """Runs the command line.

        Args:
            args: The words after ``comp``; ``sys.argv`` by default.
            prog_name: What usage lines call the program.
            complete_var: Environment variable of shell completion.
            standalone_mode: Whether to end the process with the exit code.
            **extra: Passed on to click.

        Returns:
            The exit code, if ``standalone_mode`` is off.
        """
        words = list(sys.argv[1:] if args is None else args)
        logging.basicConfig(stream=sys.stderr, format="comp: %(message)s", force=True)
        try:
            result = super().main(words, prog_name, complete_var, standalone_mode=False, **extra)
            code = result if isinstance(result, int) else 0
        except BrokenPipeError:
            code = FAILURE
        except (Exception, KeyboardInterrupt) as error:
            code = _explain(error, words)
        if standalone_mode:
            sys.exit(code)
        return code


def _explain(error: BaseException, words: Sequence[str]) -> int:
    """Says on standard error what went wrong and returns the exit code."""
    code, sentence = _verdict(error)
    if "--debug" in words:
        traceback.print_exception(error)
    if isinstance(error, click.UsageError):
        error.show()
    else:
        click.echo(f"comp: {sentence}", err=True)
    if "--json" in words:
        click.echo(json.dumps({"error": sentence, "exit_code": code}))
    return code


def _verdict(error: BaseException) -> tuple[int, str]:
    from orchestration.lock import LockHeld

    if isinstance(error, click.ClickException):
        return error.exit_code, error.format_message()
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return INTERRUPTED, "interrupted; finished stages are kept and the same command goes on"
    if isinstance(error, LockHeld):
        return LOCKED, str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        place = f" at {error.filename}" if error.filename else ""
        return FAILURE, f"the disk is full{place}; free some space and give the same command again"
    if isinstance(error, (RuntimeError, ValueError, OSError)) and str(error):
        return FAILURE, str(error)
    name = type(error).__name__
    return FAILURE, f"{name}: {error}; --debug shows where"


def example(*lines: str) -> str:
    """Returns an epilog that shows commands as they are typed."""
    return "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])


def common(function: Function) -> Function:
    """Adds ``--json`` (as ``as_json``) and ``--debug``, which every command takes."""
    for option in (
        click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks."),
        click.option(
            "--json",
            "as_json",
            is_flag=True,
            help="End standard output with one line of JSON; all else goes to standard error.",
        ),
    ):
        function = option(function)
    return function


def with_spec(function: Function) -> Function:
    """Adds ``--set`` (as ``overrides``) and ``--root``, which every command with a spec takes."""
    for option in (
        root_option,
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override a key of the spec, the value in YAML: --set pruning.num_stages=8.",
        ),
    ):
        function = option(function)
    return function


def root_option(function: Function) -> Function:
    """Adds ``--root``: where studies and runs lie."""
    return click.option(
        "--root",
        envvar="COMP_ROOT",
        show_envvar=True,
        metavar="DIRECTORY",
        help="Where studies and runs are kept; the spec's root (comp-runs) by default.",
    )(function)


def device_option(function: Function) -> Function:
    """Adds ``--device``."""
    return click.option("--device", default="auto", show_default=True, help="cpu, cuda, ...")(
        function
    )


def trust_option(function: Function) -> Function:
    """Adds ``--trust-remote-code``, which no spec, variable or file can say instead."""
    return click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run the code that a model's tokenizer brings along. Read it first.",
    )(function)


def answer(as_json: bool, values: dict[str, Any], text: str) -> None:
    """Prints a result: a text for people, or one line of JSON as the last of standard output."""
    click.echo(json.dumps(_plain(values), allow_nan=False) if as_json else text)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(text: str) -> None:
    """Prints something that is not the result; always on standard error."""
    click.echo(text, err=True)


def find_folder(name: str, root: str | None) -> "StudyFolder":
    """Returns the folder of a study that was started under a root.

    Raises:
        SpecError: If there is none.
    """
    from studies.folder import StudyFolder

    return StudyFolder.find(root or DEFAULT_ROOT, name)


def show_counts(counts: dict[str, int]) -> str:
    """Returns trials by state in words."""
    return ", ".join(f"{count} {state}" for state, count in counts.items()) or "none"
