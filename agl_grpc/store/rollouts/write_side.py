"""Everything that changes rollouts, attempts and leases, put together. Used in the writer's thread."""

from __future__ import annotations

from agl_grpc.store import rewards
from agl_grpc.store.door.credentials import CredentialSigner
from agl_grpc.store.events.timers import FIRE_LIMIT
from agl_grpc.store.rollouts import commands, grading
from agl_grpc.store.rollouts.attempts import note_return
from agl_grpc.store.rollouts.commands import Commands
from agl_grpc.store.rollouts.deletion import Deletion, Retention
from agl_grpc.store.rollouts.dispatch import Dispatcher
from agl_grpc.store.rollouts.leases import Leases
from agl_grpc.store.rollouts.moves import Moves
from agl_grpc.store.rollouts.neighbours import Neighbours
from agl_grpc.store.rollouts.rollouts import Rollouts
from agl_grpc.store.rollouts.rows import next_attempt_due, next_rollout_due
from agl_grpc.store.storage.catalog import Catalog
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.store.store import Store
from agl_grpc.v1 import event_pb2


class WriteSide:
    """The writing half of the lifecycle. Make it with `WriteSide.start`.

    Attributes:
        store: The store it writes to.
        signer: Makes credentials.
        catalog: Keys of named things.
        dispatcher: Who waits for work.
        commands: Orders to workers.
        moves: Begins and ends attempts.
        rollouts: Changes rollouts.
        leases: Changes leases.
        deletion: Deletes rollouts.
    """

    def __init__(self, store: Store, signer: CredentialSigner) -> None:
        self.store = store
        self.signer = signer
        self.catalog = Catalog()
        self.dispatcher = Dispatcher(self.catalog)
        self.commands = Commands()
        self.moves = Moves(self.catalog, self.dispatcher, self.commands, signer)
        self.rollouts = Rollouts(self.moves)
        self.leases = Leases(self.moves, rewards.put_rewards)
        self._neighbours = Neighbours(store, self.moves, self.commands)
        self.deletion = Deletion(self.catalog)

    @classmethod
    async def start(cls, store: Store, signer: CredentialSigner) -> WriteSide:
        """Takes the store up: makes the run `default`, extends live leases (R9), arms the timers."""
        side = cls(store, signer)
        store.timers.register(side._sweep, _next_due)
        store.maintenance.register(commands.prune)
        store.maintenance.register(Retention(side.deletion).prune)
        store.writer.forgets += [side.catalog.forget, side.moves.resources.forget]
        store.writer.on_gap.append(side.leases.extend_all)
        store.writer.on_return.append(note_return)
        await store.write(side._take_up)
        return side

    def _take_up(self, tx: Tx) -> None:
        made = tx.execute(
            "INSERT INTO runs (run_id, create_time) VALUES ('default', ?) ON CONFLICT DO NOTHING", (tx.now,)
        )
        if made.rowcount:
            # The log is never empty: 0 is no position, so that a list's position is always one to watch from.
            run_key = self.catalog.run(tx, "default").run_key
            tx.event(run_key, event_pb2.ENTITY_KIND_RUN, event_pb2.EVENT_KIND_CREATED, run_key)
        if not self.store.database.is_shared(tx.connection):
            self.leases.extend_all(tx)
            note_return(tx)
        tx.arm(next_rollout_due(tx.connection))
        tx.arm(grading.next_due(tx.connection))

    def _sweep(self, tx: Tx) -> None:
        self.moves.sweep(tx, FIRE_LIMIT)
        self.rollouts.sweep(tx, FIRE_LIMIT)
        grading.sweep(tx, FIRE_LIMIT, rewards.put_rewards)


def _next_due(db: Connection) -> int | None:
    moments = (next_attempt_due(db), next_rollout_due(db), grading.next_due(db))
    return min((moment for moment in moments if moment is not None), default=None)
