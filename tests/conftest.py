"""Fixtures that every package's tests share: one seed, one thread, one small Ray."""

import gc
import os
import random
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

# Before anything imports Ray or MLflow: no tokens, no statistics, no patience with dead servers.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",  # Ray's 15 starves them where something else is running too
    RAY_prestart_worker_first_driver="0",  # no processes that wait for tasks: there are none
    RAY_enable_metrics_collection="0",
    LOG_NAME_UPDATE_INTERVAL_S="60",  # of no use: nothing of it is shown
    MLFLOW_DISABLE_TELEMETRY="true",
    TOKENIZERS_PARALLELISM="false",
)
if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side: one thread for each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
    os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """Seeds Python and torch, and gives torch one thread so that sums have one order."""
    import torch

    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A local Ray with four logical CPUs and two logical GPUs; gives its address."""
    from orchestration.cluster import connect

    with connect(num_cpus=4, num_gpus=2) as cluster:
        yield cluster.address


@pytest.fixture(scope="session")
def mlflow_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database, to be copied: making its tables takes seconds."""
    from orchestration.tracking import _make_tables

    database = tmp_path_factory.mktemp("mlflow-tables") / "mlflow.db"
    _make_tables(database)
    return database


def pytest_itemcollected(item: pytest.Item) -> None:
    """Notes the equations that a test holds code against."""
    for mark in item.iter_markers("equations"):
        item.user_properties += [("equation", equation) for equation in mark.args]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None]:
    """Keeps what collecting imports and makes, a million objects that stay, from garbage's search.

    Pruning sweeps after every point, which takes half a second among all of them.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several processes, puts the longest files first: none is then alone at the end."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    urgency = dict.fromkeys((item.path for item in items), 0)
    for item in items:
        for value, name in enumerate(("slow", "chaos"), start=1):
            if item.get_closest_marker(name):
                urgency[item.path] = max(urgency[item.path], value)
    items.sort(key=lambda item: -urgency[item.path])


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Prints, after ``pytest -m equations``, how many tests held each equation."""
    if "equations" not in config.option.markexpr:
        return
    for outcome in ("passed", "failed"):
        held = Counter(
            str(value)
            for report in terminalreporter.stats.get(outcome, [])
            for name, value in report.user_properties
            if name == "equation"
        )
        for equation in sorted(held, key=lambda name: int(name.split()[-1])):
            terminalreporter.write_line(f"{equation}: {held[equation]} tests {outcome}")
