"""A directory for results, on a local disk or behind any URI that ``pyarrow.fs`` knows.

Writes are all or nothing. On a local disk a file or tree is written under a temporary name, synced
and renamed; journalling file systems keep renames in order, so whatever is there was complete when
a later thing was begun. In an object store a single put is atomic, and of a tree the manifest is
sent last.
"""

import contextlib
import errno
import functools
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from pyarrow import fs

_REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there",
    errno.EFBIG: "raise the file size limit",
    errno.EROFS: "choose a directory that can be written",
    errno.EACCES: "choose a directory that can be written",
    errno.EPERM: "choose a directory that can be written",
    errno.EEXIST: "move the file that stands in the way",
    errno.ENOTDIR: "move the file that stands in the way",
}


# What object stores say, matched in this order against the text of the error.
_REMOTE = (
    ("NO_SUCH_BUCKET|bucket.* not found", "the bucket does not exist", "make it or name another"),
    (
        "StorageFull|QuotaExceeded|HTTP status 507|No space left",
        "the store is full",
        "free some space there",
    ),
    (
        "INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN|EXPIRED_TOKEN",
        "the store does not know the key in use",
        "put a valid one into the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)",
    ),
    (
        "ACCESS_DENIED|Forbidden|HTTP status 403|Permission denied",
        "access is denied",
        "ask for the right to read and write there, or name another place",
    ),
    (
        "NETWORK_CONNECTION|resolve host|curlCode|resolving region|imed out|UNAVAILABLE",
        "the store cannot be reached",
        "check the network and the store's address (AWS_ENDPOINT_URL for S3)",
    ),
    ("libjvm|libhdfs", "Hadoop's client is not installed", "install it and set HADOOP_HOME"),
)


class StorageError(RuntimeError):
    """Results cannot be written or read. What was written before is intact."""


def is_remote(location: str | Path) -> bool:
    """Tells whether a location is a URI of something else than a local disk."""
    return "://" in str(location) and not str(location).startswith("file://")


def _local_path(location: str | Path) -> Path:
    text = str(location)
    return Path(unquote(urlsplit(text).path) if text.startswith("file://") else text)


def join(location: str | Path, *names: str) -> str:
    """Returns the location of something inside a directory; options behind ``?`` stay last."""
    if not is_remote(location):
        return str(_local_path(location).joinpath(*names))
    base, mark, options = str(location).partition("?")
    return "/".join([base.rstrip("/"), *names]) + mark + options


def parent(location: str | Path, levels: int = 1) -> str:
    """Returns the directory that many levels above a location."""
    if not is_remote(location):
        return str(_local_path(location).absolute().parents[levels - 1])
    base, mark, options = str(location).partition("?")
    return base.rstrip("/").rsplit("/", levels)[0] + mark + options


def last_name(location: str | Path) -> str:
    """Returns the last part of a location, which is the run id for a run directory."""
    return str(location).partition("?")[0].rstrip("/").rpartition("/")[2]


def absolute(location: str | Path) -> str:
    """Returns a location that means the same from any directory.

    Raises:
        ValueError: If a URI is not known to pyarrow, holds a password, or climbs with ``..``.
    """
    if not is_remote(location):
        return str(_local_path(location).resolve())
    text = str(location)
    parts = urlsplit(text)
    if _has_secret(parts):
        hidden = f"{parts.scheme}://***@{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise ValueError(
            f"a storage URI must not hold a key or a password, but got {hidden!r}; put it into "
            "the environment, for example AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if ".." in parts.path.split("/") or not parts.netloc:
        raise ValueError(
            f"a storage URI must name a place such as s3://BUCKET/DIRECTORY, but got {text!r}"
        )
    if parts.scheme not in SCHEMES:
        raise ValueError(
            f"storage must be a path or a URI that starts with one of {', '.join(SCHEMES)}, but "
            f"got {text!r}"
        )
    return join(text)


def _has_secret(parts: SplitResult) -> bool:
    """Tells whether a URI holds a key: before the host, or as an option."""
    user, at, _ = parts.netloc.rpartition("@")
    is_container = parts.scheme in ("abfs", "abfss") and ":" not in user
    names = [option.partition("=")[0] for option in parts.query.split("&")]
    return bool(at and not is_container) or any(map(_SECRET_OPTION.search, names))


_SECRET_OPTION = re.compile("key|secret|token|password|sas|signature", re.I)
SCHEMES = ("file", "s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss", "mock")


@functools.lru_cache(maxsize=16)
def _filesystem(prefix: str, options: str) -> tuple[Any, str]:
    """Opens a file system once per process: S3 looks up where a bucket is each time.

    Returns:
        The file system, and the path of the bucket or container in it.
    """
    is_google = prefix.startswith(("gs://", "gcs://"))
    if is_google and "retry_limit_seconds" not in options:
        options += "&" if options else ""
        options += "retry_limit_seconds=15"  # the default waits fifteen minutes
    found: tuple[Any, str] = fs.FileSystem.from_uri(prefix + ("?" + options if options else ""))
    return found


class Storage:
    """One directory.

    Attributes:
        location: The directory as a person would name it: an absolute path or a URI.
        local: The same as a path, or ``None`` if it is not on a local disk.
    """

    def __init__(self, location: str | Path, filesystem: Any = None, path: str = "") -> None:
        """Points at a directory, which need not exist yet.

        Args:
            location: A path, a ``file://`` URI or any other URI of ``pyarrow.fs``.
            filesystem: A ``pyarrow.fs.FileSystem`` to use instead of what ``location`` says.
            path: The directory inside ``filesystem``.

        Raises:
            ValueError: If it is a URI that cannot be used, see ``absolute``.
            StorageError: If the store cannot be reached to find out where its bucket is.
        """
        self.location = str(location)
        self.local: Path | None = None
        self._fs, self._path = filesystem, path
        if filesystem is None and is_remote(location):
            self.location = absolute(location)
            parts = urlsplit(self.location)
            try:
                self._fs, base = _filesystem(f"{parts.scheme}://{parts.netloc}", parts.query)
            except (OSError, ValueError, NotImplementedError) as error:
                raise StorageError(f"cannot open {self.location}: {_told(error)}") from error
            self._path = base.rstrip("/") + parts.path.rstrip("/")
        if self._fs is None:
            self.local = _local_path(location).absolute()
            self.location = str(self.local)

    def _inside(self, name: str) -> str:
        _check_inside(name)
        return self._path if name == "." else f"{self._path}/{name}"

    def _at(self, name: str) -> Path:
        _check_inside(name)
        assert self.local is not None
        return self.local / name

    def child(self, name: str) -> "Storage":
        """Returns a directory inside this one."""
        _check_inside(name)
        location = join(self.location, name)
        return Storage(location, self._fs, self._inside(name) if self._fs else "")

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Writes a file so that it is there entirely or not at all.

        Args:
            name: Its path inside this directory.
            data: Its content.
            durable: Whether that holds for a power cut too, or only for killed processes.

        Raises:
            StorageError: If the disk is full, read-only or otherwise unwilling.
        """
        with self._explained(name):
            if self.local is None:
                self._put(self._inside(name), data)
                return
            target = self._at(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
            try:
                with temporary.open("wb") as stream:
                    stream.write(data)
                    stream.flush()
                    if durable:
                        os.fsync(stream.fileno())
                temporary.rename(target)
            finally:
                temporary.unlink(missing_ok=True)

    def _put(self, path: str, data: bytes) -> None:
        try:
            stream = self._fs.open_output_stream(path)
        except FileNotFoundError:  # object stores need no directories, the others do
            self._fs.create_dir(path.rpartition("/")[0], recursive=True)
            stream = self._fs.open_output_stream(path)
        with stream:
            stream.write(data)

    def write_tree(self, name: str, fill: Callable[[Path], None]) -> None:
        """Replaces a directory by what ``fill`` writes into the path that it is given.

        Raises:
            StorageError: If the disk is full, read-only or otherwise unwilling.
        """
        with self._explained(name):
            if self.local is None:
                self._upload_tree(name, fill)
                return
            target = self._at(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
            try:
                fill(temporary)
                for path in [temporary, *temporary.rglob("*")]:
                    _sync(path)
                if target.exists():
                    shutil.rmtree(target)
                temporary.rename(target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def _upload_tree(self, name: str, fill: Callable[[Path], None]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            tree = Path(scratch) / "tree"
            fill(tree)
            files = [path for path in tree.rglob("*") if path.is_file()]
            for path in sorted(files, key=lambda path: path.name == "manifest.json"):
                self.write(f"{name}/{path.relative_to(tree).as_posix()}", path.read_bytes())

    @contextlib.contextmanager
    def tree(self, name: str = ".") -> Iterator[Path]:
        """Gives a directory as a local path: itself, or a copy that lasts as long as the context.

        Args:
            name: A directory inside this one, or this one.

        Raises:
            FileNotFoundError: If there is no such directory.
            StorageError: If the store cannot be read.
        """
        if self.local is not None:
            if not (self._at(name)).is_dir():
                raise FileNotFoundError(f"there is no directory {self._at(name)}")
            yield self._at(name)
            return
        with tempfile.TemporaryDirectory() as scratch:
            root = self._inside(name)
            with self._explained(name, "read"):
                for info in self._fs.get_file_info(fs.FileSelector(root, recursive=True)):
                    if info.type == fs.FileType.File:
                        target = Path(scratch) / Path(info.path).relative_to(root)
                        target.parent.mkdir(parents=True, exist_ok=True)
                        with self._fs.open_input_stream(info.path) as stream:
                            target.write_bytes(stream.read())
            yield Path(scratch)

    def read(self, name: str) -> bytes:
        """Returns a file's content.

        Raises:
            FileNotFoundError: If there is no such file.
            StorageError: If the store cannot be read.
        """
        if self.local is not None:
            try:
                return (self._at(name)).read_bytes()
            except NotADirectoryError as error:
                raise FileNotFoundError(f"there is no file {self._at(name)}") from error
        with (
            self._explained(name, "read"),
            self._fs.open_input_stream(self._inside(name)) as stream,
        ):
            return bytes(stream.read())

    def exists(self, name: str) -> bool:
        """Says whether there is such a file or directory."""
        if self.local is not None:
            return (self._at(name)).exists()
        with self._explained(name, "read"):
            info = self._fs.get_file_info(self._inside(name))
        return bool(info.type != fs.FileType.NotFound)

    def names(self, under: str = ".") -> list[str]:
        """Returns the sorted names in a directory, without those that are still being written."""
        if self.local is not None:
            directory = self._at(under)
            found = [path.name for path in directory.iterdir()] if directory.is_dir() else []
        else:
            selector = fs.FileSelector(self._inside(under), allow_not_found=True)
            with self._explained(under, "read"):
                found = [info.base_name for info in self._fs.get_file_info(selector)]
        return sorted(name for name in found if not name.startswith("."))

    def sizes(self, under: str) -> dict[str, int]:
        """Returns bytes of every file below a directory, by its path relative to this one."""
        if self.local is not None:
            files = [path for path in (self._at(under)).rglob("*") if path.is_file()]
            return {p.relative_to(self.local).as_posix(): p.stat().st_size for p in sorted(files)}
        selector = fs.FileSelector(self._inside(under), recursive=True, allow_not_found=True)
        with self._explained(under, "read"):
            infos = [i for i in self._fs.get_file_info(selector) if i.type == fs.FileType.File]
        return {Path(i.path).relative_to(self._path).as_posix(): int(i.size) for i in infos}

    def remove(self, name: str) -> None:
        """Deletes a file or a directory with all it holds; nothing happens if it is not there.

        Raises:
            StorageError: If the disk is read-only or otherwise unwilling.
        """
        with self._explained(name):
            if self.local is not None:
                path = self._at(name)
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
                return
            info = self._fs.get_file_info(self._inside(name))
            if info.type == fs.FileType.Directory:
                self._fs.delete_dir(info.path)
            elif info.type == fs.FileType.File:
                self._fs.delete_file(info.path)

    @contextlib.contextmanager
    def _explained(self, name: str, verb: str = "write") -> Iterator[None]:
        with explaining(self.location if name == "." else join(self.location, name), verb):
            yield


@contextlib.contextmanager
def explaining(where: str | Path, verb: str = "write") -> Iterator[None]:
    """Turns what a file system raises into a ``StorageError`` that names the place and a remedy.

    Args:
        where: What is being read or written.
        verb: ``"read"``, which lets a ``FileNotFoundError`` through, or ``"write"``.
    """
    try:
        yield
    except OSError as error:
        if verb == "read" and isinstance(error, FileNotFoundError):
            raise
        raise StorageError(
            f"cannot {verb} {where}: {_told(error)} and give the same command again, "
            "finished stages are kept"
        ) from error


def _check_inside(name: str) -> None:
    """Raises a ``ValueError`` if a name leads out of its directory."""
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"a name in a storage must stay inside it, but got {name!r}")


def _told(error: Exception) -> str:
    """Returns the reason and what to do, in two clauses."""
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return f"{(error.strerror or '').lower()}; {_REMEDIES[error.errno]}"
    text = str(error)
    for pattern, reason, remedy in _REMOTE:
        if re.search(pattern, text):
            return f"{reason}; {remedy}"
    short = text.partition("(Request ID")[0].strip().rstrip(".:") or type(error).__name__
    return f"{short[0].lower()}{short[1:]}; mend that"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
