"""A directory for results, on a local disk or behind any URI that ``pyarrow.fs`` knows.

Writes are all or nothing. On a local disk a file or tree is written under a temporary name, synced
and renamed; journalling file systems keep renames in order, so whatever is there was complete when
a later thing was begun. In an object store a single put is atomic, and of a tree the manifest is
sent last.
"""

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


class StorageError(RuntimeError):
    """Results cannot be written. What was written before is intact."""


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
            ValueError: If the URI's scheme is not known.
        """
        self.location = str(location)
        self.local: Path | None = None
        self._fs, self._path = filesystem, path
        if filesystem is None and "://" in self.location:
            try:
                self._fs, self._path = fs.FileSystem.from_uri(self.location)
            except (ValueError, NotImplementedError) as error:
                raise ValueError(
                    f"storage must be a path or a URI that pyarrow knows, but got {location!r}: "
                    f"{error}"
                ) from error
            if isinstance(self._fs, fs.LocalFileSystem):
                self.location = self._path
                self._fs = None
        if self._fs is None:
            self.local = Path(self.location).absolute()
            self.location = str(self.local)

    def _inside(self, name: str) -> str:
        return self._path if name == "." else f"{self._path}/{name}"

    def child(self, name: str) -> "Storage":
        """Returns a directory inside this one."""
        location = f"{self.location.rstrip('/')}/{name}"
        return Storage(location, self._fs, self._inside(name) if self._fs else "")

    def write(self, name: str, data: bytes) -> None:
        """Writes a file so that it is there entirely or not at all, whenever the machine stops.

        Raises:
            StorageError: If the disk is full, read-only or otherwise unwilling.
        """
        with self._explained(name):
            if self.local is None:
                self._put(self._inside(name), data)
                return
            target = self.local / name
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
            try:
                with temporary.open("wb") as stream:
                    stream.write(data)
                    stream.flush()
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
            target = self.local / name
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
        """
        if self.local is not None:
            if not (self.local / name).is_dir():
                raise FileNotFoundError(f"there is no directory {self.local / name}")
            yield self.local / name
            return
        with tempfile.TemporaryDirectory() as scratch:
            root = self._inside(name)
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
        """
        if self.local is not None:
            try:
                return (self.local / name).read_bytes()
            except NotADirectoryError as error:
                raise FileNotFoundError(f"there is no file {self.local / name}") from error
        with self._fs.open_input_stream(self._inside(name)) as stream:
            return bytes(stream.read())

    def exists(self, name: str) -> bool:
        """Says whether there is such a file or directory."""
        if self.local is not None:
            return (self.local / name).exists()
        info = self._fs.get_file_info(self._inside(name))
        return bool(info.type != fs.FileType.NotFound)

    def names(self, under: str = ".") -> list[str]:
        """Returns the sorted names in a directory, without those that are still being written."""
        if self.local is not None:
            directory = self.local / under
            found = [path.name for path in directory.iterdir()] if directory.is_dir() else []
        else:
            selector = fs.FileSelector(self._inside(under), allow_not_found=True)
            found = [info.base_name for info in self._fs.get_file_info(selector)]
        return sorted(name for name in found if not name.startswith("."))

    def sizes(self, under: str) -> dict[str, int]:
        """Returns bytes of every file below a directory, by its path relative to this one."""
        if self.local is not None:
            files = [path for path in (self.local / under).rglob("*") if path.is_file()]
            return {p.relative_to(self.local).as_posix(): p.stat().st_size for p in sorted(files)}
        selector = fs.FileSelector(self._inside(under), recursive=True, allow_not_found=True)
        infos = [i for i in self._fs.get_file_info(selector) if i.type == fs.FileType.File]
        return {Path(i.path).relative_to(self._path).as_posix(): int(i.size) for i in infos}

    def remove(self, name: str) -> None:
        """Deletes a file or a directory with all it holds; nothing happens if it is not there.

        Raises:
            StorageError: If the disk is read-only or otherwise unwilling.
        """
        with self._explained(name):
            if self.local is not None:
                path = self.local / name
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
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            remedy = _REMEDIES.get(error.errno or 0, "mend that")
            raise StorageError(
                f"cannot write {self.location}/{name}: {reason}; {remedy} and give the same "
                "command again, finished stages are kept"
            ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
