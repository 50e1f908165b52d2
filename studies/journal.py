"""Optuna's journal: a file, or one object an append where files cannot be appended to.

The study's driver is the only writer (see :mod:`orchestration.lock`), so neither needs a lock of
its own, which a killed driver would leave behind; whoever else reads sees whole entries.
"""

import json
import os
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend, JournalFileBackend

from orchestration.storage import Storage, explaining


class ObjectJournal(BaseJournalBackend):
    """A journal of one object per append, named by the number of its first entry.

    Args:
        storage: A directory of its own.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._logs: list[dict[str, Any]] | None = None

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        """Returns the entries from a number on, 0 being the first."""
        if self._logs is None:
            names = self._storage.names()
            self._logs = [log for name in names for log in json.loads(self._storage.read(name))]
        return self._logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Adds entries at the end.

        Raises:
            StorageError: If the store cannot be written.
        """
        self.read_logs(0)
        assert self._logs is not None
        self._storage.write(f"{len(self._logs):010d}.json", json.dumps(logs).encode())
        self._logs += logs


class FileJournal(JournalFileBackend):
    """A journal file that is forced to disk when ``sync`` is called, not at every entry.

    An entry outlives a killed driver at once, and a power cut after ``sync``. What a trial is told
    needs none: if a power cut takes it, the trial is adopted, replayed from its files, and told
    again.

    Args:
        path: The file, made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._stream: FileIO | None = None  # unbuffered: what failed must not be written later

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Adds entries at the end, after cutting off one that a dying driver left unfinished.

        Raises:
            StorageError: If the disk is full, read-only or otherwise unwilling.
        """
        lines = [json.dumps(log, separators=(",", ":")) for log in logs]
        with explaining(self._path):
            if self._stream is None:
                _cut_torn_end(self._path)
                self._stream = self._path.open("ab", buffering=0)
            left = "".join(f"{line}\n" for line in lines).encode()
            while left:  # a disk that fills up takes a part before it refuses
                left = left[self._stream.write(left) :]

    def sync(self) -> None:
        """Makes everything that was added outlive a power cut."""
        if self._stream is not None:
            os.fsync(self._stream.fileno())


def _cut_torn_end(path: Path) -> None:
    """Removes what follows the last line break."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
