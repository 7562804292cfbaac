"""A PostgreSQL server of the distribution's package, on a socket in a folder of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def programs() -> Path | None:
    """The folder of the newest version's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return found[-1].parent if found else None


@contextmanager
def server() -> Iterator[str]:
    """The URL of its database; skips where the package is not installed. A server refuses root: it runs as user postgres."""
    folder = programs()
    if folder is None:
        pytest.skip("PostgreSQL's server is not installed (Debian's package postgresql)")
    pytest.importorskip("psycopg", reason="psycopg is not installed (extra postgres)")
    place = tempfile.mkdtemp(prefix="p2l-pg-", dir="/tmp")  # a socket's path must be short
    user = None
    if os.getuid() == 0:
        user = "postgres"
        os.chown(place, pwd.getpwnam(user).pw_uid, -1)
    data = f"{place}/data"

    def run(program: str, *arguments: str) -> None:
        with open(f"{place}/log", "a+") as log:
            done = subprocess.run(
                [folder / program, "-D", data, *arguments], user=user, cwd="/", stdout=log, stderr=log, check=False
            )
            log.seek(0)
            assert done.returncode == 0, log.read()

    try:
        run("initdb", "-U", "p2l", "-A", "trust", "-E", "UTF8", "--no-sync")
        # Its own settings apart from fsync: the tests do not cut the power.
        run("pg_ctl", "start", "-w", "-o", f"-k {place} -c listen_addresses='' -c fsync=off -c max_connections=300")
        try:
            yield f"postgresql+psycopg://p2l@/postgres?host={place}"
        finally:
            run("pg_ctl", "stop", "-w", "-m", "immediate")
    finally:
        shutil.rmtree(place)


def control(url: str, action: str) -> None:
    """Stops the server, as a machine that fails does, or starts it again."""
    place = url.partition("host=")[2]
    options = ["-m", "immediate"] if action == "stop" else ["-o", f"-k {place} -c listen_addresses='' -c fsync=off"]
    subprocess.run(
        [f"{programs()}/pg_ctl", "-D", f"{place}/data", action, "-w", *options],
        user="postgres" if os.getuid() == 0 else None, cwd="/", stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip


def empty(url: str) -> None:
    """Drops everything in the database."""
    import psycopg

    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
