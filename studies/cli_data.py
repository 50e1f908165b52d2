"""``comp data`` and ``comp presets``: what ships with the package."""

from pathlib import Path

import click

from studies.cli_base import answer, common, example, mistakes

size_option = click.option(
    "--size", type=click.IntRange(16, 512), default=64, show_default=True, help="Pixels."
)


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


@data.command(epilog=example("comp data info openmoji"))
@click.argument("name", type=click.Choice(["openmoji"]), default="openmoji")
@click.option(
    "--size", type=click.IntRange(16, 512), default=64, show_default=True, help="Pixels."
)
@common
def info(name: str, size: int, as_json: bool) -> None:
    """Say how many drawings there are, by split and group, and whose they are."""
    from collections import Counter

    from comp.data.openmoji import ATTRIBUTION, load_openmoji, openmoji_path

    drawings = load_openmoji(size).drawings
    splits = Counter(drawing.split for drawing in drawings)
    groups = Counter(drawing.group for drawing in drawings)
    values = {
        "name": name,
        "path": str(openmoji_path(size)),
        "drawings": len(drawings),
        "splits": dict(splits),
        "groups": dict(groups.most_common()),
        "attribution": ATTRIBUTION,
    }
    lines = [
        f"{len(drawings)} drawings at {size} px in {values['path']}",
        "splits: " + ", ".join(f"{key} {count}" for key, count in splits.items()),
        "groups: " + ", ".join(f"{key} {count}" for key, count in groups.most_common()),
        ATTRIBUTION,
    ]
    answer(as_json, values, "\n".join(lines))


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
@common
def show(name: str, as_json: bool) -> None:
    """Print a preset, for example to start a spec of one's own."""
    from comp.config import nearest
    from studies.presets import preset_names, preset_path
    from studies.yaml_text import read_yaml

    with mistakes():
        if name not in preset_names():
            hint = nearest(name, preset_names())
            raise ValueError(f"presets are {', '.join(preset_names())}, but got {name!r}{hint}")
    text = preset_path(name).read_text(encoding="utf-8")
    answer(as_json, {"name": name, "spec": read_yaml(text)}, text.rstrip("\n"))
