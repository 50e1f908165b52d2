"""A PostgreSQL server for tests: on a Unix socket in a temporary directory, gone at the end."""

import contextlib
import getpass
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

DEBIAN = Path("/usr/lib/postgresql")


def find_programs() -> Path | None:
    """Returns the directory of ``initdb`` and ``pg_ctl``."""
    found = shutil.which("pg_ctl")
    if found and (Path(found).parent / "initdb").exists():
        return Path(found).parent
    versions = sorted(DEBIAN.glob("*/bin/pg_ctl"), key=lambda path: float(path.parts[-3]))
    return versions[-1].parent if versions else None


@contextlib.contextmanager
def serving_postgres() -> Iterator[Callable[[str], str]]:
    """Starts a server, and gives what makes a database there and returns its URL.

    It listens on no port. As root, which the server refuses, it runs as the user ``postgres``.
    """
    programs = find_programs()
    if programs is None:
        pytest.skip("PostgreSQL's server is not installed: apt-get install postgresql")
    pytest.importorskip("psycopg", reason="pip install 'psycopg[binary]'")
    is_root = os.geteuid() == 0
    user = "postgres" if is_root else getpass.getuser()
    as_user = ["runuser", "-u", user, "--"] if is_root else []

    def call(*words: str | Path) -> None:
        command = [*as_user, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as scratch:
        place = Path(scratch)
        if is_root:
            shutil.chown(place, user)
        data, log = place / "data", place / "log"
        call(programs / "initdb", "-D", data, "-U", user, "-A", "trust", "--no-sync")
        options = f"-k {place} -c listen_addresses='' -c fsync=off"
        call(programs / "pg_ctl", "-D", data, "-l", log, "-w", "-o", options, "start")
        try:
            yield partial(_make_database, user, place)
        finally:
            call(programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")


def _make_database(user: str, socket: Path, name: str) -> str:
    import psycopg
    from psycopg import sql

    with psycopg.connect(host=str(socket), user=user, dbname="postgres", autocommit=True) as link:
        link.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return f"postgresql://{user}@/{name}?host={socket}"
