"""``comp prune``, ``demo`` and ``compare``: one run, the first study, many curves."""

from pathlib import Path

import click

from studies.cli_base import (
    Interrupted,
    Mistake,
    answer,
    common,
    example,
    mistakes,
    root_option,
    with_spec,
)
from studies.cli_study import DEFAULT_ROOT, conduct, inline_option


@click.command(epilog=example("comp prune my-run.yaml --set pruning.num_stages=20"))
@click.argument("spec")
@with_spec
@common
def prune(spec: str, overrides: tuple[str, ...], root: str | None, as_json: bool) -> None:
    """Prune one model as SPEC (a YAML file) says; the same command continues."""
    from comp.results import format_points
    from orchestration.job import Failure
    from orchestration.store import RunMismatch, read_run
    from studies.jobs import prune_job
    from studies.session import conduct_run
    from studies.specfile import load_prune

    with mistakes():
        checked = load_prune(spec, overrides, root)
    body = conduct_run(checked)
    if isinstance(body, Failure) and body.kind == "cancelled":
        raise Interrupted("stopped; the same command goes on after the last finished stage")
    if isinstance(body, Failure):
        is_mistake = body.error == RunMismatch.__name__
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
        "comp compare comp-runs/runs/demo-vqa-0000 comp-runs/runs/my-run",
    )
)
@click.argument("runs", nargs=-1, required=True)
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
    "--png", type=click.Path(path_type=Path, dir_okay=False), help="Draw the curves (and an SVG)."
)
@root_option
@common
def compare(
    runs: tuple[str, ...],
    ratios: tuple[float, ...],
    metric: str,
    csv: Path | None,
    parquet: Path | None,
    png: Path | None,
    root: str | None,
    as_json: bool,
) -> None:
    """Put runs side by side: run directories, run ids or names of studies."""
    from studies.comparison import compare_runs, find_runs

    with mistakes():
        found = find_runs(runs, root or DEFAULT_ROOT)
        comparison = compare_runs(found, ratios, "val" if metric == "val" else "test")
        written = [str(path) for path in comparison.write(csv=csv, parquet=parquet, png=png)]
    lines = [comparison.to_text(), *(f"wrote {path}" for path in written)]
    answer(as_json, {**comparison.to_dict(), "files": written}, "\n".join(lines))
