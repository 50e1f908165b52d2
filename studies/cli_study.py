"""``comp study``: run, continue and look at what was run."""

import contextlib
from typing import TYPE_CHECKING

import click

from comp.lazy import without_collection
from studies.cli_base import (
    DEFAULT_ROOT,
    LOCKED,
    Interrupted,
    answer,
    common,
    example,
    find_folder,
    mistakes,
    root_option,
    say,
    show_counts,
    trust_option,
    with_spec,
)
from studies.cli_jobs import JobEnded, address_option, attach, submit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from studies.report import StudyReport
    from studies.spec import StudySpec

LAST_TRIALS = 40  # that status shows
GO_ON = "the same command goes on"
inline_option = click.option(
    "--inline", is_flag=True, help="One trial after the other in this process, without Ray."
)


@click.group(epilog=example("comp study run demo-vqa --set n_trials=12"))
def study() -> None:
    """Search settings with Optuna on a pool of Ray workers."""


@study.command(
    epilog=example(
        "comp study run demo-vqa --root comp-runs --set n_trials=12",
        "comp study run demo-vqa --root s3://bucket/comp --address http://127.0.0.1:8265",
    )
)
@click.argument("spec")
@inline_option
@address_option
@trust_option
@with_spec
@common
def run(
    spec: str,
    inline: bool,
    address: str | None,
    trust_remote_code: bool,
    overrides: tuple[str, ...],
    root: str | None,
    as_json: bool,
) -> None:
    """Run the study of SPEC, a YAML file or a preset; the same command continues it."""
    from studies.specfile import load_studies, load_study_for

    with mistakes():
        if address is None:
            checked = load_studies(spec, overrides, root)
        else:
            checked = [load_study_for(address, spec, overrides, root)]
    if address is not None:
        words = ["--trust-remote-code"] if trust_remote_code else []
        submit(checked[0], address, [*words, *(["--inline"] if inline else [])], as_json=as_json)
        return
    for number, one in enumerate(checked, 1):
        if len(checked) > 1:
            say(f"study {number} of {len(checked)}: {one.name}")
        conduct(one, inline=inline, trust_remote_code=trust_remote_code, as_json=as_json)


study.add_command(attach)


@study.command(epilog=example("comp study resume demo-vqa --set n_trials=20"))
@click.argument("name")
@inline_option
@trust_option
@with_spec
@common
def resume(
    name: str,
    inline: bool,
    trust_remote_code: bool,
    overrides: tuple[str, ...],
    root: str | None,
    as_json: bool,
) -> None:
    """Go on with a study that was started under the root."""
    from studies.specfile import load_frozen_study

    with mistakes():
        folder = find_folder(name, root)
        checked = load_frozen_study(folder.read_values(), folder.location, overrides)
    conduct(checked, inline=inline, trust_remote_code=trust_remote_code, as_json=as_json)


@study.command(epilog=example("comp study status demo-vqa"))
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="All trials, not the last ones.")
@root_option
@common
@without_collection()
def status(name: str | None, everything: bool, root: str | None, as_json: bool) -> None:
    """Show the trials of a study, or all studies."""
    from studies.folder import StudyFolder
    from studies.report import trial_cells, trial_dict, value_text
    from studies.summary import summarize
    from studies.text_table import columns

    if name is None:
        base = root or DEFAULT_ROOT
        found = [summarize(folder) for folder in StudyFolder.all_under(base)]
        lines = [f"{one.name}: {show_counts(one.counts)} of {one.n_trials}" for one in found]
        studies = [{"name": one.name, "counts": one.counts} for one in found]
        answer(as_json, {"studies": studies}, "\n".join(lines) or f"no studies under {base}")
        return
    with mistakes():
        folder = find_folder(name, root)
    summary = summarize(folder)
    values = {
        "study": name,
        "counts": summary.counts,
        "n_trials": summary.n_trials,
        "front": [trial.number for trial in summary.front],
        "trials": [trial_dict(trial) for trial in summary.trials],
    }
    lines = [f"{name}: {show_counts(summary.counts)} of {summary.n_trials} trials"]
    shown = summary.trials if everything else summary.trials[-LAST_TRIALS:]
    if len(shown) < len(summary.trials):
        lines.append(f"the last {len(shown)} of them (--all shows all):")
    if summary.trials:
        lines += columns(trial_cells(shown, summary.objective))
    if summary.best is not None:
        lines.append(f"best: trial {summary.best.number}, {value_text(summary.best, 0)}")
    if any(trial.by_seed[1:] for trial in shown):
        lines.append("±: 95 % confidence interval of the mean over seeds")
    answer(as_json, values, "\n".join(lines))


@study.command(epilog=example("comp study best demo-vqa --json"))
@click.argument("name")
@root_option
@common
@without_collection()
def best(name: str, root: str | None, as_json: bool) -> None:
    """Show the best trial: its settings, its curve and where its models are."""
    from studies.report import read_report, trial_dict

    with mistakes():
        folder = find_folder(name, root)
    report = read_report(folder, best_alone=True)
    winner = report.summary.best
    if winner is None:
        raise click.ClickException(report.summary.why_no_best)
    directories = [folder.run(run_id) for run_id in winner.runs]
    values = {**trial_dict(winner), "directories": directories, "table": report.table}
    answer(as_json, values, "\n".join([report.to_text(), "", *directories]))


@study.command(epilog=example("comp study sync demo-vqa"))
@click.argument("name")
@click.option("--all", "everything", is_flag=True, help="Send every run, not the unsent ones.")
@root_option
@common
def sync(name: str, everything: bool, root: str | None, as_json: bool) -> None:
    """Send to MLflow what it lacks, for example after its server was down."""
    from studies.session import sync_study

    with mistakes():
        folder = find_folder(name, root)
        is_tracked = folder.read_spec().tracking.enabled
        if not is_tracked:
            raise ValueError(f"study {name!r} has tracking.enabled: false, so nothing is sent")
    with watchable(folder.read_spec()):
        sent, total = sync_study(folder, everything=everything)
    text = f"sent {len(sent)} of {total} runs" if sent else f"none of {total} runs is unsent"
    answer(as_json, {"study": name, "sent": sent, "runs": total}, text)


def conduct(
    spec: "StudySpec",
    *,
    inline: bool,
    as_json: bool,
    trust_remote_code: bool = False,
    next_steps: "Callable[[StudyReport, str], list[tuple[str, str]]] | None" = None,
) -> None:
    """Runs a study unless it is finished, writes its report and prints the result.

    Args:
        spec: The checked spec.
        inline: Without Ray.
        as_json: See ``answer``.
        trust_remote_code: See ``Job.trust_remote_code``.
        next_steps: Gives headings and commands to print below the result.
    """
    from studies.folder import StudyFolder
    from studies.report import read_report, report_metrics, write_report
    from studies.session import conduct_study, send_missed, send_report
    from studies.summary import summarize

    folder, why = StudyFolder.of(spec), "finished"
    with mistakes():
        folder.check(spec)
    if folder.is_started and summarize(folder, spec).is_finished:
        send_missed(spec)
    else:
        if inline and spec.resources.workers > 1:
            say(f"--inline runs a trial in this process alone, not in {spec.resources.workers}")
        with watchable(spec):
            outcome = conduct_study(spec, inline=inline, trust_remote_code=trust_remote_code)
        why, counts = outcome.why, show_counts(outcome.counts)
        if why == "interrupted":
            raise Interrupted(f"stopped ({counts} of {spec.n_trials} trials); {GO_ON}")
        if why == "deadline":
            say(f"the deadline has passed ({counts} of {spec.n_trials} trials); {GO_ON}")
    report = read_report(folder)
    if why == "finished" and report.summary.best is None:
        reasons = {trial.reason for trial in report.summary.trials if trial.reason}
        raise click.ClickException("; ".join([report.summary.why_no_best, *sorted(reasons)]))
    written = write_report(folder, report)
    send_report(folder, report_metrics(report))
    values = {"why": why, "directory": folder.location, "files": written}
    lines = [report.to_text()]
    if written:
        lines += ["", f"plot:   {written[0]}", f"report: {written[-1]}"]
    for heading, command in next_steps(report, folder.location) if next_steps else []:
        lines += ["", f"{heading}:", f"  {command}"]
    answer(as_json, {**report.to_dict(), **values}, "\n".join(lines))


@contextlib.contextmanager
def watchable(spec: "StudySpec") -> "Iterator[None]":
    """Tells whoever finds a study taken how to watch it.

    Raises:
        JobEnded: With exit code 3, if another driver has it.
    """
    from orchestration.lock import LockHeld

    try:
        yield
    except LockHeld as error:
        words = f"comp study watch {spec.name} --root {spec.root}"
        raise JobEnded(f"{error}; to watch it: {words}", LOCKED) from None
