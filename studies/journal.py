"""Optuna's journal in an object store, where files cannot be appended to: one object an append.

The study's driver is the only writer (see :mod:`orchestration.lock`), so numbers are handed out
without asking; whoever else reads it looks the names up once.
"""

import json
from collections.abc import Iterable
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from orchestration.storage import Storage


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
