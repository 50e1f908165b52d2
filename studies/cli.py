"""The command ``comp``: its root and the list of what it can do."""

import click

from studies.cli_base import CompGroup, example
from studies.cli_cluster import cluster
from studies.cli_data import data, presets
from studies.cli_model import diagnose, evaluate, measure
from studies.cli_promote import promote
from studies.cli_results import results
from studies.cli_run import compare, demo, prune
from studies.cli_search import enqueue, proxy, watch
from studies.cli_study import study
from studies.cli_train import models, train


@click.group(
    cls=CompGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=example(
        "comp demo", "comp presets show demo-vqa > my-study.yaml", "comp study run my-study.yaml"
    ),
)
@click.version_option(package_name="comp-vlm", prog_name="comp")
def cli() -> None:
    """Prune vision-language models with CoMP and search the settings.

    Exit codes: 0 done, 1 failed, 2 a mistake in what was asked, 3 another driver has the study,
    130 stopped by Ctrl-C (the same command goes on).
    """


for _command in (watch, enqueue, promote, proxy):
    study.add_command(_command)
for _command in (
    demo,
    prune,
    study,
    compare,
    results,
    evaluate,
    measure,
    diagnose,
    train,
    data,
    models,
    presets,
    cluster,
):
    cli.add_command(_command)


def main() -> None:
    """Runs the command line and ends the process with its exit code."""
    cli.main(prog_name="comp")


if __name__ == "__main__":
    main()
