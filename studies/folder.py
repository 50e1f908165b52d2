"""The directory of one study and of the runs beside it.

::

    <root>/studies/<study>/spec.yaml       the resolved spec, frozen
                           study.json      its hash and the version that wrote it; written last
                           optuna.journal  Optuna's storage, unless the spec names a URL
                           report.md report.json curves.png curves.svg curves.parquet
    <root>/runs/<run id>/                  one run each; see orchestration/store.py
    <root>/mlflow.db  mlflow-artifacts/    MLflow, unless a tracking URI is given
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comp.config import nearest
from orchestration.job import check_name
from studies.errors import SpecError
from studies.spec import RUNTIME_KEYS, StudySpec, identity, spec_hash
from studies.specfile import spec_of, write_spec
from studies.yaml_text import read_yaml


@dataclass(frozen=True)
class StudyFolder:
    """Where a study keeps its files.

    Attributes:
        root: The directory of all studies and runs, absolute.
        name: Name of the study.
    """

    root: Path
    name: str

    @classmethod
    def of(cls, spec: StudySpec) -> "StudyFolder":
        """Returns the folder of a spec, which need not exist."""
        return cls(Path(spec.root).resolve(), spec.name)

    @classmethod
    def find(cls, root: Path, name: str) -> "StudyFolder":
        """Returns the folder of a study that was started.

        Raises:
            SpecError: If there is none of that name.
        """
        folder = cls(root.resolve(), check_name("study", name))
        if not folder.is_started:
            known = [other.name for other in cls.all_under(root)]
            have = f"; studies there: {', '.join(known)}" if known else ""
            hint = nearest(name, known) or have
            raise SpecError(f"there is no study {name!r} under {root}{hint}")
        return folder

    @classmethod
    def all_under(cls, root: Path) -> "list[StudyFolder]":
        """Returns the folders of all studies that were started under a root, by name."""
        manifests = sorted(root.resolve().glob("studies/*/study.json"))
        return [cls(root.resolve(), path.parent.name) for path in manifests]

    @property
    def path(self) -> Path:
        """The study's own directory."""
        return self.root / "studies" / self.name

    @property
    def runs(self) -> Path:
        """The directory that holds one directory a run."""
        return self.root / "runs"

    @property
    def is_started(self) -> bool:
        """Whether a spec was frozen here."""
        return (self.path / "study.json").is_file()

    def read_spec(self) -> StudySpec:
        """Returns the frozen spec, with this folder's root.

        Raises:
            SpecError: If the file was changed by hand, or by a version that knows other keys.
        """
        path = self.path / "spec.yaml"
        spec = spec_of(read_yaml(path.read_text(encoding="utf-8"), str(path)), str(path))
        if not isinstance(spec, StudySpec):
            raise SpecError(f"{path} is not the spec of a study, but of kind {spec.kind!r}")
        return spec.model_copy(update={"root": str(self.root)})

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
        """
        self.check(spec)
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "spec.yaml", write_spec(spec))
        manifest = {"version": 1, "name": spec.name, "spec_hash": spec_hash(spec)}
        write_atomically(self.path / "study.json", json.dumps(manifest, indent=1) + "\n")


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
