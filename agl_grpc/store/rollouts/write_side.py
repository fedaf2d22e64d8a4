"""Everything that changes rollouts, attempts and leases, put together. Used in the writer's thread."""

from __future__ import annotations

from agl_grpc.store import rewards
from agl_grpc.store.door.credentials import CredentialSigner
from agl_grpc.store.events.timers import FIRE_LIMIT
from agl_grpc.store.rollouts import commands
from agl_grpc.store.rollouts.commands import Commands
from agl_grpc.store.rollouts.deletion import Deletion, Retention
from agl_grpc.store.rollouts.dispatch import Dispatcher
from agl_grpc.store.rollouts.leases import Leases
from agl_grpc.store.rollouts.moves import Moves
from agl_grpc.store.rollouts.rollouts import Rollouts
from agl_grpc.store.storage.catalog import Catalog
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.store.store import Store


class WriteSide:
    """The writing half of the lifecycle. Make it with `WriteSide.start`.

    Attributes:
        store: The store it writes to.
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
        self.catalog = Catalog()
        self.dispatcher = Dispatcher(self.catalog)
        self.commands = Commands()
        self.moves = Moves(self.catalog, self.dispatcher, self.commands, signer)
        self.rollouts = Rollouts(self.moves)
        self.leases = Leases(self.moves, rewards.put_rewards)
        self.deletion = Deletion(self.catalog)

    @classmethod
    async def start(cls, store: Store, signer: CredentialSigner) -> WriteSide:
        """Takes the store up: makes the run `default`, extends every live lease (R9), arms the timers."""
        side = cls(store, signer)
        store.timers.register(side._sweep)
        store.maintenance.register(commands.prune)
        store.maintenance.register(Retention(side.deletion).prune)
        await store.write(side._take_up)
        return side

    def _take_up(self, tx: Tx) -> None:
        tx.execute("INSERT OR IGNORE INTO runs (run_id, create_time) VALUES ('default', ?)", (tx.now,))
        self.leases.extend_all(tx)
        (earliest,) = tx.execute("SELECT min(due) FROM rollouts WHERE due IS NOT NULL").fetchone()
        tx.arm(earliest)

    def _sweep(self, tx: Tx) -> None:
        self.moves.sweep(tx, FIRE_LIMIT)
        self.rollouts.sweep(tx, FIRE_LIMIT)
