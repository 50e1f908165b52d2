"""Joining and describing a cluster: what a person is told when it cannot be."""

import contextlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
from ray._private.utils import check_version_info

from orchestration.cluster import (
    ClusterError,
    HeadWatch,
    _explain,
    _join,
    check_fits,
    connect,
    describe_room,
    hold_study,
)
from orchestration.executor import Resources
from orchestration.lock import LockHeld

pytestmark = pytest.mark.ray

HOLD = """
import sys
from orchestration.cluster import connect, hold_study
with connect(sys.argv[1]), hold_study("demo"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(ray_cluster: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", HOLD, ray_cluster]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.chaos
def test_a_study_has_one_driver_in_a_cluster_until_that_is_killed(
    holder: "subprocess.Popen[str]",
) -> None:
    with pytest.raises(LockHeld) as caught, hold_study("demo"):
        pytest.fail("two drivers")
    assert caught.value.pid == holder.pid
    with hold_study("another"):
        pass
    holder.kill()
    holder.wait()
    began = time.monotonic()
    with hold_study("demo"):
        assert time.monotonic() - began < 10


def test_nobody_outside_reaches_a_cluster_that_was_started_for_this_process(
    ray_cluster: str,
) -> None:
    ports = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            ports += [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert len(ports) > 3
    assert {port.laddr.ip.removeprefix("::ffff:") for port in ports} == {"127.0.0.1"}


def test_a_study_is_free_again_after_its_context(ray_cluster: str) -> None:
    for _ in range(2):
        with hold_study("again"):
            pass


def test_a_cluster_that_is_connected_is_used_and_not_ended(ray_cluster: str) -> None:
    with connect() as cluster:
        assert cluster.address == ray_cluster
        assert not cluster.owned


@pytest.mark.chaos
def test_a_head_that_is_back_within_the_patience_was_only_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        port = head.getsockname()[1]
        watch = HeadWatch(f"127.0.0.1:{port}", patience=60.0, interval=0.01)
    while watch._silent_since is None:
        time.sleep(0.01)
    again = threading.Timer(0.5, lambda: heads.append(socket.create_server(("127.0.0.1", port))))
    heads: list[socket.socket] = []
    began = time.monotonic()
    again.start()
    watch.check()
    assert time.monotonic() - began >= 0.5
    assert not watch.is_lost
    watch.stop()
    heads[0].close()


def test_room_is_told_for_what_is_asked_for(ray_cluster: str) -> None:
    text = describe_room(Resources(gpus=0.5), 2)
    assert re.fullmatch(
        r"2 slots of 1 CPUs, 0.5 GPUs are asked for, and [\d.]+ of 4 CPUs, [\d.]+ of 2 GPUs "
        "are free",
        text,
    )


def test_a_slot_larger_than_every_node_is_refused_with_both_numbers(ray_cluster: str) -> None:
    with pytest.raises(ClusterError, match="asks for 64 CPUs, but the largest of 1 nodes has 4 C"):
        check_fits(Resources(cpus=64))


def test_other_versions_are_named_in_one_sentence() -> None:
    cluster = {"ray_version": "2.40.0", "python_version": "3.10.4"}
    with pytest.raises(RuntimeError) as caught:
        check_version_info(cluster, "node 10.0.0.1:6379")
    text = _explain("10.0.0.1:6379", caught.value)
    assert "the Ray cluster at 10.0.0.1:6379 runs Ray 2.40.0 on Python 3.10.4, but this" in text
    assert "\n" not in text


def test_an_address_without_a_cluster_is_named_in_one_sentence() -> None:
    with pytest.raises(ClusterError) as caught:
        _join("127.0.0.1:1")
    text = str(caught.value)
    assert text.startswith("no Ray cluster can be joined at 127.0.0.1:1 (")
    assert text.endswith("or unset RAY_ADDRESS to work on this machine alone")
    assert "\n" not in text
