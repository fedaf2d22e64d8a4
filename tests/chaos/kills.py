"""A store that is killed, stopped, cut off and filled up under load, and what its clients saw.

On PostgreSQL it may be several servers, each of which may be killed while the others go on.
"""

from __future__ import annotations

import asyncio
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agl_grpc.store.verify.files import verify
from agl_grpc.v1 import attempt_pb2, rollout_pb2, store_service_pb2
from tests.chaos.checker import Final, check
from tests.chaos.clients import Client, Source, Watcher, Worker
from tests.chaos.history import History
from tests.chaos.proxy import Proxy
from tests.chaos.server import KillableStore
from tests.chaos.watches import KINDS
from tests.support.waiting import eventually

WORKERS = 4
_PAGE = 500
_FAULTS = {"kill": 6, "before_commit": 3, "after_commit": 3, "stop": 1, "cut": 2, "lose": 2, "full": 1}
"""How often each fault is drawn; the first three end in kill -9."""

_KILLS = ("kill", "before_commit", "after_commit")


@dataclass
class Report:
    """What was done and what came of it."""

    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    rollouts: int = 0
    attempts: int = 0
    spans: int = 0
    answers: int = 0
    repeats: Counter[str] = field(default_factory=Counter)
    watched: int = 0
    seconds: float = 0

    def add(self, other: Report) -> None:
        """Adds what another run did."""
        for name, value in vars(other).items():
            if name != "seed":
                setattr(self, name, getattr(self, name) + value)

    def row(self) -> dict[str, object]:
        """As a result file holds it."""
        return {
            **vars(self),
            "faults": dict(self.faults),
            "repeats": dict(self.repeats),
            "seconds": round(self.seconds, 1),
        }


class Nemesis:
    """Does one fault after another to a store under load.

    Args:
        stores: The store's servers; each fault meets one of them.
        proxy: The way to it.
        history: Of its clients: a fault comes only once the last one is overcome.
        choose: Its choices.
        crash: Crashes and restarts the database's own server; None = there is none.
    """

    def __init__(
        self,
        stores: Sequence[KillableStore],
        proxy: Proxy,
        history: History,
        choose: random.Random,
        crash: Callable[[], None] | None = None,
    ) -> None:
        self.done: Counter[str] = Counter()
        self._stores = stores
        self._store = stores[0]
        self._proxy = proxy
        self._history = history
        self._crash = crash
        self._faults = dict(_FAULTS)
        if crash is not None:
            # The disk is the database's, not a server's.
            self._faults["crash"] = self._faults.pop("full")
        self.choose = choose

    async def run(self, kills: int, tell: Callable[[int], None]) -> None:
        """So many kills, with other faults between them."""
        while sum(self.done[name] for name in _KILLS) < kills:
            await self._progress()
            (name,) = self.choose.choices(list(self._faults), list(self._faults.values()))
            self._store = self.choose.choice(self._stores)
            await getattr(self, f"_do_{name}")()
            self.done[name] += 1
            tell(sum(self.done[name] for name in _KILLS))

    async def _progress(self) -> None:
        enough = self._history.answers + self.choose.randint(5, 40)
        await eventually(lambda: self._history.answers >= enough, within=60, what="answers after a fault")

    async def _do_kill(self) -> None:
        await self._store.kill()
        await self._store.start()

    async def _do_before_commit(self) -> None:
        await self._die_at("before_commit")

    async def _do_after_commit(self) -> None:
        await self._die_at("after_commit")

    async def _die_at(self, place: str) -> None:
        # It starts anew with the failpoint on, and dies of it by itself.
        await self._store.kill()
        seed = self.choose.getrandbits(32)
        await self._store.start(f"{place}:kill@0.05;{place}:delay(2)@0.2;seed={seed}")
        code = await self._store.ended(60)
        assert code == -signal.SIGKILL, f"the failpoint {place} did not end the store: {code}"
        await self._store.start()

    async def _do_stop(self) -> None:
        self._store.send(signal.SIGSTOP)
        await asyncio.sleep(self.choose.uniform(0.1, 1.5))
        self._store.send(signal.SIGCONT)

    async def _do_cut(self) -> None:
        self._proxy.cut()

    async def _do_lose(self) -> None:
        await self._proxy.lose_answers(self.choose.uniform(0.02, 0.2))

    async def _do_crash(self) -> None:
        assert self._crash is not None
        await asyncio.to_thread(self._crash)

    async def _do_full(self) -> None:
        await self._store.kill()
        await self._store.start(limit_pages=1)
        # Nothing can grow now: clients are refused and ask again until there is room.
        await asyncio.sleep(self.choose.uniform(0.1, 0.5))
        await self._store.kill()
        await self._store.start()


async def run(
    seed: int,
    kills: int,
    database: Path | str | None = None,
    servers: int = 1,
    crash: Callable[[], None] | None = None,
    tell: Callable[[int], None] = lambda _kills: None,
) -> Report:
    """Kills a store so often and checks everything.

    Args:
        seed: Of all choices; what the scheduler does is its own.
        kills: How often the store dies.
        database: An SQLite file or a database's URL, empty; None = a file in a temporary folder.
        servers: How many serve a PostgreSQL database.
        crash: Crashes and restarts that database's own server.
        tell: Called with the number of kills so far.

    Raises:
        AssertionError: A promise was broken; says which, with the seed and the part of the history.
    """
    begun = time.monotonic()
    choose = random.Random(seed)
    history = History()
    with tempfile.TemporaryDirectory() as folder:
        where = database or Path(folder, "store.db")
        stores = [KillableStore(where, Path(folder, f"store-{i}.log")) for i in range(servers)]
        try:
            for store in stores:
                await store.start()
            async with Proxy(*(store.port for store in stores)) as proxy:
                nemesis = Nemesis(stores, proxy, history, choose, crash)
                final, watchers, source = await _load(nemesis, proxy.address, history, kills, tell)
        finally:
            for store in stores:
                if store.starts:
                    await store.kill()
        # As the last kill has left it, before any server repairs what it may.
        broken = verify(where).broken if isinstance(where, Path) else []
        history.wrong += [str(one) for one in broken]
    wrong = check(history, final) + _check_watchers(final, watchers, source)
    assert not wrong, f"seed {seed}: {len(wrong)} promises broken\n" + "\n".join(wrong[:3])
    return Report(
        seed,
        nemesis.done,
        len(final.rollouts),
        sum(len(attempts) for attempts in final.attempts.values()),
        len(final.spans),
        history.answers,
        history.repeats,
        sum(len(watcher.names) for watcher in watchers),
        time.monotonic() - begun,
    )


async def _load(
    nemesis: Nemesis, address: str, history: History, kills: int, tell: Callable[[int], None]
) -> tuple[Final, list[Watcher], Source]:
    choose = nemesis.choose
    async with _clients() as make:
        source = make(Source("source", address, history, choose.random()))
        workers = [make(Worker(f"w{i}", address, history, choose.random())) for i in range(WORKERS)]
        kinds = [kind for kind in KINDS if kind.name in ("rollouts", "resources", "spans")]
        watchers = [make(Watcher(kind, address, history, choose.random())) for kind in kinds]
        reader = make(Client("reader", address, history, 0))
        start = await _position(reader)
        no_more, stop = asyncio.Event(), asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for watcher in watchers:
                tasks.create_task(watcher.run(start))
            working = [tasks.create_task(worker.run(stop)) for worker in workers]
            making = tasks.create_task(source.run(30, lambda: sum(one.over for one in workers), no_more))
            await nemesis.run(kills, tell)
            no_more.set()
            await making
            await _all_over(reader, source.rollouts)
            stop.set()
            await asyncio.gather(*working)
            for watcher in watchers:
                watcher.last = source.last()[watcher.kind.name]
            await source.farewell()
        return await _collect(reader, source.rollouts), watchers, source


@asynccontextmanager
async def _clients() -> AsyncIterator[Callable[[Any], Any]]:
    made: list[Client] = []

    def make(client: Any) -> Any:
        made.append(client)
        return client

    try:
        yield make
    finally:
        for client in made:
            await client.channel.close()


async def _position(reader: Client) -> int:
    answer = await reader.surely(reader.store.GetStatistics, store_service_pb2.GetStatisticsRequest())
    return int(answer.last_position)


async def _all_over(reader: Client, rollouts: list[str]) -> None:
    async def over() -> bool:
        for at in range(0, len(rollouts), 10_000):
            request = store_service_pb2.WaitRolloutsRequest(rollout_ids=rollouts[at : at + 10_000])
            request.timeout.FromMilliseconds(1000)
            if not (await reader.surely(reader.store.WaitRollouts, request)).complete:
                return False
        return True

    try:
        await eventually(over, within=60, what="the end of every rollout")
    except AssertionError as late:
        # Noted, not raised: the check then names the rollouts and shows their histories.
        reader.history.wrong.append(str(late))


async def _collect(reader: Client, rollouts: list[str]) -> Final:
    """Everything that the store has, by its own rpcs."""
    final = Final({}, {})
    request = store_service_pb2.ListRolloutsRequest(page_size=_PAGE)
    attempts: dict[str, list[tuple[str, str]]] = {}
    states: dict[str, str] = {}
    while True:
        page = await reader.surely(reader.store.ListRollouts, request)
        for one in page.rollouts:
            rollout = one.rollout
            states[rollout.rollout_id] = rollout_pb2.RolloutStatus.Name(rollout.status)[15:].lower()
            listed = store_service_pb2.ListAttemptsRequest(rollout_id=rollout.rollout_id, page_size=1000)
            answer = await reader.surely(reader.store.ListAttempts, listed)
            attempts[rollout.rollout_id] = [
                (attempt.attempt_id, attempt_pb2.AttemptStatus.Name(attempt.status)[15:].lower())
                for attempt in answer.attempts
            ]
        request.page_token = page.next_page_token
        if not request.page_token:
            break
    async for exported in reader.store.ExportSpans(store_service_pb2.ExportSpansRequest()):
        final.spans.update((one.attempt_id, one.span.span_id) for one in exported.spans)
    for at in range(0, len(rollouts), _PAGE):
        wanted = store_service_pb2.ListRewardsRequest(
            rollout_ids=rollouts[at : at + _PAGE], all_revisions=True, page_size=1000
        )
        while True:
            found = await reader.surely(reader.store.ListRewards, wanted)
            final.rewards.update(one.attempt_id for one in found.rewards)
            wanted.page_token = found.next_page_token
            if not wanted.page_token:
                break
    return Final(states, attempts, final.spans, final.rewards)


def _check_watchers(final: Final, watchers: list[Watcher], source: Source) -> list[str]:
    """Watches: in order, unique, without a gap over all restarts (R23)."""
    seen = {watcher.kind.name: watcher for watcher in watchers}
    wrong = []
    expected = [f"rs-{source.name}@{number}" for number in range(1, source.versions + 1)]
    if seen["resources"].names != expected:
        wrong.append(f"the watch of resources saw {seen['resources'].names}, published was {expected}")
    spans = Counter(seen["spans"].names)
    stored = Counter(span_id.hex() for _, span_id in final.spans)
    if spans != stored:
        wrong.append(f"the watch of spans missed {stored - spans} and saw too often {spans - stored}")
    ends: dict[str, tuple[int, int]] = {}
    for rollout, status, end in seen["rollouts"].ends:
        if ends.setdefault(rollout, (status, end)) != (status, end):
            wrong.append(f"rollout {rollout} was seen as {(status, end)} after its end {ends[rollout]}")
    if missed := final.rollouts.keys() - ends.keys():
        wrong.append(f"the watch of rollouts never saw the end of {sorted(missed)[:5]}")
    return wrong
