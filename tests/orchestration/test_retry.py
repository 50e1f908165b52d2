"""The policy: what is tried again, how often, and what is said."""

from pathlib import Path

import pytest
import torch

from comp.errors import NanLoss, WorkerLost
from orchestration.job import FailureKind
from orchestration.retry import RULES, Retries, Retry, describe_kill, describe_memory, kind_of
from orchestration.storage import StorageError
from tests.orchestration.trials import CONFIG, make_job


def all_retries(directory: Path, kind: FailureKind, most: int = 20) -> list[Retry]:
    job, retries = make_job(directory), Retries()
    found = []
    while len(found) < most and (again := retries.next(job, kind)):
        found.append(again)
        job = again.job
    return found


@pytest.mark.parametrize(
    ("kind", "times"),
    [
        ("infrastructure", 5),
        ("timeout", 2),
        ("memory", 1),
        ("preempted", 20),
        ("algorithm", 0),
        ("storage", 0),
        ("cancelled", 0),
    ],
)
def test_every_kind_of_failure_has_its_budget(
    tmp_path: Path, kind: FailureKind, times: int
) -> None:
    found = all_retries(tmp_path, kind)
    assert [again.job.attempt for again in found] == list(range(1, times + 1))


def test_all_kinds_have_a_rule() -> None:
    assert set(RULES) == set(FailureKind.__args__)  # type: ignore[attr-defined]


def test_a_retry_says_which_of_how_many_it_is(tmp_path: Path) -> None:
    assert [r.label for r in all_retries(tmp_path, "timeout")] == [
        "retrying (1/2)",
        "retrying (2/2)",
    ]
    assert all_retries(tmp_path, "preempted")[0].label == "retrying"


def test_pauses_start_at_none_and_double(tmp_path: Path) -> None:
    assert [r.pause for r in all_retries(tmp_path, "infrastructure")] == [0, 1, 2, 4, 8]


def test_failures_of_one_kind_do_not_use_up_the_budget_of_another(tmp_path: Path) -> None:
    retries, job = Retries(), make_job(tmp_path)
    assert all(retries.next(job, "preempted") for _ in range(9))
    assert retries.next(job, "infrastructure")


def test_a_run_without_memory_goes_on_with_half_the_batch_and_the_same_content(
    tmp_path: Path,
) -> None:
    (again,) = all_retries(tmp_path, "memory")
    config = again.job.pruning_config
    assert config.batch_size == CONFIG.batch_size
    assert config.part_size == CONFIG.part_size // 2
    assert config.eval_batch_size == CONFIG.eval_batch_size // 2
    assert again.job.content_id == make_job(tmp_path).content_id
    assert again.label == "retrying (1/1) with batches in 2 parts"


def test_a_batch_that_cannot_be_halved_is_not_tried_again(tmp_path: Path) -> None:
    job = make_job(tmp_path, config={**CONFIG.to_dict(), "batch_size": 3})
    retries = Retries()
    assert retries.next(job, "memory") is None
    assert retries.verdict("memory", "out of memory (x)") == "out of memory (x)"


def raised_by(act: object) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        act()  # type: ignore[operator]
    return caught.value


@pytest.mark.parametrize(
    ("act", "figure"),
    [
        (lambda: torch.empty(1 << 50), r"tried to allocate 4,294,967,296 MiB"),
        (lambda: bytearray(1 << 60), r"MemoryError"),
        (lambda: __import__("numpy").ones(1 << 50), r"Unable to allocate 8.00 PiB"),
    ],
)
def test_running_out_of_host_memory_is_told_with_its_figures(act: object, figure: str) -> None:
    import re

    error = raised_by(act)
    assert kind_of(error) == "memory"
    text = describe_memory(error)
    assert re.match(rf"out of memory \({figure}.* used up to [\d,]{{3,}} MiB of host", text), text


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    ],
)
def test_a_full_gpu_counts_as_memory_and_keeps_its_figure(error: Exception) -> None:
    assert kind_of(error) == "memory"
    assert str(error).rstrip(".") in describe_memory(error)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NanLoss("the training loss became nan in stage 3", 3), "algorithm"),
        (RuntimeError("shape mismatch"), "algorithm"),
        (ValueError("the word memory alone is no sign"), "algorithm"),
        (
            WorkerLost("another worker of the same run is gone (closed)"),
            "infrastructure",
        ),
        (StorageError("cannot write x: no space left on device"), "storage"),
    ],
)
def test_other_failures_keep_their_kind(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind


def test_what_ray_says_of_a_worker_that_it_ended_is_cut_down_to_the_figure() -> None:
    text = (
        "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: "
        "127.0.0.1, ID: 7fd2dd5f) was 6.46GB used / 23.54GB limit (0.274328)\nOOM kill reason: "
        "Memory usage 6905614336B exceeded threshold of 252760624B (1.0% of 25276063744B limit)"
    )
    assert describe_kill(text) == (
        "out of memory (Ray ended the worker because its machine was nearly full: 6.46GB of "
        "23.54GB were in use)"
    )
    assert "nearly full)" in describe_kill("killed")
