"""Moves the write-ahead log into the database beside the writer, so that a commit hardly ever has to."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

from agl_grpc.store.storage.sqlite.connection import SqliteConnection

_PERIOD_SECONDS = 0.25
_WORTH_BYTES = 4 << 20
_log = logging.getLogger(__name__)


class Checkpointer:
    """A thread that checkpoints while commits go on.

    Without it the writer checkpoints on its own, in the middle of a commit, and everybody waits for
    the pages of several seconds to reach the disk. What it leaves over is small.
    """

    def __init__(self, path: Path, connect: Callable[[], SqliteConnection]) -> None:
        self._connect = connect
        self._log_path = Path(f"{path}-wal")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="store-checkpoint", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()

    def _serve(self) -> None:
        connection = self._connect()
        seen = (0, 0)
        while not self._stop.wait(_PERIOD_SECONDS):
            written = self._written()
            if written == seen:
                continue
            seen = written
            try:
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            except sqlite3.Error as error:
                # The writer meets the same trouble at its next commit and decides what it means.
                _log.warning("a checkpoint failed: %s", error)

    def _written(self) -> tuple[int, int]:
        """Changes whenever a log that is worth a checkpoint was written to."""
        try:
            stat = self._log_path.stat()
        except FileNotFoundError:
            return (0, 0)
        return (stat.st_size, stat.st_mtime_ns) if stat.st_size >= _WORTH_BYTES else (0, 0)
