"""Where Optuna keeps a study: a journal in the study's folder, a database, or a gRPC proxy of one.

A place that cannot be reached is a sentence within seconds, not a wait.
"""

import contextlib
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage
from optuna.storages.journal import JournalStorage

from studies.errors import SpecError
from studies.folder import StudyFolder
from studies.journal import FileJournal, ObjectJournal
from studies.spec import StudySpec

JOURNAL = "optuna.journal"
CONNECT_SECONDS = 5
TRIES = 3
DEFAULT_PROXY_PORT = 13000


class StorageUnreachable(RuntimeError):
    """Optuna's storage cannot be opened, or went away."""


@dataclass(frozen=True)
class OpenStorage:
    """An open storage.

    Attributes:
        optuna: What Optuna takes.
        journal: The journal file if that is what it is, to be forced to disk.
        is_shared: Whether other studies, and people of other folders, may be in it.
    """

    optuna: BaseStorage
    journal: FileJournal | None = None
    is_shared: bool = False


def open_storage(spec: StudySpec) -> OpenStorage:
    """Opens the storage of a spec.

    Raises:
        SpecError: If a database driver is missing.
        StorageUnreachable: If a database or proxy does not answer.
    """
    if spec.storage == "journal":
        journal = StudyFolder.of(spec).storage.child(JOURNAL)
        if journal.local is None:
            return OpenStorage(JournalStorage(ObjectJournal(journal)))
        file = FileJournal(journal.local)
        return OpenStorage(JournalStorage(file), file)
    return OpenStorage(open_url(spec.storage), is_shared=True)


def open_url(url: str) -> BaseStorage:
    """Opens a database or a gRPC proxy.

    Raises:
        SpecError: If a database driver is missing.
        StorageUnreachable: If it does not answer.
    """
    if url.startswith("grpc://"):
        return _open_proxy(url)
    scheme, _, place = url.partition("://")
    is_server = scheme.startswith("postgresql")
    if scheme == "postgresql" and find_spec("psycopg2") and not find_spec("psycopg"):
        url = f"postgresql+psycopg2://{place}"  # SQLAlchemy 2.1 looks for the other one
    # A pool that tests its connections outlives a restart of the server.
    options = {"connect_args": {"connect_timeout": CONNECT_SECONDS}} if is_server else {}
    with explaining(url):
        try:
            database = _open_database(url, {**options, "pool_pre_ping": is_server})
        except ImportError as error:
            package = "psycopg2-binary" if scheme.endswith("psycopg2") else "'psycopg[binary]'"
            raise SpecError(
                f"storage {scheme}:// needs a database driver that is not installed ({error}); "
                f"pip install {package}, or leave storage out for a journal file"
            ) from None
        return optuna.storages.get_storage(database)


def _open_database(url: str, engine: dict[str, Any]) -> optuna.storages.RDBStorage:
    """Opens a database; of several drivers that find it empty, one makes Optuna's tables."""
    import sqlalchemy.exc

    for _ in range(TRIES):
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs=engine)
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
            time.sleep(1)  # another one is making them now
    return optuna.storages.RDBStorage(url, engine_kwargs=engine)


def _open_proxy(url: str) -> BaseStorage:
    place = urlsplit(url)
    host, port = place.hostname or "localhost", place.port or DEFAULT_PROXY_PORT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        proxy = optuna.storages.GrpcStorageProxy(host=host, port=port)
    try:
        proxy.wait_server_ready(timeout=CONNECT_SECONDS)
    except ConnectionError:
        raise StorageUnreachable(
            f"no gRPC proxy answers at {url} within {CONNECT_SECONDS} s; start one with 'comp "
            "study proxy DATABASE-URL', or leave storage out for a journal file"
        ) from None
    return proxy


@contextlib.contextmanager
def explaining(url: str) -> Iterator[None]:
    """Turns what a database driver raises into a sentence.

    Raises:
        StorageUnreachable: In place of it.
    """
    try:
        yield
    except Exception as error:
        # A journal needs no SQLAlchemy, whose import takes longer than reading it.
        is_database = type(error).__module__.startswith("sqlalchemy")
        if not is_database and not isinstance(error, StorageInternalError):
            raise
        origin = getattr(error, "orig", None) or error.__cause__ or error
        lines = [line.strip() for line in str(origin).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) or type(origin).__name__
        raise StorageUnreachable(
            f"storage {_without_password(url)} cannot be used: {reason}; start the database, "
            "mend the address, or leave storage out for a journal file"
        ) from error


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{place}{parts.path}"


def serve_proxy(url: str, host: str, port: int) -> None:
    """Serves a database to drivers that reach this machine and not the database, until stopped.

    Anybody who reaches the port may read and write every study; it asks for no password.

    Raises:
        SpecError: If a database driver is missing.
        StorageUnreachable: If the database does not answer.
    """
    storage = open_url(url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.storages.run_grpc_proxy_server(storage, host=host, port=port)
