"""Fixtures that every package's tests share: one seed, one thread, one small Ray."""

import os
import random
from collections.abc import Iterator

import pytest

# Before anything imports Ray or MLflow: no tokens, no statistics, no patience with dead servers.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    MLFLOW_DISABLE_TELEMETRY="true",
    TOKENIZERS_PARALLELISM="false",
)
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

    with connect(num_cpus=4) as cluster:
        yield cluster.address
