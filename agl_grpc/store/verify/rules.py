"""What holds between rows: states, leases, seals, counters, bindings, batches. One query each."""

from __future__ import annotations

from agl_grpc.store.rollouts import lifecycle as life
from agl_grpc.store.spans.check import DELTA, LATE, MODEL_CALL
from agl_grpc.store.training.batches import CLAIMED, COMMITTED, RELEASED
from agl_grpc.store.verify.types import Invariant, by_sql
from agl_grpc.v1 import event_pb2


def _in(states: object) -> str:
    return f"({', '.join(str(state) for state in sorted(states))})"  # type: ignore[call-overload] # any set of numbers


_TERMINAL, _WAITING = _in(life.ROLLOUT_TERMINAL), _in(life.ROLLOUT_WAITING)
_WORKED_ON = _in({life.PREPARING, life.RUNNING})
_LIVE = _in(life.ATTEMPT_LIVE)
_ENDED = int(event_pb2.EVENT_KIND_TERMINAL)
_ROLLOUT = int(event_pb2.ENTITY_KIND_ROLLOUT)
_SPANS = int(event_pb2.ENTITY_KIND_SPANS)

_ROLLOUTS = (
    by_sql(
        "rollouts.status",
        "a rollout is in one of its states",
        "rollout {0} has status {1}",
        f"SELECT rollout_id, status FROM rollouts WHERE status NOT IN {_in(life.ROLLOUT_STATES)}",
    ),
    by_sql(
        "rollouts.body",
        "every rollout has its task beside it",
        "rollout {0} has no row in rollout_bodies",
        "SELECT r.rollout_id FROM rollouts r LEFT JOIN rollout_bodies b ON b.rollout_key = r.rollout_key "
        "WHERE b.rollout_key IS NULL",
    ),
    by_sql(
        "rollouts.end_time",
        "a rollout has an end exactly when it is finished",
        "rollout {0} has status {1} and end_time {2}",
        "SELECT rollout_id, status, end_time FROM rollouts "
        f"WHERE (status IN {_TERMINAL}) <> (end_time IS NOT NULL)",
    ),
    by_sql(
        "rollouts.sealed",
        "a rollout is sealed exactly when it is finished and its newest attempt, if any, sealed and judged",
        "rollout {0} has status {1}, sealed {2}, and its newest attempt has sealed {3}",
        "SELECT r.rollout_id, r.status, r.sealed, a.sealed FROM rollouts r "
        "LEFT JOIN attempts a ON a.attempt_key = r.latest_attempt_key WHERE (r.sealed <> 0) <> "
        f"(r.status IN {_TERMINAL} AND (a.attempt_key IS NULL OR a.sealed <> 0) AND NOT EXISTS "
        "(SELECT 1 FROM gradings g WHERE g.attempt_key = a.attempt_key))",
    ),
    by_sql(
        "rollouts.ready",
        "a rollout that can be delivered waits, and one that is finished or worked on has no timer",
        "rollout {0} has status {1}, ready {2}, due {3}",
        f"SELECT rollout_id, status, ready, due FROM rollouts WHERE (ready = 1 AND status NOT IN {_WAITING}) "
        f"OR (due IS NOT NULL AND status NOT IN {_WAITING})",
    ),
    by_sql(
        "rollouts.forgotten",
        "a rollout that waits can be delivered now or has a timer that looks at it",
        "rollout {0} has status {1} and neither ready nor due",
        f"SELECT rollout_id, status FROM rollouts WHERE status IN {_WAITING} AND ready = 0 AND due IS NULL",
    ),
    by_sql(
        "rollouts.latest_attempt",
        "a rollout's newest attempt is the one with the largest sequence_id, and it counts its attempts",
        "rollout {0} says attempt {1} of {2}, its attempts say {3} of {4}",
        "SELECT r.rollout_id, r.latest_attempt_key, r.attempt_count, (SELECT a.attempt_key FROM attempts a "
        "WHERE a.rollout_key = r.rollout_key ORDER BY a.sequence_id DESC LIMIT 1) AS newest, "
        "(SELECT count(*) FROM attempts a WHERE a.rollout_key = r.rollout_key) AS made FROM rollouts r "
        "WHERE coalesce(r.latest_attempt_key, 0) <> coalesce((SELECT a.attempt_key FROM attempts a "
        "WHERE a.rollout_key = r.rollout_key ORDER BY a.sequence_id DESC LIMIT 1), 0) "
        "OR r.attempt_count <> (SELECT count(*) FROM attempts a WHERE a.rollout_key = r.rollout_key)",
    ),
    by_sql(
        "rollouts.failure",
        "only a failed rollout has a failure",
        "rollout {0} has status {1} and failure kind {2}",
        "SELECT rollout_id, status, failure_kind FROM rollouts "
        f"WHERE failure_kind <> 0 AND status <> {life.FAILED}",
    ),
    by_sql(
        "rollouts.scope",
        "a rollout's queue, group and resources belong to its run",
        "rollout {0} belongs to another run than its {1}",
        "SELECT r.rollout_id, 'queue' FROM rollouts r JOIN queues q ON q.queue_key = r.queue_key "
        "WHERE q.run_key <> r.run_key UNION ALL "
        "SELECT r.rollout_id, 'group' FROM rollouts r JOIN groups g ON g.group_key = r.group_key "
        "WHERE g.run_key <> r.run_key UNION ALL "
        "SELECT r.rollout_id, 'resources' FROM rollouts r "
        "JOIN resources s ON s.resource_key = r.resource_key WHERE s.run_key <> r.run_key",
    ),
)

_ATTEMPTS = (
    by_sql(
        "attempts.status",
        "an attempt is in one of its states",
        "attempt {0} has status {1}",
        f"SELECT attempt_id, status FROM attempts WHERE status NOT IN {_in(life.ATTEMPT_STATES)}",
    ),
    by_sql(
        "attempts.sequence",
        "a rollout's attempts are numbered from 1 without gaps",
        "the attempts of rollout {0} are {1}, numbered {2} to {3}",
        "SELECT r.rollout_id, count(*), min(a.sequence_id), max(a.sequence_id) FROM attempts a "
        "JOIN rollouts r ON r.rollout_key = a.rollout_key GROUP BY r.rollout_id "
        "HAVING min(a.sequence_id) <> 1 OR max(a.sequence_id) <> count(*)",
    ),
    by_sql(
        "attempts.run",
        "an attempt and its resources belong to its rollout's run",
        "attempt {0} belongs to another run than its {1}",
        "SELECT a.attempt_id, 'rollout' FROM attempts a JOIN rollouts r ON r.rollout_key = a.rollout_key "
        "WHERE a.run_key <> r.run_key UNION ALL "
        "SELECT a.attempt_id, 'resources' FROM attempts a JOIN resources s "
        "ON s.resource_key = a.resource_key WHERE s.run_key <> a.run_key",
    ),
    by_sql(
        "attempts.end_time",
        "an attempt has an end exactly when it is not at work",
        "attempt {0} has status {1} and end_time {2}",
        "SELECT attempt_id, status, end_time FROM attempts "
        f"WHERE (status IN {_LIVE}) = (end_time IS NOT NULL)",
    ),
    by_sql(
        "attempts.lease",
        "exactly the leased attempts that are at work have a lease, with worker, duration and expiry",
        "attempt {0} has status {1}, leased {2}, a token: {3}, worker {4}, expiry {5}",
        "SELECT attempt_id, status, leased, lease_token IS NOT NULL, worker_key, lease_expire_time "
        f"FROM attempts WHERE (lease_token IS NOT NULL) <> (leased = 1 AND status IN {_LIVE}) "
        "OR (lease_token IS NOT NULL AND (worker_key IS NULL OR lease_expire_time IS NULL "
        "OR lease_duration IS NULL OR session_id IS NULL)) "
        "OR (lease_token IS NULL AND lease_expire_time IS NOT NULL)",
    ),
    by_sql(
        "attempts.lease_of_newest",
        "a rollout whose newest attempt holds a lease is being worked on",
        "rollout {0} has status {1} while its newest attempt {2} holds a lease",
        "SELECT r.rollout_id, r.status, a.attempt_id FROM attempts a "
        "JOIN rollouts r ON r.latest_attempt_key = a.attempt_key "
        f"WHERE a.lease_token IS NOT NULL AND r.status NOT IN {_WORKED_ON}",
    ),
    by_sql(
        "attempts.timer",
        "a timer looks at an attempt no later than the moment at which something may happen to it",
        "attempt {0} has due {1}; its lease, its timeout or its seal is due at {2}",
        "SELECT attempt_id, due, moment FROM (SELECT attempt_id, due, CASE "
        f"WHEN status IN {_LIVE} AND lease_expire_time IS NOT NULL AND (timeout IS NULL OR "
        "lease_expire_time <= start_time + timeout) THEN lease_expire_time "
        f"WHEN status IN {_LIVE} AND timeout IS NOT NULL THEN start_time + timeout "
        "WHEN sealed = 0 THEN seal_due END AS moment FROM attempts) AS t "
        "WHERE moment IS NOT NULL AND (due IS NULL OR due > moment)",
    ),
    by_sql(
        "attempts.sealed",
        "a sealed attempt is over, has the time of its seal and no timer",
        "attempt {0} has status {1}, sealed {2}, seal_time {3}, due {4}",
        "SELECT attempt_id, status, sealed, seal_time, due FROM attempts WHERE "
        f"(sealed = 1 AND (status IN {_LIVE} OR due IS NOT NULL)) OR (sealed = 1) <> (seal_time IS NOT NULL)",
    ),
    by_sql(
        "attempts.unsealed",
        "an attempt that is over is sealed or has a time for it, unless a span may still bring it back",
        "attempt {0} has status {1}, is not sealed and has no seal_due",
        "SELECT a.attempt_id, a.status FROM attempts a JOIN rollouts r ON r.rollout_key = a.rollout_key "
        f"WHERE a.sealed = 0 AND a.seal_due IS NULL AND a.status NOT IN {_LIVE} AND NOT "
        f"(a.status = {life.A_UNRESPONSIVE} AND a.leased = 0 AND r.latest_attempt_key = a.attempt_key "
        f"AND r.status NOT IN {_TERMINAL})",
    ),
    by_sql(
        "attempts.open_calls",
        "an attempt counts its open model calls",
        "attempt {0} says {1} open calls, there are {2}",
        "SELECT a.attempt_id, a.open_calls, count(c.attempt_key) FROM attempts a "
        "LEFT JOIN open_calls c ON c.attempt_key = a.attempt_key GROUP BY a.attempt_id, a.open_calls "
        "HAVING a.open_calls <> count(c.attempt_key)",
    ),
    by_sql(
        "attempts.incomplete",
        "only a sealed attempt can be marked as incomplete",
        "attempt {0} has capture_incomplete and is not sealed",
        "SELECT attempt_id FROM attempts WHERE capture_incomplete = 1 AND sealed = 0",
    ),
    by_sql(
        "attempts.evicted",
        "only sealed attempts give their spans up",
        "attempt {0} has spans_evicted and is not sealed",
        "SELECT attempt_id FROM attempts WHERE spans_evicted = 1 AND sealed = 0",
    ),
)

_SPAN_RULES = (
    by_sql(
        "spans.totals",
        "each run counts its spans, their bytes and the late ones",
        "run {0} says {1} spans, {2} bytes, {3} late; there are {4}, {5}, {6}",
        "SELECT u.run_id, coalesce(t.spans, 0), coalesce(t.bytes, 0), coalesce(t.late, 0), "
        "coalesce(s.spans, 0), coalesce(s.bytes, 0), coalesce(s.late, 0) FROM runs u "
        "LEFT JOIN span_totals t ON t.run_key = u.run_key LEFT JOIN (SELECT a.run_key AS run_key, "
        "count(*) AS spans, CAST(sum(length(s.data)) AS BIGINT) AS bytes, "
        f"count(CASE WHEN s.flags & {LATE} <> 0 THEN 1 END) AS late FROM spans s "
        "JOIN attempts a ON a.attempt_key = s.attempt_key GROUP BY a.run_key) AS s "
        "ON s.run_key = u.run_key WHERE coalesce(t.spans, 0) <> coalesce(s.spans, 0) "
        "OR coalesce(t.bytes, 0) <> coalesce(s.bytes, 0) OR coalesce(t.late, 0) <> coalesce(s.late, 0)",
    ),
    by_sql(
        "spans.sequences",
        "a rollout's counter of sequence ids is at least as large as the largest that it gave out",
        "rollout {0} counts to {1}, its spans to {2}",
        "SELECT r.rollout_id, coalesce(q.last, 0), max(s.sequence_id) FROM spans s "
        "JOIN attempts a ON a.attempt_key = s.attempt_key JOIN rollouts r ON r.rollout_key = a.rollout_key "
        "LEFT JOIN span_sequences q ON q.rollout_key = r.rollout_key GROUP BY r.rollout_id, q.last "
        "HAVING coalesce(q.last, 0) < max(s.sequence_id)",
    ),
    by_sql(
        "spans.flags",
        "only model calls have prompts that build on others, and every span has a sequence id",
        "span key {0} has flags {1} and sequence id {2}",
        f"SELECT span_key, flags, sequence_id FROM spans WHERE (flags & {DELTA} <> 0 AND "
        f"flags & {MODEL_CALL} = 0) OR sequence_id < 1",
    ),
)

_LOG_RULES = (
    by_sql(
        "counters",
        "keys that were given out are not above their counters",
        "the counter of {0} is at {1}, a row has {2}",
        " UNION ALL ".join(
            f"SELECT '{name}', c.{name}, t.top FROM counters c, (SELECT max({key}) AS top FROM {name}) AS t "
            f"WHERE t.top > c.{name}"
            for name, key in (
                ("rollouts", "rollout_key"),
                ("attempts", "attempt_key"),
                ("spans", "span_key"),
                ("events", "position"),
            )
        ),
    ),
    by_sql(
        "counters.row",
        "there is one row of counters",
        "there are {0} rows of counters",
        "SELECT t.found FROM (SELECT count(*) AS found FROM counters) AS t WHERE t.found <> 1",
    ),
    by_sql(
        "events.refs",
        "an event is about something that was made: its key is not above the counter",
        "event {0} is about {1} of entity kind {2}, which was never made",
        "SELECT e.position, e.ref, e.entity FROM events e, counters c WHERE "
        f"(e.entity = {_ROLLOUT} AND e.ref > c.rollouts) "
        f"OR (e.entity = {int(event_pb2.ENTITY_KIND_ATTEMPT)} AND e.ref > c.attempts) "
        f"OR (e.entity = {_SPANS} AND (e.ref > c.attempts OR e.low > e.high OR e.high > c.spans))",
    ),
    by_sql(
        "events.ends",
        "the log, as far back as it goes, has the end of every rollout",
        "rollout {0} ended at {1}, the log does not say so",
        f"SELECT r.rollout_id, r.end_time FROM rollouts r WHERE r.status IN {_TERMINAL} AND "
        "r.end_time > (SELECT min(time) FROM events) AND NOT EXISTS (SELECT 1 FROM events e "
        f"WHERE e.entity = {_ROLLOUT} AND e.ref = r.rollout_key AND e.kind = {_ENDED})",
    ),
)

_RESOURCE_RULES = (
    by_sql(
        "resources.versions",
        "the versions of a set of resources are numbered from 1 without gaps, all in one run",
        "resources {0} have {1} versions, numbered {2} to {3}, in {4} runs",
        "SELECT resources_id, count(*), min(version), max(version), count(DISTINCT run_key) FROM resources "
        "GROUP BY resources_id HAVING min(version) <> 1 OR max(version) <> count(*) "
        "OR count(DISTINCT run_key) <> 1",
    ),
)

_BATCH_RULES = (
    by_sql(
        "batches.status",
        "a batch is claimed, committed or released",
        "batch {0} has status {1}",
        f"SELECT batch_id, status FROM batches WHERE status NOT IN ({CLAIMED}, {COMMITTED}, {RELEASED})",
    ),
    by_sql(
        "batches.commit",
        "exactly the committed batches have a time of commit and a checkpoint that exists",
        "batch {0} has status {1}, commit_time {2}, checkpoint {3}",
        "SELECT b.batch_id, b.status, b.commit_time, b.checkpoint_id FROM batches b "
        "LEFT JOIN checkpoints c ON c.training_key = b.training_key AND c.checkpoint_id = b.checkpoint_id "
        f"WHERE (b.status = {COMMITTED}) <> (b.commit_time IS NOT NULL) "
        f"OR (b.status = {COMMITTED} AND c.checkpoint_id IS NULL)",
    ),
    by_sql(
        "batches.epoch",
        "no batch belongs to a trainer that is still to come",
        "batch {0} is claimed by trainer epoch {1}, the current one is {2}",
        "SELECT b.batch_id, b.trainer_epoch, t.trainer_epoch FROM batches b "
        "JOIN training_runs t ON t.training_key = b.training_key "
        "WHERE b.trainer_epoch > t.trainer_epoch",
    ),
    by_sql(
        "batches.once",
        "a rollout is in one batch of a training run, released ones aside",
        "rollout key {0} is in {1} batches of training run {2}",
        "SELECT e.rollout_key, count(*), t.training_run_id FROM batch_entries e "
        "JOIN batches b ON b.batch_key = e.batch_key JOIN training_runs t ON t.training_key = b.training_key "
        f"WHERE b.status <> {RELEASED} GROUP BY e.rollout_key, t.training_run_id HAVING count(*) > 1",
    ),
    by_sql(
        "batches.rollouts",
        "what a batch names is there, unless it was given back or its replay retention is over",
        "batch {0} names rollout key {1}, which is gone",
        "SELECT b.batch_id, e.rollout_key FROM batch_entries e JOIN batches b ON b.batch_key = e.batch_key "
        "JOIN training_runs t ON t.training_key = b.training_key JOIN runs u ON u.run_key = t.run_key "
        "LEFT JOIN rollouts r ON r.rollout_key = e.rollout_key WHERE r.rollout_key IS NULL AND "
        f"(b.status = {CLAIMED} OR (b.status = {COMMITTED} AND u.replay_retention IS NULL))",
    ),
    by_sql(
        "training_runs.checkpoint",
        "a training run goes on from a checkpoint that exists",
        "training run {0} names checkpoint {1}, which does not exist",
        "SELECT t.training_run_id, t.checkpoint_id FROM training_runs t LEFT JOIN checkpoints c "
        "ON c.training_key = t.training_key AND c.checkpoint_id = t.checkpoint_id "
        "WHERE t.checkpoint_id <> '' AND c.checkpoint_id IS NULL",
    ),
)

_BLOB_RULES = (
    by_sql(
        "blobs.size",
        "a blob's pieces follow each other and have as many bytes as it says",
        "blob {0} says {1} bytes; its {2} pieces, numbered to {3}, have {4}",
        "SELECT b.digest, b.size, count(p.place), coalesce(max(p.place), -1), "
        "CAST(coalesce(sum(length(p.data)), 0) AS BIGINT) FROM blobs b "
        "LEFT JOIN blob_pieces p ON p.blob_key = b.blob_key WHERE b.digest IS NOT NULL "
        "GROUP BY b.digest, b.size HAVING b.size <> coalesce(sum(length(p.data)), 0) "
        "OR coalesce(max(p.place), -1) <> count(p.place) - 1",
    ),
    by_sql(
        "blobs.refs",
        "what a rollout refers to is complete",
        "rollout key {0} refers to blob key {1}, which is not complete",
        "SELECT f.rollout_key, f.blob_key FROM blob_refs f JOIN blobs b ON b.blob_key = f.blob_key "
        "WHERE b.digest IS NULL",
    ),
)

RULES: tuple[Invariant, ...] = (
    *_ROLLOUTS,
    *_ATTEMPTS,
    *_SPAN_RULES,
    *_LOG_RULES,
    *_RESOURCE_RULES,
    *_BATCH_RULES,
    *_BLOB_RULES,
)
