"""The HTML report: what is in it, and how it looks and behaves in a real browser."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from comp.modes import Stream
from comp.results import StageRecord
from orchestration.store import RunDirectory
from studies.cli import cli
from studies.comparison import Comparison, compare_sources
from studies.curves import Curve
from studies.page import render, write_page
from studies.page.content import content_of, importances_of, removed_by_mode
from studies.sources import Source, find_sources
from tests.browser import (
    chromium,
    complaints,
    faint_texts,
    look,
    needs_browser,
    overflowing,
    overlapping,
    requested,
)
from tests.orchestration.trials import make_job, make_point, make_stage
from tests.studies.synthetic import make_spec
from tests.studies.test_driver import run

HOSTILE = "</script><img src=x onerror=alert(1)>"
DENSE = {"vision.0.heads": 4.0, "vision.1.heads": 4.0, "vision.0.tokens": 65.0}
MODES = (
    ("vision_tokens", "sweep"),
    ("vision_params", "sweep"),
    ("vision_params+language_tokens", "explore"),
    ("vision_tokens", "greedy"),
)


def stages() -> list[StageRecord]:
    found = []
    for number, (mode, choice) in enumerate(MODES, 1):
        values = make_stage(number).to_dict() | {"macs": 1e9 * (1 - number / 8)}
        found.append(StageRecord(**(values | {"mode": mode, "choice": choice})))
    return found


def write_run(root: Path, number: int, *, seed: int, loss: float, **changes: Any) -> RunDirectory:
    name = f"r-{number}"
    config = make_job(root).config | {"seed": seed, "num_stages": 4 + number // 2}
    trial = number // 2
    job = make_job(root / "runs", run=name, trial=trial, seed=seed, config=config, **changes)
    directory = RunDirectory.open(job)
    directory.append(make_point(0.0, seed=seed, layers=DENSE, params=1500, gmacs=1.0))
    for stage in stages():
        directory.append(stage)
    for ratio in (0.25, 0.5):
        left = {name: count * (1 - ratio) for name, count in DENSE.items()}
        value = 80 - loss * ratio + seed
        directory.append(make_point(ratio, seed=seed, layers=left, val=value, test=value - 1))
    return directory


def save_model(target: Path) -> None:
    """A real model that drops patches."""
    from comp.models import attach, load_model

    loaded = load_model("blip-tiny-vqa")
    handle = attach(loaded.model)
    handle.thresholds = {Stream.VISION: 0.5, Stream.TEXT: 0.0}
    loaded.model.save_pretrained(target, tokenizer=loaded.tokenizer)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    root = tmp_path_factory.mktemp("page")
    for number, (seed, loss) in enumerate([(0, 5.0), (1, 5.0), (0, 20.0), (1, 20.0)]):
        data = HOSTILE if number >= 2 else None
        directory = write_run(root, number, seed=seed, loss=loss, data=data)
        if number == 0:
            directory.append(
                make_point(0.75, seed=0, val=70.0, test=70.0), models={"ratio-750": save_model}
            )
        directory.finish()
    return compare_sources(find_sources([str(root)], root), [], "val")


@pytest.fixture(scope="module")
def page(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(comparison, tmp_path_factory.mktemp("html") / "report.html", num_images=2)


def data_of(page: Path) -> dict[str, Any]:
    (text,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL
    )
    return dict(json.loads(text))


def test_the_page_asks_for_nothing_outside_itself(page: Path) -> None:
    text = page.read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", text)
    assert not re.findall(r"@import|url\(|fetch\(|XMLHttpRequest|importScripts", text)
    assert page.stat().st_size < 500_000


def test_no_text_of_a_run_can_become_markup(page: Path) -> None:
    assert HOSTILE not in page.read_text()
    assert any(HOSTILE in curve["spec"] for curve in data_of(page)["curves"])


def test_every_run_is_there_with_seed_and_the_settings_that_differ(page: Path) -> None:
    curves = data_of(page)["curves"]
    assert [(c["run"], c["seed"]) for c in curves] == [(f"r-{i}", i % 2) for i in range(4)]
    assert "num_stages 4" in curves[0]["spec"]
    assert "batch_size" not in curves[0]["spec"]


def test_runs_of_one_name_in_two_roots_are_told_apart(tmp_path: Path) -> None:
    roots = [tmp_path / "one", tmp_path / "two"]
    for root, data in zip(roots, (None, "another"), strict=True):
        write_run(root, 0, seed=0, loss=5.0, data=data).finish()
    found = compare_sources(find_sources([str(root) for root in roots], ""), [], "val")
    content = content_of(found, num_images=0)
    assert [run["run"] for run in content["runs"]] == ["r-0", "r-0"]
    assert sorted(run["spec"] for run in content["runs"]) == ["data another", "data embedded"]
    assert [run["spec"] for run in content["runs"]] == [c["spec"] for c in content["curves"]]


def test_shares_of_removed_flops_add_up_over_the_modes() -> None:
    shares = removed_by_mode(stages(), make_point(0.0))
    assert shares == pytest.approx(
        {"vision_tokens": 0.5, "vision_params": 0.25, "vision_params+language_tokens": 0.25}
    )


def test_the_patches_come_from_the_saved_model(page: Path) -> None:
    examples = data_of(page)["examples"]
    assert "r-0, ratio-750" in examples["note"]
    first, second = examples["images"]
    counts = [layer["kept"].count("1") for layer in first["layers"][1:]]
    assert counts == sorted(counts, reverse=True)
    assert 4 <= counts[-1] < first["side"] ** 2
    assert first["source"] != second["source"]


def test_without_images_no_model_is_loaded(comparison: Comparison) -> None:
    assert content_of(comparison, num_images=0)["examples"]["images"] == []


def test_importances_are_those_of_the_study(tmp_path: Path) -> None:
    """The synthetic loss depends on num_stages far more than on anything else."""
    run(make_spec(tmp_path, "n_trials=12"))
    (found,) = importances_of(find_sources(["s"], tmp_path))
    assert found["study"] == "s"
    assert [name for name, _ in found["values"]] == ["num_stages", "exploration"]
    assert sum(value for _, value in found["values"]) == pytest.approx(1.0)


def test_the_file_must_be_html(comparison: Comparison, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.html, but got .*report\.pdf"):
        write_page(comparison, tmp_path / "report.pdf")


def test_a_page_of_a_large_study_stays_under_2_megabytes() -> None:
    """1,000 runs of 60 stages on a model of three times twelve layers."""
    parts = ("heads", "channels", "tokens")
    layers = {
        f"{e}.{n}.{p}": 512.25
        for e in ("vision", "text", "decoder")
        for n in range(12)
        for p in parts
    }
    many = tuple(stages() * 15)
    sources = []
    for number in range(1000):
        points = [
            make_point(r, layers=layers, val=80 - r * number / 100, gmacs=132.540712 * (1 - r))
            for r in (0.0, 0.5, 0.6, 0.7, 0.8, 0.85)
        ]
        settings = {"num_stages": str(number), "exploration": f"{number / 7}"}
        name = f"a-study-with-a-long-name-{number:04d}"
        sources.append(Source(name, Curve(name, tuple(points), "s", number, settings), many))
    content = content_of(compare_sources(sources, [], "val"), num_images=0)
    assert len(content["curves"]) == 400
    assert "The chart has the 400 runs of the highest rows." in content["subtitle"]
    assert len(render(content)) < 2_000_000


def test_the_command_writes_the_page_and_refuses_what_cannot_be_compared(
    comparison: Comparison, tmp_path: Path
) -> None:
    run_of_first = comparison.sources[0].run
    assert run_of_first is not None
    words = ["compare", run_of_first.location, "--metric", "val", "--images", "0"]
    target = tmp_path / "new" / "report.html"
    done = CliRunner().invoke(cli, [*words, "--html", str(target)])
    assert (done.exit_code, f"wrote {target}" in done.stdout) == (0, True)
    assert data_of(target)["rows"][0]["name"] == run_of_first.job.run_id
    refused = CliRunner().invoke(cli, [*words, "--at", "0.9"])
    assert refused.exit_code == 2
    assert "no run reaches ratio 0.9; the highest is 0.750" in refused.stderr


# --- in a browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def texts(browser: Any, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements("css selector", selector)]


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_readable(browser: Any, page: Path, width: int, dark: bool) -> None:
    look(browser, page.as_uri(), width=width, dark=dark)
    browser.execute_script("document.querySelectorAll('details').forEach((e) => (e.open = true))")
    assert complaints(browser) == []
    assert overflowing(browser) == []
    assert overlapping(browser, "svg text, h1, h2, h3, p, td, th, figcaption, button") == []
    assert faint_texts(browser) == []
    asked = requested(browser)
    assert [url for url in asked if url.startswith(("http:", "https:", "ws:"))] == []


@needs_browser
def test_clicking_a_name_hides_its_runs_and_shows_them_again(browser: Any, page: Path) -> None:
    look(browser, page.as_uri(), width=1280)
    first = browser.find_element("css selector", "#legend button")

    def drawn() -> set[str]:
        lines = browser.find_elements("css selector", "#chart path[data-run]")
        return {line.get_attribute("data-run") for line in lines}

    assert drawn() == {"r-0", "r-1", "r-2", "r-3"}
    first.click()
    assert (first.get_attribute("aria-pressed"), drawn()) == ("false", {"r-2", "r-3"})
    first.click()
    assert drawn() == {"r-0", "r-1", "r-2", "r-3"}


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_pointing_at_a_line_shows_run_settings_and_seed(
    browser: Any, page: Path, width: int
) -> None:
    from selenium.webdriver import ActionChains

    look(browser, page.as_uri(), width=width)
    x, y = browser.execute_script(
        "const spot = spots.find((s) => s.curve.run === 'r-3' && s.point.ratio > 0.4);"
        "return [spot.x, spot.y];"
    )
    chart = browser.find_element("css selector", "#chart svg")
    size = chart.size
    actions = ActionChains(browser)
    actions.move_to_element_with_offset(
        chart, round(x - size["width"] / 2), round(y - size["height"] / 2)
    ).perform()
    (shown,) = texts(browser, "#tooltip")
    assert "r-3" in shown
    assert "seed 1" in shown
    assert "num_stages 5" in shown
    assert HOSTILE in shown
    assert overflowing(browser) == []


@needs_browser
def test_the_chart_can_be_read_by_keyboard(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    look(browser, page.as_uri(), width=1280)
    chart = browser.find_element("css selector", "#chart svg")
    chart.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    (shown,) = texts(browser, "#tooltip")
    assert "25.0 % of FLOPs removed" in shown
    chart.send_keys(Keys.ESCAPE)
    assert texts(browser, "#tooltip") == [""]


@needs_browser
def test_choosing_a_run_shows_its_modes_and_layers(browser: Any, page: Path) -> None:
    from selenium.webdriver.support.select import Select

    look(browser, page.as_uri(), width=1280)
    Select(browser.find_element("id", "run")).select_by_visible_text("r-2")
    Select(browser.find_element("id", "ratio")).select_by_visible_text("0.500")
    assert "seed 0" in texts(browser, "#run-spec")[0]
    assert texts(browser, "#timeline tbody th") == [
        "vision params",
        "vision tokens",
        "language tokens",
    ]
    assert texts(browser, "#timeline tbody tr:first-child td") == ["", "◇", "○", ""]
    assert texts(browser, "#layers tbody tr:first-child td") == ["50", "50"]
    assert texts(browser, "#shares span")[:2] == ["vision tokens", "50.0 %"]


@needs_browser
def test_each_image_has_a_picture_a_layer(browser: Any, page: Path) -> None:
    look(browser, page.as_uri(), width=390)
    captions = texts(browser, "#examples .image:first-child figcaption")
    assert captions[0] == "image 1"
    assert re.fullmatch(r"layer 1: \d+ of 64", captions[1])
    covers = browser.find_elements("css selector", "#examples .image:first-child svg path")
    assert [bool(c.get_attribute("d")) for c in covers][-1]
