"""Training runs: taken up under rising epochs, older trainers fenced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from agl_grpc.store.errors import exists, illegal_transition, invalid_field, not_found, trainer_fenced
from agl_grpc.store.ids import mint
from agl_grpc.store.rollouts.attempts import limited
from agl_grpc.store.rollouts.encode import key_values, key_values_blob, set_time, time_of
from agl_grpc.store.storage.catalog import RunRow, require_id
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import attempt_pb2, common_pb2, event_pb2, training_pb2

TRAINING_RUN = event_pb2.ENTITY_KIND_TRAINING_RUN
PENDING = int(training_pb2.TRAINING_RUN_STATUS_PENDING)
RUNNING = int(training_pb2.TRAINING_RUN_STATUS_RUNNING)
STOPPING = int(training_pb2.TRAINING_RUN_STATUS_STOPPING)
SUCCEEDED = int(training_pb2.TRAINING_RUN_STATUS_SUCCEEDED)
FAILED = int(training_pb2.TRAINING_RUN_STATUS_FAILED)
STOPPED = int(training_pb2.TRAINING_RUN_STATUS_STOPPED)
TERMINAL = frozenset({SUCCEEDED, FAILED, STOPPED})

_SELECT = (
    "SELECT t.training_key, t.training_run_id, t.run_key, t.status, t.trainer_epoch, t.step, "
    "t.checkpoint_id FROM training_runs t "
)


class TrainingRow(NamedTuple):
    """The part of a training run that changes or that rules depend on."""

    key: int
    training_run_id: str
    run_key: int
    status: int
    trainer_epoch: int
    step: int
    checkpoint_id: str


def status_name(status: int) -> str:
    """For example `running`."""
    value = training_pb2.TrainingRunStatus.ValueType(status)
    return training_pb2.TrainingRunStatus.Name(value).removeprefix("TRAINING_RUN_STATUS_").lower()


def training_by_id(db: Connection, training_run_id: str) -> TrainingRow:
    """A training run.

    Raises:
        StoreError: NOT_FOUND.
    """
    row = db.execute(f"{_SELECT}WHERE t.training_run_id = ?", (training_run_id,)).fetchone()
    if row is None:
        raise not_found("training run", training_run_id)
    return TrainingRow._make(row)


def held_training(tx: Tx, training_run_id: str, epoch: int) -> TrainingRow:
    """A training run that the caller's epoch still holds.

    Raises:
        StoreError: NOT_FOUND, TRAINER_FENCED, or ILLEGAL_TRANSITION when it has ended.
    """
    row = training_by_id(tx.connection, training_run_id)
    if row.trainer_epoch != epoch:
        raise trainer_fenced(epoch, row.trainer_epoch)
    if row.status in TERMINAL:
        raise illegal_transition("training run", row.training_run_id, status_name(row.status), "running")
    return row


def load_training(db: Connection, key: int) -> training_pb2.TrainingRun:
    """A training run that exists, as a message."""
    row = db.execute(
        "SELECT t.training_run_id, r.run_id, t.algorithm, t.status, t.trainer_epoch, t.step, "
        "t.checkpoint_id, t.trainer_id, t.create_time, t.end_time, t.config, t.failure, t.metadata "
        "FROM training_runs t JOIN runs r ON r.run_key = t.run_key WHERE t.training_key = ?",
        (key,),
    ).fetchone()
    found = training_pb2.TrainingRun(
        training_run_id=row[0],
        run_id=row[1],
        algorithm=row[2],
        status=row[3],
        trainer_epoch=row[4],
        step=row[5],
        checkpoint_id=row[6],
        trainer_id=row[7],
    )
    set_time(found.create_time, row[8])
    set_time(found.end_time, row[9])
    if row[10] is not None:
        found.config.MergeFromString(row[10])
    if row[11] is not None:
        found.failure.MergeFromString(row[11])
    if row[12]:
        found.metadata.extend(key_values(row[12]))
    result = db.execute("SELECT data FROM training_results WHERE training_key = ?", (key,)).fetchone()
    if result is not None:
        found.result.MergeFromString(result[0])
    return found


def create(tx: Tx, run: RunRow, wanted: training_pb2.TrainingRun) -> int:
    """Make a training run that waits for a trainer; returns its key.

    Raises:
        StoreError: INVALID_FIELD or ENTITY_EXISTS.
    """
    if not wanted.algorithm:
        raise invalid_field("training_run.algorithm", "must name one, for example `verl`")
    name = wanted.training_run_id
    name = require_id(name, "training_run.training_run_id") if name else mint("tr")
    if tx.execute("SELECT 1 FROM training_runs WHERE training_run_id = ?", (name,)).fetchone():
        raise exists("training run", name)
    config = wanted.config.SerializeToString() if wanted.HasField("config") else None
    key = tx.insert(
        "INSERT INTO training_runs (training_run_id, run_key, algorithm, config, status, create_time, "
        "metadata) VALUES (?, ?, ?, ?, ?, ?, ?) RETURNING training_key",
        (name, run.run_key, wanted.algorithm, config, PENDING, tx.now, key_values_blob(wanted.metadata)),
    )
    tx.event(run.run_key, TRAINING_RUN, event_pb2.EVENT_KIND_CREATED, key)
    return key


def acquire(tx: Tx, row: TrainingRow, trainer_id: str, *, only_pending: bool = False) -> None:
    """Take a training run up under the next epoch; what a failed or stopped one had, goes on.

    Raises:
        StoreError: INVALID_FIELD, or ILLEGAL_TRANSITION when it has succeeded, or has to be pending and
            is not.
    """
    if not trainer_id:
        raise invalid_field("trainer_id", "must not be empty")
    if row.status == SUCCEEDED or (only_pending and row.status != PENDING):
        raise illegal_transition("training run", row.training_run_id, status_name(row.status), "running")
    status = STOPPING if row.status == STOPPING else RUNNING
    found = tx.execute(
        "SELECT step FROM checkpoints WHERE training_key = ? AND checkpoint_id = ?",
        (row.key, row.checkpoint_id),
    ).fetchone()
    tx.execute(
        "UPDATE training_runs SET status = ?, trainer_epoch = trainer_epoch + 1, trainer_id = ?, step = ?, "
        "end_time = NULL, failure = NULL WHERE training_key = ?",
        (status, trainer_id, found[0] if found else 0, row.key),
    )
    tx.execute("DELETE FROM training_results WHERE training_key = ?", (row.key,))
    tx.event(row.run_key, TRAINING_RUN, event_pb2.EVENT_KIND_UPDATED, row.key)


def finish(
    tx: Tx,
    row: TrainingRow,
    status: int,
    failure: attempt_pb2.Failure | None,
    result: common_pb2.Payload | None = None,
) -> None:
    """End a training run.

    Raises:
        StoreError: INVALID_FIELD for a status that is not terminal.
    """
    if status not in TERMINAL:
        raise invalid_field("status", "must be SUCCEEDED, FAILED or STOPPED")
    if result is not None:
        tx.execute(
            "INSERT INTO training_results (training_key, data) VALUES (?, ?)",
            (row.key, result.SerializeToString()),
        )
    tx.execute(
        "UPDATE training_runs SET status = ?, end_time = ?, failure = ? WHERE training_key = ?",
        (status, tx.now, limited(failure).SerializeToString() if failure is not None else None, row.key),
    )
    tx.event(row.run_key, TRAINING_RUN, event_pb2.EVENT_KIND_TERMINAL, row.key)


def stop(tx: Tx, row: TrainingRow) -> None:
    """Ask a training run to stop after its step; one that nobody has is stopped at once."""
    if row.status == PENDING:
        finish(tx, row, STOPPED, None)
    elif row.status == RUNNING:
        tx.execute("UPDATE training_runs SET status = ? WHERE training_key = ?", (STOPPING, row.key))
        tx.event(row.run_key, TRAINING_RUN, event_pb2.EVENT_KIND_UPDATED, row.key)


def report(tx: Tx, row: TrainingRow, steps: Sequence[training_pb2.StepMetrics]) -> None:
    """Store metrics; those of a step reported before are merged by name, the new ones win.

    Raises:
        StoreError: INVALID_FIELD.
    """
    for index, step in enumerate(steps):
        _check_step(step, f"steps[{index}]")
        known = tx.execute(
            "SELECT data FROM training_metrics WHERE training_key = ? AND step = ?", (row.key, step.step)
        ).fetchone()
        merged = _merge(row.trainer_epoch, step, known[0] if known else None)
        if not time_of(merged.time):
            set_time(merged.time, tx.now)
        # The old row goes: a new key tells watchers that the step has changed.
        tx.execute("DELETE FROM training_metrics WHERE training_key = ? AND step = ?", (row.key, step.step))
        tx.execute(
            "INSERT INTO training_metrics (training_key, step, data) VALUES (?, ?, ?)",
            (row.key, step.step, merged.SerializeToString()),
        )
    last = max((step.step for step in steps), default=row.step)
    tx.execute(
        "UPDATE training_runs SET step = CASE WHEN step < ? THEN ? ELSE step END WHERE training_key = ?",
        (last, last, row.key),
    )
    tx.event(row.run_key, TRAINING_RUN, event_pb2.EVENT_KIND_UPDATED, row.key)


def _check_step(step: training_pb2.StepMetrics, path: str) -> None:
    for place, metric in enumerate(step.metrics):
        if not metric.name:
            raise invalid_field(f"{path}.metrics[{place}].name", "must not be empty")


def _merge(epoch: int, step: training_pb2.StepMetrics, known: bytes | None) -> training_pb2.StepMetrics:
    merged = training_pb2.StepMetrics(step=step.step, trainer_epoch=epoch, time=step.time)
    values: dict[str, float] = {}
    if known is not None:
        before = training_pb2.StepMetrics.FromString(known)
        if before.trainer_epoch == epoch:
            values = {metric.name: metric.value for metric in before.metrics}
    values.update((metric.name, metric.value) for metric in step.metrics)
    for name, value in values.items():
        merged.metrics.add(name=name, value=value)
    return merged


def load_metrics(
    db: Connection, training_key: int, after_key: int, from_step: int, limit: int
) -> tuple[list[training_pb2.StepMetrics], int]:
    """Metrics written after a key, oldest first, and the key of the last one."""
    rows = db.execute(
        "SELECT metric_key, data FROM training_metrics WHERE training_key = ? AND metric_key > ? "
        "AND step >= ? ORDER BY metric_key LIMIT ?",
        (training_key, after_key, from_step, limit),
    ).fetchall()
    steps = [training_pb2.StepMetrics.FromString(data) for _, data in rows]
    return steps, rows[-1][0] if rows else after_key


def add_log(tx: Tx, row: TrainingRow, lines: Sequence[training_pb2.LogLine]) -> None:
    """Store lines for people."""
    for line in lines:
        stored = training_pb2.LogLine(text=line.text, trainer_epoch=row.trainer_epoch)
        set_time(stored.time, tx.now)
        tx.execute(
            "INSERT INTO training_log (training_key, data) VALUES (?, ?)",
            (row.key, stored.SerializeToString()),
        )


def load_log(db: Connection, training_key: int, after: int, limit: int) -> list[training_pb2.LogLine]:
    """Lines with a number above ``after``, oldest first."""
    rows = db.execute(
        "SELECT line_key, data FROM training_log WHERE training_key = ? AND line_key > ? "
        "ORDER BY line_key LIMIT ?",
        (training_key, after, limit),
    ).fetchall()
    lines = []
    for number, data in rows:
        line = training_pb2.LogLine.FromString(data)
        line.number = number
        lines.append(line)
    return lines
