from pathlib import Path

import pytest
from PIL import Image

from comp.diagnostics import LayerInterference
from studies.curves import Curve
from studies.plots import plot_interference, plot_runs, plot_study
from tests.orchestration.trials import make_point


def curves(count: int, **changes: object) -> list[Curve]:
    return [
        Curve(
            f"s-{number:04d}",
            tuple(
                make_point(r, val=80 - (5 + number) * r * r, **changes) for r in (0.0, 0.5, 0.8)
            ),
            "s",
            number,
        )
        for number in range(count)
    ]


def test_a_study_is_drawn_as_png_and_svg(tmp_path: Path) -> None:
    found = curves(6)
    paths = plot_study(found, found[:1], tmp_path / "curves", title="s: model on vqa")
    assert [path.name for path in paths] == ["curves.png", "curves.svg"]
    with Image.open(paths[0]) as image:
        assert image.width >= 1000


def test_the_plot_says_what_is_what(tmp_path: Path) -> None:
    found = curves(6)
    _, svg = plot_study(found, found[2:3], tmp_path / "curves", title="s: model on vqa")
    comments = svg.read_text()
    for words in ("s: model on vqa", "best: trial 2", "other trials (5)", "dense: 80.0"):
        assert words in comments
    assert "Validation accuracy (points of 100)" in comments
    assert "multiply-adds, %" in comments


def test_the_same_curves_give_the_same_svg(tmp_path: Path) -> None:
    texts = [plot_runs(curves(3), tmp_path / n, title="t")[1].read_text() for n in ("a", "b")]
    assert texts[0] == texts[1]


def test_a_long_legend_is_cut_short(tmp_path: Path) -> None:
    _, svg = plot_runs(curves(30), tmp_path / "many", title="t")
    text = svg.read_text()
    assert "18 more runs" in text
    assert "s-0011" in text
    assert "s-0012" not in text


def test_nothing_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run with a finished ratio"):
        plot_runs([], tmp_path / "none", title="t")


def test_two_tasks_are_not_drawn_on_one_axis(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of one task, but got nlvr2, vqa"):
        plot_runs([*curves(1), *curves(1, task="nlvr2")], tmp_path / "two", title="t")


def test_interference_is_drawn_per_encoder_with_chance_beside_it(tmp_path: Path) -> None:
    layers = [
        LayerInterference(encoder, layer, 0.3 + 0.1 * layer, 0.25, 8)
        for encoder in ("vision", "text")
        for layer in range(3)
    ]
    png, svg = plot_interference(layers, tmp_path / "interference", title="tiny on vqa")
    with Image.open(png) as image:
        assert image.width >= 1000
    text = svg.read_text()
    for words in ("tiny on vqa", "vision, by chance", "text, by chance", "importance measures"):
        assert words in text


def test_interference_without_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        plot_interference([], tmp_path / "interference", title="t")
