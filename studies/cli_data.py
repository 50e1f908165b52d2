"""``comp data`` and ``comp presets``: data sets, and the specs that ship with the package."""

from pathlib import Path
from typing import Any

import click

from studies.cli_base import answer, common, example, mistakes


@click.group(epilog=example("comp data build openmoji"))
def data() -> None:
    """Build and inspect data sets."""


@data.command(epilog=example("comp data build openmoji --size 64"))
@click.argument("name", type=click.Choice(["openmoji"]), default="openmoji")
@click.option(
    "--size", type=click.IntRange(16, 512), default=64, show_default=True, help="Pixels."
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The Parquet file to write; the cache by default.",
)
@common
def build(name: str, size: int, output: Path | None, as_json: bool) -> None:
    """Render and split OpenMoji, if that was not done before."""
    from comp.data.openmoji import build_openmoji, openmoji_path

    if output is None:
        output = openmoji_path(size)
    else:
        build_openmoji(output, size=size)
    answer(as_json, {"name": name, "path": str(output), "pixels": size}, str(output))


@data.command(
    "import",
    epilog=example(
        "comp data import nlvr2 train.json dev.json test1.json --images nlvr2/images --out nlvr2",
        "comp data import karpathy dataset_coco.json --images coco --link --out coco-captions",
        "comp data import vqav2 v2_*.json --images coco --link --out vqa --on-bad skip",
        "comp data import llava llava_instruct_150k.json --images coco/train2017 --out llava",
    ),
)
@click.argument("format", type=click.Choice(["nlvr2", "karpathy", "vqav2", "llava"]))
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--images",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder that the images lie below; that of the first source by default.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The directory to make."
)
@click.option(
    "--on-bad",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help="What to do with rows whose image is missing or broken.",
)
@click.option("--link", is_flag=True, help="Store paths of images; they must stay in place.")
@click.option(
    "--holdout",
    type=float,
    default=0.02,
    show_default=True,
    help="Share of training images for each split that is not published (vqav2, llava).",
)
@common
def import_(
    format: str,
    sources: tuple[Path, ...],
    images: Path | None,
    out: Path,
    on_bad: str,
    link: bool,
    holdout: float,
    as_json: bool,
) -> None:
    """Turn published files into a data set that every task reads with --data or data:."""
    import dataclasses

    from comp.data.imports import import_data

    with mistakes():
        report = import_data(
            format, sources, out, images=images, on_bad=on_bad, link=link, holdout=holdout
        )
    values = {"path": str(out), **dataclasses.asdict(report)}
    answer(as_json, values, f"{out}: {report}")


@data.command(epilog=example("comp data info openmoji", "comp data info coco-captions"))
@click.argument("source", default="openmoji")
@click.option(
    "--size", type=click.IntRange(16, 512), default=64, show_default=True, help="Of OpenMoji."
)
@common
def info(source: str, size: int, as_json: bool) -> None:
    """Say what is in the embedded data set, or in an imported one: splits, kind and a sample."""
    with mistakes():
        found, lines = _openmoji(size) if source == "openmoji" else _imported(Path(source))
    answer(as_json, found, "\n".join(lines))


def _openmoji(size: int) -> tuple[dict[str, Any], list[str]]:
    from collections import Counter

    from comp.data.openmoji import ATTRIBUTION, load_openmoji, openmoji_path

    drawings = load_openmoji(size).drawings
    splits = Counter(drawing.split for drawing in drawings)
    groups = Counter(drawing.group for drawing in drawings)
    values = {
        "name": "openmoji",
        "path": str(openmoji_path(size)),
        "drawings": len(drawings),
        "splits": dict(splits),
        "groups": dict(groups.most_common()),
        "attribution": ATTRIBUTION,
    }
    return values, [
        f"{len(drawings)} drawings at {size} px in {values['path']}",
        "splits: " + ", ".join(f"{key} {count}" for key, count in splits.items()),
        "groups: " + ", ".join(f"{key} {count}" for key, count in groups.most_common()),
        ATTRIBUTION,
    ]


def _imported(path: Path) -> tuple[dict[str, Any], list[str]]:
    from comp.data.layout import DataSet
    from comp.tasks.names import KIND_OF_ROWS

    stored = DataSet(path)
    splits = {split: len(rows) for split, rows in stored.splits.items()}
    tasks = [task for task, kind in KIND_OF_ROWS.items() if kind == stored.kind]
    facts = {key: value for key, value in stored.facts.items() if key != "answers"}
    first = next(iter(stored.splits.values())).fetch([0])[0]
    values = {"path": str(stored.path), "splits": splits, "tasks": tasks, **facts}
    return values, [
        f"{sum(splits.values())} {stored.kind} in {stored.path}",
        "splits: " + ", ".join(f"{key} {count}" for key, count in splits.items()),
        "tasks: " + (", ".join(tasks) or "all"),
        *(f"{key}: {value}" for key, value in facts.items() if key != "kind"),
        f"first of {first.split}: {first.id}, {len(first.images)} images, "
        f"{' | '.join(first.texts[:3])!r:.120} -> {' | '.join(first.labels[:3])!r:.60}",
    ]


@click.group(
    invoke_without_command=True, epilog=example("comp presets show demo-vqa > my-study.yaml")
)
@click.pass_context
def presets(context: click.Context) -> None:
    """List and show the specs that ship with the package."""
    if context.invoked_subcommand is None:
        context.invoke(show_list, as_json=False)


@presets.command("list", epilog=example("comp presets list"))
@common
def show_list(as_json: bool) -> None:
    """List the presets."""
    from studies.presets import preset_names, preset_summary

    found = {name: preset_summary(name) for name in preset_names()}
    width = max(map(len, found))
    text = "\n".join(f"{name:{width}}  {summary}" for name, summary in found.items())
    answer(as_json, {"presets": found}, text)


@presets.command(epilog=example("comp presets show demo-vqa > my-study.yaml"))
@click.argument("name")
@click.option("--whole", is_flag=True, help="Print it with what it takes from another preset.")
@common
def show(name: str, whole: bool, as_json: bool) -> None:
    """Print a preset, for example to start a spec of one's own."""
    from comp.words import nearest
    from studies.presets import preset_names, preset_path
    from studies.specfile import read_values
    from studies.yaml_text import write_yaml

    with mistakes():
        if name not in preset_names():
            hint = nearest(name, preset_names())
            raise ValueError(f"presets are {', '.join(preset_names())}, but got {name!r}{hint}")
    values = read_values(name)
    text = write_yaml(values) if whole else preset_path(name).read_text(encoding="utf-8")
    answer(as_json, {"name": name, "spec": values}, text.rstrip("\n"))
