"""The journal file: what a killed driver leaves behind does not stop the next one."""

from pathlib import Path

from studies.journal import FileJournal


def test_entries_are_readable_at_once_and_after_a_sync(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "optuna.journal")
    journal.append_logs([{"a": 1}, {"a": 2}])
    assert list(FileJournal(tmp_path / "optuna.journal").read_logs(1)) == [{"a": 2}]
    journal.sync()
    assert list(journal.read_logs(0)) == [{"a": 1}, {"a": 2}]


def test_an_entry_that_a_dying_driver_left_unfinished_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "optuna.journal"
    FileJournal(path).append_logs([{"a": 1}])
    with path.open("a") as stream:
        stream.write('{"a": 2, "b"')
    journal = FileJournal(path)
    journal.append_logs([{"a": 3}])
    assert list(FileJournal(path).read_logs(0)) == [{"a": 1}, {"a": 3}]


def test_no_lock_of_a_dead_driver_holds_the_next_one_up(tmp_path: Path) -> None:
    path = tmp_path / "optuna.journal"
    path.with_name("optuna.journal.lock").symlink_to(path)
    FileJournal(path).append_logs([{"a": 1}])
    assert list(FileJournal(path).read_logs(0)) == [{"a": 1}]
