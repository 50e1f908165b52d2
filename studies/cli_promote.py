"""``comp study promote``: a pruned model into MLflow's registry."""

import click

from studies.cli_base import answer, common, example, find_folder, mistakes, root_option


@click.command(
    epilog=example(
        "comp study promote demo-vqa",
        "comp study promote demo-vqa --trial 3 --ratio 0.7 --name blip-vqa-small",
    )
)
@click.argument("name")
@click.option("--trial", type=click.IntRange(0), help="Optuna's number; the best by default.")
@click.option(
    "--ratio",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="The asked FLOPs ratio of the model; the largest by default.",
)
@click.option("--name", "model_name", default="", help="In the registry; the study's by default.")
@root_option
@common
def promote(
    name: str,
    trial: int | None,
    ratio: float | None,
    model_name: str,
    root: str | None,
    as_json: bool,
) -> None:
    """Register a pruned model of a study with MLflow.

    Of several seeds it is the one that is best by validation. Registering a model again gives the
    version it has.
    """
    from studies.promotion import promote as register

    with mistakes():
        folder = find_folder(name, root)
        done = register(folder, trial=trial, ratio=ratio, name=model_name)
    values = {
        "name": done.name,
        "version": done.version,
        "uri": done.uri,
        "run": done.run,
        "ratio": done.ratio,
        "val": done.val,
    }
    text = (
        f"{done.run} at ratio {done.ratio:g} (val {done.val:.2f}) is {done.name} version "
        f"{done.version}\nload it with mlflow.pyfunc.load_model({done.uri!r})"
    )
    answer(as_json, values, text)
