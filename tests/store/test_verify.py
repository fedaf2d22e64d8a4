"""Databases that are damaged in every way, one at a time: `verify` names what is broken."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agl_grpc.store.clock import SECOND, ManualClock
from agl_grpc.store.door.app import ServeConfig, StoreServer
from agl_grpc.store.door.server import StartError
from agl_grpc.store.storage.engine import DatabaseError
from agl_grpc.store.storage.sqlite import operations
from agl_grpc.store.verify import files
from agl_grpc.store.verify.check import INVARIANTS
from agl_grpc.store.verify.references import REFERENCES
from agl_grpc.v1 import common_pb2, span_pb2, store_service_pb2, trainer_service_pb2, training_pb2
from agl_grpc.v1.rollout_pb2 import RolloutSpec
from agl_grpc.v1.trainer_service_pb2_grpc import TrainerServiceStub
from tests.store.rig import FAILED, Rig, running
from tests.store.span_support import call_span

BLOB = b"large" * 220_000


async def live(rig: Rig) -> None:
    """A bit of everything that a store holds."""
    resource = {"name": "llm", "llm": {"endpoint": "http://127.0.0.1:9", "model": "m"}}
    for _ in range(2):
        await rig.store.PublishResources(
            store_service_pb2.PublishResourcesRequest(resources_id="rs", resources=[resource])
        )
    if isinstance(rig.clock, ManualClock):
        rig.clock.advance(1)
    digest = f"sha256:{hashlib.sha256(BLOB).hexdigest()}"
    await rig.store.PutBlob(blob_requests(digest))
    await rig.enqueue(
        RolloutSpec(rollout_id="large", input=common_pb2.Payload(blob_digest=digest), labels=[{"key": "k"}]),
        *[RolloutSpec(rollout_id=name, group_id="g") for name in ("done", "trained", "failed", "held")],
        RolloutSpec(rollout_id="waits", queue="other"),
    )
    leased = await rig.lease(limit=5)
    for number, one in enumerate(leased[:4], start=1):
        await append(rig, one.attempt, number)
        status = {"status": FAILED} if one.rollout.rollout_id == "failed" else {}
        await rig.complete(one, rewards=[{"value": 1.0}], **status)
    calls = [span_pb2.OpenCall(span_id=b"12345678", start_time_unix_nano=1)]
    held = span_pb2.AttemptSpans(attempt_id=leased[4].attempt.attempt_id, open_calls=calls)
    await rig.store.AppendSpans(store_service_pb2.AppendSpansRequest(groups=[held]))
    await rig.cancel("waits")
    await rig.enqueue(rollout_id="next", queue="other")
    await train(rig)
    await rig.store.DrainWorkers(store_service_pb2.DrainWorkersRequest(worker_ids=["w1"]))


async def blob_requests(digest: str) -> AsyncIterator[Any]:
    yield store_service_pb2.PutBlobRequest(digest=digest)
    for start in range(0, len(BLOB), 1 << 20):
        yield store_service_pb2.PutBlobRequest(chunk=BLOB[start : start + (1 << 20)])


async def append(rig: Rig, attempt: Any, number: int) -> None:
    """Two calls, the second one building on the first, and a plain span."""
    first = call_span([1, 2, 3], [4, 5])
    second = call_span([6], [7], base=first.span_id, base_length=5)
    for one in (first, second):
        one.start_time_unix_nano = one.end_time_unix_nano = rig.clock.now() * 1000
    group = span_pb2.AttemptSpans(attempt_id=attempt.attempt_id, spans=[first, second])
    answer = await rig.store.AppendSpans(store_service_pb2.AppendSpansRequest(groups=[group]))
    assert answer.stored == 2
    await rig.span(attempt, number)


async def train(rig: Rig) -> None:
    """A committed batch and a claimed one."""
    trainer: Any = TrainerServiceStub(rig.channel)
    run = training_pb2.TrainingRun(training_run_id="tr", algorithm="verl")
    await trainer.CreateTrainingRun(trainer_service_pb2.CreateTrainingRunRequest(training_run=run))
    held = {"training_run_id": "tr", "trainer_epoch": 1}
    await trainer.AcquireTrainingRun(
        trainer_service_pb2.AcquireTrainingRunRequest(training_run_id="tr", trainer_id="t")
    )
    batches = []
    for name in ("trained", "done"):
        request = trainer_service_pb2.ClaimBatchRequest(step=1, rollout_ids=[name], **held)
        batches.append((await trainer.ClaimBatch(request)).batch.batch_id)
    await trainer.CommitBatches(
        trainer_service_pb2.CommitBatchesRequest(batch_ids=batches[:1], checkpoint_id="c", step=1, **held)
    )
    await trainer.ReportMetrics(trainer_service_pb2.ReportMetricsRequest(steps=[{"step": 1}], **held))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound database that no server has."""
    path = tmp_path_factory.mktemp("verify") / "sound.db"

    async def make() -> None:
        async with running(path, ManualClock()) as rig:
            await live(rig)

    asyncio.run(make())
    return path


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    path = tmp_path / "copy.db"
    operations.backup(sound, path)
    return path


def damage(path: Path, *statements: str) -> None:
    """Changes a database behind the store's back."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.create_function("flip", 1, lambda data: bytes([data[0] ^ 255]) + data[1:])
        for statement in statements:
            changed = db.execute(statement).rowcount
            assert changed != 0, f"{statement} changes nothing"


def broken(path: Path, *, deep: bool = True) -> dict[str, list[str]]:
    """The rows that verify names, by invariant."""
    return {one.name: one.rows for one in files.verify(path, deep=deep).broken}


ROLLOUT = "(SELECT rollout_key FROM rollouts WHERE rollout_id = '{}')"
NEWEST = "(SELECT latest_attempt_key FROM rollouts WHERE rollout_id = '{}')"

DAMAGE: dict[str, tuple[str, ...]] = {
    "rollouts.status": ("UPDATE rollouts SET status = 99 WHERE rollout_id = 'next'",),
    "rollouts.body": (f"DELETE FROM rollout_bodies WHERE rollout_key = {ROLLOUT.format('next')}",),
    "rollouts.end_time": ("UPDATE rollouts SET end_time = NULL WHERE rollout_id = 'done'",),
    "rollouts.sealed": ("UPDATE rollouts SET sealed = 0 WHERE rollout_id = 'done'",),
    "rollouts.ready": ("UPDATE rollouts SET ready = 1 WHERE rollout_id = 'done'",),
    "rollouts.forgotten": ("UPDATE rollouts SET ready = 0 WHERE rollout_id = 'next'",),
    "rollouts.latest_attempt": ("UPDATE rollouts SET attempt_count = 7 WHERE rollout_id = 'done'",),
    "rollouts.failure": ("UPDATE rollouts SET failure_kind = 2 WHERE rollout_id = 'done'",),
    "rollouts.scope": (
        "INSERT INTO runs (run_key, run_id, create_time) VALUES (77, 'r', 0)",
        "UPDATE queues SET run_key = 77 WHERE name = 'other'",
    ),
    "attempts.status": (f"UPDATE attempts SET status = 99 WHERE attempt_key = {NEWEST.format('done')}",),
    "attempts.sequence": ("UPDATE attempts SET sequence_id = 3",),
    "attempts.run": (
        "INSERT INTO runs (run_key, run_id, create_time) VALUES (77, 'r', 0)",
        f"UPDATE attempts SET run_key = 77 WHERE attempt_key = {NEWEST.format('done')}",
    ),
    "attempts.end_time": ("UPDATE attempts SET end_time = 1 WHERE lease_token IS NOT NULL",),
    "attempts.lease": ("UPDATE attempts SET lease_token = x'00' WHERE lease_token IS NULL",),
    "attempts.lease_of_newest": ("UPDATE rollouts SET status = 7 WHERE rollout_id = 'held'",),
    "attempts.timer": ("UPDATE attempts SET due = due + 1000000 WHERE lease_token IS NOT NULL",),
    "attempts.sealed": ("UPDATE attempts SET sealed = 1, seal_time = 1 WHERE lease_token IS NOT NULL",),
    "attempts.unsealed": (
        f"UPDATE attempts SET sealed = 0, seal_time = NULL WHERE attempt_key = {NEWEST.format('done')}",
    ),
    "attempts.open_calls": ("DELETE FROM open_calls",),
    "attempts.incomplete": ("UPDATE attempts SET capture_incomplete = 1 WHERE lease_token IS NOT NULL",),
    "attempts.evicted": ("UPDATE attempts SET spans_evicted = 1 WHERE lease_token IS NOT NULL",),
    "spans.totals": ("UPDATE span_totals SET bytes = bytes + 1",),
    "spans.sequences": ("UPDATE span_sequences SET last = 2",),
    "spans.flags": ("UPDATE spans SET flags = 4 WHERE flags = 0",),
    "counters": ("UPDATE counters SET spans = 1",),
    "counters.row": ("INSERT INTO counters SELECT * FROM counters",),
    "events.refs": ("UPDATE events SET ref = 9999 WHERE entity = 2",),
    "events.ends": ("DELETE FROM events WHERE entity = 1 AND kind = 3",),
    "resources.versions": ("UPDATE resources SET version = 9 WHERE version = 2",),
    "batches.status": ("UPDATE batches SET status = 9 WHERE status = 1",),
    "batches.commit": ("DELETE FROM checkpoints",),
    "batches.epoch": ("UPDATE batches SET trainer_epoch = 5",),
    "batches.once": ("UPDATE batch_entries SET rollout_key = (SELECT min(rollout_key) FROM batch_entries)",),
    "batches.rollouts": ("UPDATE batch_entries SET rollout_key = 9999",),
    "training_runs.checkpoint": ("UPDATE training_runs SET checkpoint_id = 'lost'",),
    "blobs.size": ("DELETE FROM blob_pieces WHERE place = 0",),
    "blobs.refs": ("UPDATE blobs SET digest = NULL",),
    "rollout_bodies.content": (
        f"UPDATE rollout_bodies SET body = flip(body) WHERE rollout_key = {ROLLOUT.format('next')}",
    ),
    "resources.content": ("UPDATE resources SET body = flip(body)",),
    "spans.content": ("UPDATE spans SET span_ref = span_ref + 1 WHERE flags = 1",),
    "batches.content": ("UPDATE batches SET content_hash = 'sha256:0'",),
    "blobs.content": ("UPDATE blob_pieces SET data = flip(data)",),
}


def test_every_invariant_has_its_damage() -> None:
    named = {invariant.name for invariant in INVARIANTS} - {invariant.name for invariant in REFERENCES}
    assert DAMAGE.keys() == named
    assert len({invariant.name for invariant in INVARIANTS}) == len(INVARIANTS)


def test_a_sound_database_is_sound(sound: Path, copy: Path) -> None:
    assert broken(sound) == broken(copy) == {}
    report = files.verify(copy)
    assert report.checked == ["file.pages", "file.tables", *(invariant.name for invariant in INVARIANTS)]


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damage_is_named(name: str, copy: Path) -> None:
    damage(copy, *DAMAGE[name])
    found = broken(copy)
    assert name in found, found
    assert all(found[name])
    deep = next(invariant.deep for invariant in INVARIANTS if invariant.name == name)
    assert (name in broken(copy, deep=False)) is not deep


@pytest.mark.parametrize("name", [invariant.name for invariant in REFERENCES])
def test_a_key_that_names_nothing_is_named(name: str, copy: Path) -> None:
    table, _, column = name.partition(".")
    with contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as db:
        if not db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]:
            _make_row(db, table)
        db.execute(
            f"UPDATE {table} SET {column} = 987654321 WHERE ({_key(db, table)}) = (SELECT "
            f"{_key(db, table)} FROM {table} LIMIT 1)"
        )
    found = broken(copy, deep=False)
    assert any("987654321" in row for row in found.get(name, [])), found


def _key(db: sqlite3.Connection, table: str) -> str:
    columns = db.execute(f"PRAGMA table_info({table})").fetchall()
    keys = [column[1] for column in columns if column[5]]
    return ", ".join(keys or [columns[0][1]])


def _make_row(db: sqlite3.Connection, table: str) -> None:
    """A row of a table that the store of these tests leaves empty."""
    wanted = [c for c in db.execute(f"PRAGMA table_info({table})") if c[3] and c[4] is None]
    values = {"TEXT": "'t'", "INTEGER": "1", "BLOB": "x'00'", "REAL": "1.0"}
    names = ", ".join(column[1] for column in wanted)
    db.execute(f"INSERT INTO {table} ({names}) VALUES ({', '.join(values[c[2]] for c in wanted)})")


def test_a_table_or_an_index_that_is_missing_is_named(copy: Path) -> None:
    with contextlib.closing(sqlite3.connect(copy)) as db:
        db.execute("DROP INDEX attempts_due")
        db.execute("ALTER TABLE rewards ADD COLUMN extra INTEGER")
        db.execute("CREATE TABLE intruder (x)")
    rows = broken(copy)["file.tables"]
    assert [row.split()[1] for row in rows] == ["attempts_due", "intruder", "rewards"]


@pytest.mark.parametrize("kept", [0.5, 0.97])
def test_a_truncated_file_is_refused_with_what_verify_finds(kept: float, copy: Path) -> None:
    whole = copy.read_bytes()
    copy.write_bytes(whole[: int(len(whole) * kept)])
    (row,) = broken(copy)["file.pages"]
    assert f"should have {len(whole)}" in row
    with pytest.raises(StartError, match=f"is damaged: it has .* should have {len(whole)}.*restore"):
        asyncio.run(StoreServer.start(ServeConfig(port=0, database=copy)))


def test_a_file_with_a_damaged_page_is_refused_with_what_verify_finds(copy: Path) -> None:
    data = bytearray(copy.read_bytes())
    with contextlib.closing(sqlite3.connect(copy)) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'attempts'").fetchone()
    start = (root - 1) * 8192
    data[start : start + 200] = bytes(200)
    copy.write_bytes(data)
    assert broken(copy)["file.pages"]
    with pytest.raises(StartError, match="damaged"):
        asyncio.run(StoreServer.start(ServeConfig(port=0, database=copy)))


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("notes " * 1000)
    assert "file is not a database" in broken(path)["file.pages"][0]
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as db:
        db.execute("CREATE TABLE t (x)")
    for wrong, words in (("other.db", "not a store's database"), ("missing.db", "does not exist")):
        with pytest.raises(DatabaseError, match=words):
            files.verify(tmp_path / wrong)


def test_a_folder_is_no_database_and_no_copy(copy: Path, tmp_path: Path) -> None:
    for act in (
        lambda: files.verify(tmp_path),
        lambda: files.verify(Path("/")),
        lambda: operations.compact(tmp_path),
        lambda: operations.backup(copy, tmp_path, force=True),
        lambda: files.restore(copy, tmp_path, force=True),
    ):
        with pytest.raises(DatabaseError, match="is a folder; name a file in it"):
            act()
    for folder in (tmp_path, Path("/")):
        with pytest.raises(StartError, match="is a folder"):
            asyncio.run(StoreServer.start(ServeConfig(port=0, database=folder)))


def test_a_url_of_another_database_is_refused_without_its_password(tmp_path: Path) -> None:
    url = "mysql://user:secret@db/agl"
    words = "a mysql:// database is not supported; name a file or postgresql://user@host/name"
    with pytest.raises(StartError) as refused:
        asyncio.run(StoreServer.start(ServeConfig(port=0, database=url)))
    assert str(refused.value) == words
    with pytest.raises(DatabaseError) as unread:
        files.verify_postgres(url)
    assert str(unread.value) == words


def test_a_newer_database_is_refused_with_both_versions(copy: Path, tmp_path: Path) -> None:
    damage(copy, "UPDATE schema_families SET version = 41 WHERE name = 'spans'")
    words = "newer server .its tables 'spans' have version 41, this server knows 1"
    with pytest.raises(StartError, match=words):
        asyncio.run(StoreServer.start(ServeConfig(port=0, database=copy)))
    for act in (
        lambda: files.verify(copy),
        lambda: operations.backup(copy, tmp_path / "b.db"),
        lambda: files.restore(copy, tmp_path / "c.db"),
        lambda: operations.versions_of(copy),
        lambda: operations.bring_up_to_date(copy),
    ):
        with pytest.raises(DatabaseError, match=words):
            act()
    assert not (tmp_path / "b.db").exists()


def test_an_older_database_says_what_it_lacks_and_is_migrated(copy: Path) -> None:
    damage(copy, "UPDATE schema_families SET version = 1 WHERE name = 'lifecycle'")
    with contextlib.closing(sqlite3.connect(copy)) as db:
        db.execute("ALTER TABLE attempts DROP COLUMN spans_evicted")
    assert "run migrate" in broken(copy)["file.tables"][0]
    before, after = operations.bring_up_to_date(copy)
    assert (before["lifecycle"], after["lifecycle"]) == (1, 2)
    assert broken(copy) == {}


def test_a_database_from_before_the_grace_is_migrated_and_was_never_away(copy: Path) -> None:
    damage(copy, "UPDATE schema_families SET version = 1 WHERE name = 'counters'")
    with contextlib.closing(sqlite3.connect(copy)) as db:
        db.execute("ALTER TABLE counters DROP COLUMN returned")
    assert "run migrate" in broken(copy)["file.tables"][0]
    before, after = operations.bring_up_to_date(copy)
    assert (before["counters"], after["counters"]) == (1, 2)
    assert broken(copy) == {}
    with contextlib.closing(sqlite3.connect(copy)) as db:
        assert db.execute("SELECT returned FROM counters").fetchall() == [(0,)]


async def test_a_backup_of_a_running_server_is_one_moment(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    async with running(path) as rig:
        await live(rig)
        stop = asyncio.Event()

        async def write() -> int:
            count = 0
            while not stop.is_set():
                await rig.enqueue(rollout_id=f"w{count}")
                count += 1
            return count

        writing = asyncio.create_task(write())
        sizes = []
        for number in range(3):
            copy = tmp_path / f"copy-{number}.db"
            await asyncio.to_thread(operations.backup, path, copy)
            assert await asyncio.to_thread(broken, copy) == {}
            sizes.append(_count(copy))
        stop.set()
        assert sizes[0] < sizes[-1] <= 7 + await writing
        with pytest.raises(DatabaseError, match="is in use by another store server"):
            operations.compact(path)
        with pytest.raises(DatabaseError, match="is in use by another store server"):
            files.restore(tmp_path / "copy-0.db", path, force=True)
        assert broken(path) == {}


def _count(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return int(db.execute("SELECT count(*) FROM rollouts").fetchone()[0])


async def test_what_is_restored_goes_on(sound: Path, tmp_path: Path) -> None:
    copy, path = tmp_path / "copy.db", tmp_path / "new" / "store.db"
    operations.backup(sound, copy)
    with pytest.raises(DatabaseError, match="there already"):
        operations.backup(sound, copy)
    assert files.restore(copy, path).sound
    async with running(path, ManualClock(1_700_000_100 * SECOND)) as rig:
        assert await rig.status("held") == "running"
        await rig.enqueue(rollout_id="after")
    with pytest.raises(DatabaseError, match="there already; say --force"):
        files.restore(copy, path)
    assert files.restore(copy, path, force=True).sound
    assert (_count(path), _count(path.with_name("store.db.replaced"))) == (7, 8)
    damage(copy, "UPDATE span_totals SET spans = 0")
    assert not files.restore(copy, path, force=True).sound
    assert _count(path) == 7
    assert sorted(one.name for one in path.parent.iterdir() if one.suffix not in (".lock",)) == [
        "store.db",
        "store.db.replaced",
    ]


def test_compaction_gives_space_back(copy: Path) -> None:
    big = shutil.copy(copy, copy.with_name("big.db"))
    damage(
        big,
        "INSERT INTO blobs (blob_key, digest, size, put_time) VALUES (9, 'x', 0, 0)",
        "INSERT INTO blob_pieces (blob_key, place, data) VALUES (9, 0, zeroblob(4000000))",
        "DELETE FROM blob_pieces WHERE length(data) = 4000000",
        "DELETE FROM blobs WHERE digest = 'x'",
    )
    sizes = operations.compact(Path(big))
    assert sizes.after < sizes.before - 3_900_000
    assert broken(Path(big)) == {}


def test_the_documentation_lists_every_invariant() -> None:
    text = (Path(__file__).parents[2] / "docs" / "verify.md").read_text()
    for invariant in INVARIANTS:
        assert f"`{invariant.name}`" in text
        assert invariant in REFERENCES or f"| {invariant.says} |" in text
