"""``comp results``: the tables of a results page from finished studies."""

from pathlib import Path

import click

from studies.cli_base import answer, common, example, find_folder, mistakes, root_option


@click.group(
    epilog=example(
        "comp results collect main-vqa cim-vqa --out docs/results",
        "comp results write docs/results --page docs/results.md",
    )
)
def results() -> None:
    """Collect finished studies, and write a page of results from the collection."""


@results.command(epilog=example("comp results collect main-vqa cim-vqa --out docs/results"))
@click.argument("names", nargs=-1, required=True, metavar="STUDY...")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="The directory of the collection.",
)
@click.option("--replace", is_flag=True, help="Drop what is there of these studies first.")
@root_option
@common
def collect(
    names: tuple[str, ...], out: Path, replace: bool, root: str | None, as_json: bool
) -> None:
    """Copy points and stages of studies into two Parquet files.

    They join what is there already: other studies, and other seeds and settings of the same one if
    its terms are equal. Test outcomes sample by sample are in them, so that differences need no
    model again.
    """
    from studies import collection

    with mistakes():
        folders = [find_folder(name, root) for name in names]
        number = collection.collect(folders, out, replace=replace)
    answer(as_json, {"runs": number, "directory": str(out)}, f"{number} runs in {out}")


@results.command(epilog=example("comp results write docs/results --page docs/results.md"))
@click.argument("data", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--page",
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A Markdown file with places such as <!-- begin test main-vqa -->.",
)
@common
def write(data: Path, page: Path, as_json: bool) -> None:
    """Write tables into a page, the same as JSON beside it, and the plots into DATA.

    Places are "test STUDY", "differences STUDY" and "modes STUDY"; "test across STUDY STUDY" and
    "across STUDY STUDY" have the settings of several studies on equal terms and what they differ
    by. The rest of the page is kept.
    """
    from studies.reproduction_page import write_results

    with mistakes():
        written = [str(path) for path in write_results(data, page)]
    answer(as_json, {"written": written}, "\n".join(written))
