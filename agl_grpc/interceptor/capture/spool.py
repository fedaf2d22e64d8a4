"""Model calls on local disk while the store is away: append, fsync, deliver in order, delete."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

_HEADER = struct.Struct("<II")
_END = bytes(_HEADER.size)
"""Stands after the last record of a file that has room for more."""

_ROOM = 512 * 1024
_SUFFIX = ".spool"
WRITER = "agl-spool"
"""The name of the thread that writes."""

_Job = tuple[Callable[[], None], Callable[["OSError | None"], None]]


class SpoolFull(Exception):
    """The spool holds as much as it may, or the disk does."""


class SpoolInUse(Exception):
    """Another process holds this spool folder."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a spooled record lies: its segment, the position of its data there and their length.

    `note` is what its producer keeps with it in memory; None for records of an earlier process.
    """

    segment: int
    position: int
    length: int
    note: Any = field(default=None, compare=False, repr=False)


Written = Callable[["Entry | None", "SpoolFull | None"], None]
"""Told where a record lies, once it is on disk, or why it is not."""


class _Pending(NamedTuple):
    """A record that is to be written."""

    data: bytes
    note: Any
    written: Written


@dataclass
class _Segment:
    number: int
    path: Path
    size: int
    waiting: int
    room: int = 0
    """Bytes of its file, where it is longer than its records."""


class Spool:
    """A queue of byte records in `folder`, at most `limit` bytes, that survives the process.

    What `append` returns resolves once its record is on disk (records that come together are written as one).
    Records are named oldest first by `peek`, read with `read` and removed with `drop`. A segment's file goes
    when its last record is dropped, so a crash may deliver records of one segment again: they must be
    harmless to repeat. Records are kept on disk only. With `reuse` a file is longer than its records, and one
    whose records are all delivered is written again from its beginning: making a file, and making one longer,
    turns the file system's journal, which takes longer than the record itself. What such a file has room for,
    at most a segment, is not counted as held. Use from one event loop.
    """

    def __init__(
        self, folder: Path, limit: int, segment_bytes: int = 16 * 1024 * 1024, *, reuse: bool = False
    ) -> None:
        self._lock = _lock(folder)
        self._folder = folder
        self._limit = limit
        self._segment_bytes = segment_bytes
        self._reuse = reuse
        self._last_number = 0
        self._segments: dict[int, _Segment] = {}
        self._entries: deque[Entry] = deque()
        self._file: int | None = None
        self._current: _Segment | None = None
        self._pending: list[_Pending] = []
        self._under_way: list[_Pending] = []
        self._reader: tuple[int, int] | None = None
        self._writer: _Writer | None = None
        self._drained: asyncio.Future[None] | None = None
        self._disk_full = False
        self._unlinks: set[asyncio.Future[None]] = set()
        self.damaged = 0
        """Records lost to torn or damaged files, found at start."""
        for path in sorted(folder.glob(f"*{_SUFFIX}")):
            self._read_segment(path)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(segment.size for segment in self._segments.values())

    @property
    def waiting(self) -> int:
        """Records not yet delivered."""
        return len(self._entries)

    @property
    def full(self) -> bool:
        """Whether new records should not be taken on."""
        return self._disk_full or self.size >= self._limit

    def append(self, data: bytes, note: Any = None) -> asyncio.Future[Entry]:
        """As `write`; the future says where the record lies, once it is on disk, or raises SpoolFull."""
        future: asyncio.Future[Entry] = asyncio.get_running_loop().create_future()

        def written(entry: Entry | None, error: SpoolFull | None) -> None:
            if future.done():
                return
            if entry is not None:
                future.set_result(entry)
            elif error is not None:
                future.set_exception(error)

        self.write(data, note, written)
        return future

    def write(self, data: bytes, note: Any, written: Written) -> None:
        """Begin to write one record; `written` is called, in a later turn of the loop, once that is done or
        cannot be done. `note` comes back in the record's entry.

        Raises SpoolFull when the limit is exceeded by far. The limit gates new calls (`full`); calls under
        way may exceed it by an eighth.
        """
        if self.size > self._limit + self._limit // 8:
            raise SpoolFull(f"spool {self._folder} holds {self.size} bytes, limit {self._limit}")
        self._pending.append(_Pending(data, note, written))
        if not self._under_way and len(self._pending) == 1:
            # Not at once: what else ends in this turn of the loop is written with it.
            asyncio.get_running_loop().call_soon(self._write_pending)

    def peek(self, count: int, max_bytes: int) -> list[Entry]:
        """The oldest records, at most `count` and about `max_bytes` (at least one)."""
        chosen: list[Entry] = []
        size = 0
        for entry in self._entries:
            if len(chosen) >= count or (chosen and size + entry.length > max_bytes):
                break
            chosen.append(entry)
            size += entry.length
        return chosen

    def read(self, entry: Entry) -> bytes:
        """The record that lies there."""
        if self._reader is None or self._reader[0] != entry.segment:
            self._close_reader()
            self._reader = (entry.segment, os.open(self._segments[entry.segment].path, os.O_RDONLY))
        return os.pread(self._reader[1], entry.length, entry.position)

    def drop(self, count: int) -> None:
        """Remove the oldest `count` records: they are delivered."""
        for _ in range(count):
            entry = self._entries.popleft()
            segment = self._segments[entry.segment]
            segment.waiting -= 1
            if segment.waiting == 0:
                self._emptied(segment)
        self._disk_full = False

    async def close(self) -> None:
        """Finish writes under way and let go of the folder; records stay for the next process."""
        while self._writing():
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained
        if self._writer is not None:
            self._writer.close()
        self._close_current()
        self._close_reader()
        if self._unlinks:
            await asyncio.wait(self._unlinks)
        os.close(self._lock)

    def _write_pending(self) -> None:
        """Have the writer take what waits."""
        self._under_way, self._pending = self._pending, []
        segment = self._current or self._new_segment()
        if self._writer is None:
            self._writer = _Writer(asyncio.get_running_loop())
        data = b"".join(part for each in self._under_way for part in (_header(each.data), each.data))
        self._writer.write(lambda: self._write(segment, data), lambda error: self._wrote(segment, error))

    def _wrote(self, segment: _Segment, error: OSError | None) -> None:
        batch, self._under_way = self._under_way, []
        if error is None:
            self._keep(segment, batch)
        else:
            self._disk_full = True
            self._close_current()
            for each in batch:
                each.written(None, SpoolFull(f"cannot write to spool {self._folder}: {error.strerror}"))
        if self._pending:
            self._write_pending()
        elif self._drained is not None:
            self._drained.set_result(None)
            self._drained = None

    def _keep(self, segment: _Segment, batch: list[_Pending]) -> None:
        entries = []
        for data, note, _ in batch:
            entries.append(Entry(segment.number, segment.size + _HEADER.size, len(data), note))
            segment.waiting += 1
            segment.size += _HEADER.size + len(data)
        self._entries += entries
        if segment.size >= self._segment_bytes:
            self._close_current()
        for entry, each in zip(entries, batch, strict=True):
            each.written(entry, None)

    def _new_segment(self) -> _Segment:
        """The next segment; its file is made by the first write."""
        number = self._last_number = max(self._last_number, *self._segments, 0) + 1
        path = self._folder / f"{number:012d}{_SUFFIX}"
        self._current = self._segments[number] = _Segment(number, path, 0, 0)
        return self._current

    def _write(self, segment: _Segment, data: bytes) -> None:
        """Runs in the writer's thread, while nobody else touches the segment's file."""
        if self._file is None:
            # Each write returns when its data is on disk.
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_DSYNC
            self._file = os.open(segment.path, flags, 0o600)
            _fsync_folder(self._folder)
        if self._reuse:
            data += _END
            if segment.size + len(data) > segment.room:
                data += bytes(_ROOM)
                segment.room = segment.size + len(data)
        view, position = memoryview(data), segment.size
        while view:
            done = os.pwrite(self._file, view, position)
            view, position = view[done:], position + done

    def _close_reader(self) -> None:
        if self._reader is not None:
            os.close(self._reader[1])
            self._reader = None

    def _close_current(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = None
        current, self._current = self._current, None
        if current is not None and current.waiting == 0:
            self._remove(current)

    def _emptied(self, segment: _Segment) -> None:
        if segment is not self._current or not self._reuse:
            self._remove(segment)
        elif not self._writing():
            segment.size = 0

    def _writing(self) -> bool:
        return bool(self._pending or self._under_way)

    def _remove(self, segment: _Segment) -> None:
        if segment is self._current:
            if self._writing():
                return  # being written to: it goes with its last record
            self._current = None
            if self._file is not None:
                os.close(self._file)
                self._file = None
        if self._reader is not None and self._reader[0] == segment.number:
            self._close_reader()
        self._unlink(segment.path)
        self._segments.pop(segment.number, None)

    def _unlink(self, path: Path) -> None:
        """Delete a file beside the event loop: a large one takes milliseconds."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            path.unlink(missing_ok=True)
            return
        deleted = loop.run_in_executor(None, path.unlink, True)
        self._unlinks.add(deleted)
        deleted.add_done_callback(self._unlinks.discard)

    def _read_segment(self, path: Path) -> None:
        data = path.read_bytes()
        segment = _Segment(int(path.stem), path, 0, 0)
        self._segments[segment.number] = segment
        for length in _records(data):
            self._entries.append(Entry(segment.number, segment.size + _HEADER.size, length))
            segment.waiting += 1
            segment.size += _HEADER.size + length
        if data[segment.size :] and not data.startswith(_END, segment.size):
            self.damaged += 1
        if segment.waiting == 0:
            self._remove(segment)


class _Writer:
    """A thread that does one blocking thing after the other for an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=WRITER, daemon=True)
        self._thread.start()

    def write(self, work: Callable[[], None], done: Callable[[OSError | None], None]) -> None:
        """Do `work` beside the loop, then call `done` in it."""
        self._jobs.put((work, done))

    def close(self) -> None:
        """End the thread, when it has done all of it."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            work, done = job
            error = None
            try:
                work()
            except OSError as raised:
                error = raised
            # A loop that has ended without closing the spool waits for nothing any more.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(done, error)


def _header(record: bytes) -> bytes:
    return _HEADER.pack(len(record), zlib.crc32(record))


def _lock(folder: Path) -> int:
    """The lock of a folder, which is made. Raises SpoolInUse."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise SpoolInUse(
            f"spool folder {folder} is used by another process: give each engine its own"
        ) from error
    return lock


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes off a folder without using it as a spool. Raises SpoolInUse."""
    lock = _lock(folder)
    try:
        yield
    finally:
        os.close(lock)


def gather(folder: Path, workers: int) -> None:
    """Move what earlier processes left to where one of today's delivers it.

    One process has its spool in `folder` itself, several in ``worker-0``, ``worker-1``, ... there. The caller
    holds `folder`. Raises SpoolInUse where a process of another proxy lives on.
    """
    target = folder if workers == 1 else folder / "worker-0"
    of_today = {folder / f"worker-{number}" for number in range(workers)} if workers > 1 else {folder}
    found = {folder, *folder.glob("worker-*")} - of_today
    for source in sorted(each for each in found if any(each.glob(f"*{_SUFFIX}"))):
        held = contextlib.nullcontext() if source == folder else hold(source)
        with held, contextlib.nullcontext() if target == folder else hold(target):
            last = max((int(path.stem) for path in target.glob(f"*{_SUFFIX}")), default=0)
            for number, path in enumerate(sorted(source.glob(f"*{_SUFFIX}")), last + 1):
                path.rename(target / f"{number:012d}{_SUFFIX}")
        _fsync_folder(target)
        _fsync_folder(source)


def _records(data: bytes) -> Iterator[int]:
    """Lengths of the whole records from the start; a torn or damaged one ends the file."""
    position = 0
    while position + _HEADER.size <= len(data):
        length, checksum = _HEADER.unpack_from(data, position)
        record = data[position + _HEADER.size : position + _HEADER.size + length]
        if not length or len(record) < length or zlib.crc32(record) != checksum:
            return
        yield length
        position += _HEADER.size + length


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
