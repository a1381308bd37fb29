"""A PostgreSQL server of one's own, on a port of this machine, with a password."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from sqlalchemy import URL, create_engine, text

PASSWORD = "a-password-that-is-nowhere-shown"


class Cluster:
    """A cluster in a folder; `begin` and `kill` may follow one another."""

    def __init__(self, binaries: Path, folder: Path, user: int) -> None:
        self._binaries, self._folder, self._user = binaries, folder, user
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        secret = folder / "password"
        secret.write_text(PASSWORD)
        os.chown(secret, user, -1)
        data = folder / "data"
        words = [
            "-D",
            str(data),
            "-U",
            "temper",
            "-A",
            "scram-sha-256",
            f"--pwfile={secret}",
            "--no-sync",
            "-E",
            "UTF8",
        ]
        subprocess.run([binaries / "initdb", *words], user=user, cwd=folder, check=True, capture_output=True)
        self.begin()

    def begin(self) -> None:
        """Starts the server, and waits until it answers."""
        words = ["-D", str(self._folder / "data"), "-h", "127.0.0.1", "-p", str(self._port), "-k", str(self._folder)]
        with (self._folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self._binaries / "postgres", *words], user=self._user, cwd=self._folder, stdout=log, stderr=log
            )
        asked = [str(self._binaries / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self._port)]
        while subprocess.run(asked, check=False).returncode:
            assert self.process.poll() is None, (self._folder / "log").read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        """Ends it as a power cut would: what it had not written is lost."""
        children = psutil.Process(self.process.pid).children()
        self.process.kill()
        self.process.wait()
        for each in children:
            with suppress(psutil.NoSuchProcess):  # it has seen that the first one is gone
                each.kill()
        while any(_lives(each) for each in children):  # as long as one does, no other server can begin there
            time.sleep(0.01)

    def database(self) -> URL:
        """The URL of an empty database."""
        name = f"t{uuid.uuid4().hex}"
        server = URL.create("postgresql", "temper", PASSWORD, "127.0.0.1", self._port, "postgres")
        engine = create_engine(server, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"create database {name}"))
        engine.dispose()
        return server.set(database=name)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A running cluster; skips the test where there is no PostgreSQL or no driver of it."""
    pytest.importorskip("psycopg2", reason="no driver: pip install psycopg2-binary")
    found = shutil.which("initdb") or next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))[-1:]), None)
    if not found:
        pytest.skip("no PostgreSQL on this machine")
    folder = Path(tempfile.mkdtemp(prefix="temper-pg-"))
    user = os.getuid()
    if not user:  # it does not run as root
        import pwd

        user = pwd.getpwnam("nobody").pw_uid
        os.chown(folder, user, -1)
    try:
        running = Cluster(Path(found).resolve().parent, folder, user)
        try:
            yield running
        finally:
            running.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
