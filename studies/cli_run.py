"""``comp prune``, ``demo`` and ``compare``: one run, the first study, many curves."""

from pathlib import Path

import click

from comp.lazy import without_collection
from studies.cli_base import (
    DEFAULT_ROOT,
    Interrupted,
    Mistake,
    answer,
    common,
    example,
    mistakes,
    root_option,
    trust_option,
    with_spec,
)
from studies.cli_study import conduct, inline_option


@click.command(epilog=example("comp prune my-run.yaml --set pruning.num_stages=20"))
@click.argument("spec")
@trust_option
@with_spec
@common
def prune(
    spec: str,
    trust_remote_code: bool,
    overrides: tuple[str, ...],
    root: str | None,
    as_json: bool,
) -> None:
    """Prune one model as SPEC (a YAML file) says; the same command continues."""
    from comp.errors import BudgetUnreachable, CheckpointMismatch, UnsupportedModelError
    from comp.results import format_points
    from orchestration.job import Failure
    from orchestration.store import RunMismatch, read_run
    from studies.jobs import prune_job
    from studies.session import conduct_run
    from studies.specfile import load_prune

    with mistakes():
        checked = load_prune(spec, overrides, root)
    body = conduct_run(checked, trust_remote_code=trust_remote_code)
    if isinstance(body, Failure) and body.kind == "cancelled":
        raise Interrupted("stopped; the same command goes on after the last finished stage")
    if isinstance(body, Failure):
        mistakes_of = (
            RunMismatch,
            UnsupportedModelError,
            CheckpointMismatch,
            BudgetUnreachable,
        )
        is_mistake = body.error in {error.__name__ for error in mistakes_of}
        raise Mistake(body.message) if is_mistake else click.ClickException(body.message)
    run = read_run(prune_job(checked).run_dir)
    values = {
        "run": run.job.run_id,
        "directory": run.location,
        "points": [point.to_dict() for point in run.points],
    }
    answer(as_json, values, f"{format_points(run.points)}\n\nfiles: {run.location}")


@click.command(epilog=example("comp demo", "comp demo nlvr2 --root my-runs"))
@click.argument("task", type=click.Choice(["vqa", "nlvr2"]), default="vqa")
@inline_option
@with_spec
@common
def demo(
    task: str, inline: bool, overrides: tuple[str, ...], root: str | None, as_json: bool
) -> None:
    """Prune a small real model to accuracy-versus-ratio curves, in minutes on two cores.

    Ctrl-C keeps what is finished, and the same command continues.
    """
    from studies.next_steps import next_steps
    from studies.specfile import load_study

    with mistakes():
        spec = load_study(f"demo-{task}", overrides, root)
    conduct(spec, inline=inline, as_json=as_json, next_steps=next_steps)


@click.command(
    epilog=example(
        "comp compare demo-vqa --at 0.5 --at 0.8 --png curves.png --csv curves.csv",
        "comp compare comp-runs/runs/demo-vqa-0000 my-run --baseline my-run",
        "comp compare sqlite:///comp-runs/mlflow.db --experiment demo-vqa --by method",
    )
)
@click.argument("names", metavar="RUN...", nargs=-1, required=True)
@click.option(
    "--at",
    "ratios",
    multiple=True,
    type=click.FloatRange(0, 1, max_open=True),
    help="Ratios to read the curves at; those that were asked for by default.",
)
@click.option("--metric", type=click.Choice(["val", "test"]), default="test", show_default=True)
@click.option("--csv", type=click.Path(path_type=Path, dir_okay=False), help="Write all points.")
@click.option(
    "--parquet", type=click.Path(path_type=Path, dir_okay=False), help="Write all points."
)
@click.option(
    "--png",
    "--svg",
    "plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the curves, as PNG and SVG.",
)
@click.option(
    "--by",
    type=click.Choice(["settings", "method"]),
    default="settings",
    show_default=True,
    help="A row is runs that differ in their seed alone, or all runs of a model and method.",
)
@click.option(
    "--baseline",
    default="",
    metavar="RUN",
    help="The run or method that the others are compared to, seed by seed; the first by default.",
)
@click.option(
    "--experiment",
    "experiments",
    multiple=True,
    metavar="NAME",
    help="Of a tracking server, read this experiment only (a study is one).",
)
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write an interactive report: one file that needs no network.",
)
@click.option(
    "--images",
    default=4,
    show_default=True,
    type=click.IntRange(0, 20),
    help="Validation images in the report, with the patches that the best model keeps.",
)
@root_option
@common
@without_collection()
def compare(
    names: tuple[str, ...],
    ratios: tuple[float, ...],
    metric: str,
    csv: Path | None,
    parquet: Path | None,
    plot: Path | None,
    by: str,
    baseline: str,
    experiments: tuple[str, ...],
    html: Path | None,
    images: int,
    root: str | None,
    as_json: bool,
) -> None:
    """Put runs side by side.

    A RUN is a run directory, a run id, the name of a study, a directory with all of these, or the
    address of an MLflow tracking server.
    """
    from studies.comparison import compare_sources
    from studies.comparison_text import comparison_text
    from studies.sources import find_sources

    with mistakes():
        sources = find_sources(
            names, root or DEFAULT_ROOT, experiments=experiments, with_stages=html is not None
        )
        comparison = compare_sources(
            sources,
            ratios,
            "val" if metric == "val" else "test",
            by="method" if by == "method" else "settings",
            baseline=baseline,
        )
        written = comparison.write(csv=csv, parquet=parquet, plot=plot)
        if html is not None:
            from studies.page import write_page

            written.append(write_page(comparison, html, num_images=images))
    lines = [comparison_text(comparison), *(f"wrote {path}" for path in written)]
    files = [str(path) for path in written]
    values = {**comparison.to_dict(), "files": files} if as_json else {}
    answer(as_json, values, "\n".join(lines))
