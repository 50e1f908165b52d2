"""The file that lets a large study be read in seconds, and the directories that are the truth."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from orchestration.store import list_runs, read_run
from studies.driver import run_study
from studies.folder import StudyFolder
from studies.run_index import INDEX, read_point_runs, write_index
from tests.studies.synthetic import RUNNER, SlotsExecutor, make_spec


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    spec = make_spec(tmp_path, "n_trials=3")
    run_study(spec, lambda: SlotsExecutor(2), runner=RUNNER)
    return StudyFolder.of(spec)


def test_the_points_are_those_of_the_directories(folder: StudyFolder) -> None:
    assert (folder.path / INDEX).exists()
    runs = read_point_runs(folder)
    assert [run.job.run_id for run in runs] == ["s-0000", "s-0001", "s-0002", "s-dense"]
    for run in runs:
        there = read_run(run.location)
        assert run.points == there.points
        job = dataclasses.replace(there.job, spec_text="")
        assert (run.job, run.uid, run.outcome) == (job, there.uid, there.outcome)
        assert run.stages == []


def test_a_finished_run_is_read_from_the_file_alone(
    folder: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(location: str) -> None:
        raise AssertionError(f"{location} was read")

    monkeypatch.setattr("studies.run_index.read_run", refuse)
    assert len(read_point_runs(folder)) == 4


def test_a_run_is_in_the_file_as_soon_as_it_ends_and_a_torn_line_does_no_harm(
    tmp_path: Path,
) -> None:
    spec = make_spec(tmp_path, "n_trials=3", "parallel=1")
    folder, seen = StudyFolder.of(spec), list[int]()

    def count(polls: int) -> None:
        if folder.storage.exists(INDEX):
            seen.append(folder.storage.read(INDEX).count(b"\n"))

    run_study(spec, lambda: SlotsExecutor(1, before_poll=count), runner=RUNNER)
    assert sorted(set(seen)) == [1, 2, 3]
    whole = read_point_runs(folder)
    with (folder.path / INDEX).open("ab") as stream:
        stream.write(b'{"name": "s-0001", "stam')
    assert read_point_runs(folder) == whole


def test_a_run_that_was_made_anew_is_read_anew(folder: StudyFolder) -> None:
    first, second = folder.run("s-0001"), folder.run("s-0002")
    shutil.rmtree(first)
    shutil.copytree(second, first, copy_function=shutil.copy)
    points = {run.location: run.points for run in read_point_runs(folder)}
    assert points[first] == read_run(second).points


def test_a_removed_run_is_gone_and_a_missing_file_is_made_again(folder: StudyFolder) -> None:
    shutil.rmtree(folder.run("s-0001"))
    (folder.path / INDEX).unlink()
    write_index(folder)
    assert (folder.path / INDEX).read_text().count("\n") == 3
    assert len(read_point_runs(folder)) == 3


def test_what_lies_beside_the_runs_is_none_of_them(folder: StudyFolder) -> None:
    before = read_point_runs(folder)
    Path(folder.runs, "s-notes.txt").write_text("seed 3 looks odd")
    Path(folder.runs, "s-plots").mkdir()
    assert read_point_runs(folder) == before
    write_index(folder)
    assert list_runs(folder.runs) == [run.location for run in before]


def test_a_line_that_is_like_a_torn_one_is_read_from_its_directory(folder: StudyFolder) -> None:
    runs, path = read_point_runs(folder), folder.path / INDEX
    lines = path.read_text().splitlines(keepends=True)
    whole = [json.loads(line).get("key") for line in lines]
    likes = [json.loads(line).get("like") for line in lines]
    first = next(place for place, key in enumerate(whole) if key and likes.count(key) == 2)
    assert len(lines[first]) > 1.5 * max(len(lines[place]) for place in range(4) if likes[place])
    path.write_text("".join([*lines[:first], lines[first][:90] + "\n", *lines[first + 1 :]]))
    assert read_point_runs(folder) == runs
    write_index(folder)
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)
