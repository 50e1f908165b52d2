"""The directory of one study and of the runs beside it.

::

    <root>/studies/<study>/spec.yaml       the resolved spec, frozen
                           study.json      its hash and the version that wrote it; written last
                           enqueued/       settings that people want tried, see requests.py
                           runs.jsonl      the points of finished runs, see run_index.py
                           optuna.journal  Optuna's storage, unless the spec names a URL
                           report.md report.json curves.png curves.svg curves.parquet
    <root>/runs/<run id>/                  one run each; see orchestration/store.py
    <root>/mlflow.db  mlflow-artifacts/    MLflow, unless a tracking URI is given

The root may be a URI such as ``s3://bucket/directory``. Then the journal is a directory
``optuna.journal`` of objects, and MLflow's file is on the driver's disk, see
``specfile.tracking_uri``.
"""

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comp.words import nearest
from orchestration.job import check_name
from orchestration.lock import hold_location
from orchestration.storage import Storage, absolute, is_remote, join
from studies.errors import SpecError
from studies.spec import RUNTIME_KEYS, StudySpec, identity, spec_hash
from studies.specfile import spec_of, write_spec
from studies.yaml_text import read_yaml


@dataclass(frozen=True)
class StudyFolder:
    """Where a study keeps its files.

    Attributes:
        root: The directory of all studies and runs: an absolute path or a URI.
        name: Name of the study.
    """

    root: str
    name: str

    @classmethod
    def of(cls, spec: StudySpec) -> "StudyFolder":
        """Returns the folder of a spec, which need not exist."""
        return cls(absolute(spec.root), spec.name)

    @classmethod
    def find(cls, root: str | Path, name: str) -> "StudyFolder":
        """Returns the folder of a study that was started.

        Raises:
            SpecError: If there is none of that name.
        """
        folder = cls(absolute(root), check_name("study", name))
        if not folder.is_started:
            known = [other.name for other in cls.all_under(root)]
            have = f"; studies there: {', '.join(known)}" if known else ""
            hint = nearest(name, known) or have
            raise SpecError(f"there is no study {name!r} under {root}{hint}")
        return folder

    @classmethod
    def all_under(cls, root: str | Path) -> "list[StudyFolder]":
        """Returns the folders of all studies that were started under a root, by name."""
        studies = Storage(join(absolute(root), "studies"))
        return [
            cls(absolute(root), name)
            for name in studies.names()
            if studies.exists(f"{name}/study.json")
        ]

    @property
    def location(self) -> str:
        """The study's own directory: an absolute path or a URI."""
        return join(self.root, "studies", self.name)

    @property
    def storage(self) -> Storage:
        """The study's own directory, to read from and write to."""
        return Storage(self.location)

    @property
    def path(self) -> Path:
        """The study's own directory on a local disk.

        Raises:
            SpecError: If the root is a URI.
        """
        if is_remote(self.root):
            raise SpecError(f"{self.location} is not on a local disk; copy it to one for that")
        return Path(self.location)

    @property
    def runs(self) -> str:
        """The directory that holds one directory a run."""
        return join(self.root, "runs")

    def run(self, run_id: str) -> str:
        """Returns the directory of a run.

        Raises:
            ValueError: If the id leads elsewhere; ids come from a database that others may share.
        """
        return join(self.root, "runs", check_name("run", run_id))

    @property
    def is_started(self) -> bool:
        """Whether a spec was frozen here."""
        return self.storage.exists("study.json")

    @property
    def uid(self) -> str:
        """Made up when the study was started here; tells folders apart that share a database."""
        if not self.is_started:
            return ""
        return str(json.loads(self.storage.read("study.json")).get("uid", ""))

    def hold(self) -> AbstractContextManager[None]:
        """Keeps other drivers off the study.

        Raises:
            LockHeld: If another driver has it (on entry).
        """
        return hold_location(self.location, self.name)

    def read_values(self) -> Any:
        """Returns the frozen spec as raw values, with this folder's root.

        Raises:
            ValueError: If the file was changed by hand so that it is no YAML.
        """
        text = self.storage.read("spec.yaml").decode()
        values = read_yaml(text, join(self.location, "spec.yaml"))
        return {**values, "root": self.root} if isinstance(values, dict) else values

    def read_spec(self) -> StudySpec:
        """Returns the frozen spec, with this folder's root.

        Raises:
            SpecError: If the file was changed by hand, or by a version that knows other keys.
        """
        where = join(self.location, "spec.yaml")
        spec = spec_of(self.read_values(), where)
        if not isinstance(spec, StudySpec):
            raise SpecError(f"{where} is not the spec of a study, but of kind {spec.kind!r}")
        return spec

    def check(self, spec: StudySpec) -> None:
        """Checks that a spec may go on with what is there, if anything is.

        Raises:
            SpecError: If the study was started with another model, task, space, ...
        """
        if self.is_started:
            check_same(self.read_spec(), spec)

    def freeze(self, spec: StudySpec) -> None:
        """Writes the spec; only the study's driver may.

        Raises:
            SpecError: If the study was started with another model, task, space, ...
            StorageError: If the root cannot be written.
        """
        self.check(spec)
        self.storage.write("spec.yaml", write_spec(spec).encode())
        manifest = {
            "version": 1,
            "name": spec.name,
            "spec_hash": spec_hash(spec),
            "uid": self.uid or uuid.uuid4().hex,
        }
        self.storage.write("study.json", (json.dumps(manifest, indent=1) + "\n").encode())

    def write_files(self, fill: Callable[[Path], list[Path]]) -> list[str]:
        """Writes files into the folder and returns where they are.

        Args:
            fill: Writes files into the local directory that it is given and returns them.

        Raises:
            StorageError: If the root cannot be written.
        """
        with self._directory() as directory:
            written = fill(directory)
            if is_remote(self.root):
                for path in written:
                    self.storage.write(path.name, path.read_bytes())
        return [join(self.location, path.name) for path in written]

    @contextlib.contextmanager
    def _directory(self) -> Iterator[Path]:
        if not is_remote(self.root):
            yield self.path
            return
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def check_same(frozen: StudySpec, spec: StudySpec) -> None:
    """Compares what results depend on.

    Raises:
        SpecError: With the first key that differs.
    """
    changes = _differences(identity(frozen), identity(spec))
    if changes:
        place, old, new = changes[0]
        raise SpecError(
            f"study {spec.name!r} was started with {place} = {_shown(old)}, but the spec now has "
            f"{_shown(new)}; take it back or give the study another name "
            f"(only {', '.join(RUNTIME_KEYS)} may change)"
        )


def _differences(old: Any, new: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        inner = (_differences(old.get(k), new.get(k), f"{place}.{k}".lstrip(".")) for k in keys)
        return [change for changes in inner for change in changes]
    return [] if old == new else [(place, old, new)]


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)
