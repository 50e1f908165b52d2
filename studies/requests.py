"""Settings that people want tried: files that the study's driver takes up, its only writer."""

import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

from studies.folder import StudyFolder

ENQUEUED = "enqueued"


class Requests:
    """The requests that lie in a study's folder.

    Args:
        folder: The study.
    """

    def __init__(self, folder: StudyFolder) -> None:
        self._storage = folder.storage.child(ENQUEUED)

    def add(self, labels: Mapping[str, Any]) -> str:
        """Leaves a request, which outlives the process; returns its name.

        Raises:
            StorageError: If the folder cannot be written.
        """
        name = f"{time.time_ns()}-{uuid.uuid4().hex[:8]}"
        self._storage.write(f"{name}.json", json.dumps(dict(labels)).encode())
        return name

    def read(self) -> dict[str, dict[str, Any]]:
        """Returns the labels by name of the request, the oldest first."""
        names = self._storage.names()
        return {n.removesuffix(".json"): json.loads(self._storage.read(n)) for n in names}

    def remove(self, name: str) -> None:
        """Removes a request that was taken up."""
        self._storage.remove(f"{name}.json")
