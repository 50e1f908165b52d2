"""MLflow's compare page and the Optuna dashboard, in a real browser on what a study wrote."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from studies.session import conduct_study
from tests.browser import chromium, look, needs_browser, overlapping
from tests.studies.synthetic import RUNNER, make_spec

pytestmark = [needs_browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of three trials with its journal and its MLflow store."""
    root = tmp_path_factory.mktemp("dashboards")
    conduct_study(make_spec(root, "n_trials=3"), inline=True, runner=RUNNER)
    return root


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@contextlib.contextmanager
def serving(words: list[str], port: int, log: Path) -> Iterator[str]:
    """Runs a web server on loopback in a process group of its own until it is not needed."""
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [sys.executable, "-m", *words],
            env=environment,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
                break
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(browser: Any, found: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 150
    while not found():
        assert time.monotonic() < deadline, f"no {what} on {browser.current_url}: {body(browser)}"
        time.sleep(0.2)


def body(browser: Any) -> str:
    return str(browser.execute_script("return document.body.innerText"))


PLOTTED = """
return [...document.querySelectorAll('.js-plotly-plot')].flatMap(
  (plot) => (plot.data || []).map((trace) => [...(trace.x || [])]));
"""


def test_mlflow_draws_accuracy_against_the_ratio(browser: Any, root: Path) -> None:
    """The step is the ratio in per mille, so its metric page needs no setting."""
    from mlflow.tracking import MlflowClient

    store = f"sqlite:///{root}/mlflow.db"
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("s")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.`comp.kind` = 'prune'")
    ids = ",".join(f'"{run.info.run_id}"' for run in runs)
    port = free_port()
    words = ["mlflow", "server", "--backend-store-uri", store, "--host", "127.0.0.1"]
    words += ["--port", str(port), "--workers", "1"]
    with serving(words, port, root / "mlflow.log") as url:
        query = (
            f'runs=[{ids}]&metric="val"&experiments=["{experiment.experiment_id}"]'
            '&plot_metric_keys=["val"]&x_axis=step'
        )
        for width, dark in ((390, True), (1280, False)):
            look(browser, f"{url}/#/metric?{quote(query, safe='=&')}", width=width, dark=dark)
            wait_for(browser, lambda: len(browser.execute_script(PLOTTED)) >= 3, "curves")
            drawn = browser.execute_script(PLOTTED)
            assert sorted(drawn)[:3] == [[0, 500, 800]] * 3
        charts = "runs?compareRunsMode=CHART&workflowType=machine_learning"
        look(browser, f"{url}/#/experiments/{experiment.experiment_id}/{charts}", width=1280)
        wait_for(browser, lambda: all(r.info.run_name in body(browser) for r in runs), "run names")
        wait_for(browser, lambda: browser.execute_script(PLOTTED), "charts")


def test_the_optuna_dashboard_opens_the_journal(browser: Any, root: Path) -> None:
    journal = root / "studies" / "s" / "optuna.journal"
    port = free_port()
    words = ["optuna_dashboard._cli", str(journal), "--host", "127.0.0.1", "--port", str(port)]
    with serving(words, port, root / "dashboard.log") as url:
        look(browser, url, width=1280)
        wait_for(browser, lambda: "s" in body(browser).split(), "study")
        for width, dark in ((390, True), (1280, False)):
            look(browser, f"{url}/dashboard/studies/0", width=width, dark=dark)
            wait_for(browser, lambda: "exploration" in body(browser), "parameters")
            assert overlapping(browser, "h1, h2, h3, h4, h5, h6, p") == []
