"""Memory that is measured, kept under the root, and asked for."""

from pathlib import Path

import pytest

from orchestration.peak import Peak, PeakError, measure_peak, memory_key, read_peak, write_peak
from tests.orchestration.trials import CONFIG, make_job


def test_runs_that_take_the_same_memory_share_a_figure(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    longer = make_job(tmp_path, run="s-0001", config=CONFIG.to_dict() | {"num_stages": 9})
    larger = make_job(tmp_path, config=CONFIG.to_dict() | {"batch_size": 64})
    assert memory_key(longer) == memory_key(job) != memory_key(larger)


def test_a_figure_is_found_where_it_was_written(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    assert read_peak(str(tmp_path), job) is None
    write_peak(str(tmp_path), job, Peak(1000))
    other = make_job(tmp_path, config=CONFIG.to_dict() | {"batch_size": 64})
    write_peak(str(tmp_path), other, Peak(2000, 300))
    assert read_peak(str(tmp_path), job) == Peak(1000)
    assert read_peak(str(tmp_path), other) == Peak(2000, 300)


def test_workers_ask_for_a_tenth_and_rays_own_on_top() -> None:
    assert Peak(1000).request_mib == 1228


def test_a_measurement_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(PeakError, match="memory of none on vqa was not measured: ValueError: "):
        measure_peak(make_job(tmp_path))
