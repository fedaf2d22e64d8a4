"""The sync face of the store's client: the same methods, for threads without an event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

from agl_grpc.client.channel import RetryPolicy
from agl_grpc.client.connection import DEFAULT_TARGET
from agl_grpc.client.io_thread import io_thread
from agl_grpc.client.store_client import StoreClient

P = ParamSpec("P")
R = TypeVar("R")


class _Blocking(Generic[P, R]):
    """A coroutine method of `StoreClient` as a blocking method with the same arguments."""

    def __init__(self, method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    @overload
    def __get__(self, instance: None, owner: type[Any]) -> Self: ...
    @overload
    def __get__(self, instance: SyncStoreClient, owner: type[Any]) -> Callable[P, R]: ...
    def __get__(self, instance: SyncStoreClient | None, owner: type[Any]) -> Self | Callable[P, R]:
        if instance is None:
            return self

        def blocking(*args: P.args, **kwargs: P.kwargs) -> R:
            return instance.io.run(self._method(instance.async_client, *args, **kwargs))

        blocking.__doc__, blocking.__name__ = self.__doc__, self._method.__name__
        return blocking


class _Iterating(Generic[P, R]):
    """A watching method of `StoreClient` as one that answers a plain iterator."""

    def __init__(self, method: Callable[Concatenate[Any, P], AsyncIterator[R]]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    @overload
    def __get__(self, instance: None, owner: type[Any]) -> Self: ...
    @overload
    def __get__(self, instance: SyncStoreClient, owner: type[Any]) -> Callable[P, Iterator[R]]: ...
    def __get__(self, instance: SyncStoreClient | None, owner: type[Any]) -> Self | Callable[P, Iterator[R]]:
        if instance is None:
            return self

        def iterating(*args: P.args, **kwargs: P.kwargs) -> Iterator[R]:
            return _iterate(instance, self._method(instance.async_client, *args, **kwargs))

        iterating.__doc__, iterating.__name__ = self.__doc__, self._method.__name__
        return iterating


def _iterate(client: SyncStoreClient, source: AsyncIterator[R]) -> Iterator[R]:
    async def following() -> tuple[R] | None:
        async for item in source:
            return (item,)
        return None

    async def close() -> None:
        await source.aclose()  # type: ignore[attr-defined]  # every watch is an async generator

    try:
        while (item := client.io.run(following())) is not None:
            yield item[0]
    finally:
        client.io.run(close())


class SyncStoreClient:
    """The store, as blocking methods, from any thread.

    All clients of a process share its I/O thread. Arguments are those of `StoreClient`. A client
    is not usable after fork (`ForkedProcess`); it can be pickled and so handed to spawned processes.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        run_id: str = "default",
        credential: str | None = None,
        retry: RetryPolicy | None = None,
        root_certificates: Path | str | None = None,
        certificate: Path | str | None = None,
        key: Path | str | None = None,
    ) -> None:
        self.async_client = StoreClient(
            target,
            run_id=run_id,
            credential=credential,
            retry=retry,
            root_certificates=root_certificates,
            certificate=certificate,
            key=key,
        )
        self.io = io_thread()

    def __reduce__(self) -> tuple[Callable[..., SyncStoreClient], tuple[StoreClient]]:
        return _from_async, (self.async_client,)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def for_run(self, run_id: str) -> SyncStoreClient:
        """A client of the same store with the same settings, for another run."""
        return _from_async(self.async_client.for_run(run_id))

    close = _Blocking(StoreClient.close)

    start_rollout = _Blocking(StoreClient.start_rollout)
    enqueue_rollout = _Blocking(StoreClient.enqueue_rollout)
    enqueue_many_rollouts = _Blocking(StoreClient.enqueue_many_rollouts)
    dequeue_rollout = _Blocking(StoreClient.dequeue_rollout)
    dequeue_many_rollouts = _Blocking(StoreClient.dequeue_many_rollouts)
    start_attempt = _Blocking(StoreClient.start_attempt)
    get_rollout_by_id = _Blocking(StoreClient.get_rollout_by_id)
    query_rollouts = _Blocking(StoreClient.query_rollouts)
    update_rollout = _Blocking(StoreClient.update_rollout)
    cancel_rollouts = _Blocking(StoreClient.cancel_rollouts)
    retry_rollouts = _Blocking(StoreClient.retry_rollouts)
    delete_rollouts = _Blocking(StoreClient.delete_rollouts)
    wait_for_rollouts = _Blocking(StoreClient.wait_for_rollouts)
    watch_rollouts = _Iterating(StoreClient.watch_rollouts)

    query_attempts = _Blocking(StoreClient.query_attempts)
    get_latest_attempt = _Blocking(StoreClient.get_latest_attempt)
    get_attempt_by_id = _Blocking(StoreClient.get_attempt_by_id)
    update_attempt = _Blocking(StoreClient.update_attempt)
    watch_attempts = _Iterating(StoreClient.watch_attempts)

    add_span = _Blocking(StoreClient.add_span)
    add_many_spans = _Blocking(StoreClient.add_many_spans)
    add_otel_span = _Blocking(StoreClient.add_otel_span)
    append_spans = _Blocking(StoreClient.append_spans)
    query_spans = _Blocking(StoreClient.query_spans)
    get_next_span_sequence_id = _Blocking(StoreClient.get_next_span_sequence_id)
    get_many_span_sequence_ids = _Blocking(StoreClient.get_many_span_sequence_ids)
    export_spans = _Iterating(StoreClient.export_spans)
    watch_spans = _Iterating(StoreClient.watch_spans)

    put_rewards = _Blocking(StoreClient.put_rewards)
    query_rewards = _Blocking(StoreClient.query_rewards)
    create_grader_credential = _Blocking(StoreClient.create_grader_credential)

    add_resources = _Blocking(StoreClient.add_resources)
    update_resources = _Blocking(StoreClient.update_resources)
    get_resources_by_id = _Blocking(StoreClient.get_resources_by_id)
    get_latest_resources = _Blocking(StoreClient.get_latest_resources)
    query_resources = _Blocking(StoreClient.query_resources)
    watch_resources = _Iterating(StoreClient.watch_resources)

    query_workers = _Blocking(StoreClient.query_workers)
    get_worker_by_id = _Blocking(StoreClient.get_worker_by_id)
    update_worker = _Blocking(StoreClient.update_worker)
    query_leases = _Blocking(StoreClient.query_leases)
    expire_leases = _Blocking(StoreClient.expire_leases)
    lease_rollouts = _Blocking(StoreClient.lease_rollouts)
    renew_leases = _Blocking(StoreClient.renew_leases)
    complete_attempts = _Blocking(StoreClient.complete_attempts)
    release_attempts = _Blocking(StoreClient.release_attempts)

    drain_workers = _Blocking(StoreClient.drain_workers)

    put_blob = _Blocking(StoreClient.put_blob)
    get_blob = _Blocking(StoreClient.get_blob)
    read_blob = _Iterating(StoreClient.read_blob)
    load = _Blocking(StoreClient.load)
    with_input = _Blocking(StoreClient.with_input)
    spill = _Blocking(StoreClient.spill)

    get_server_info = _Blocking(StoreClient.get_server_info)
    capabilities = _Blocking(StoreClient.capabilities)
    require = _Blocking(StoreClient.require)
    statistics = _Blocking(StoreClient.statistics)
    create_run = _Blocking(StoreClient.create_run)
    get_run_by_id = _Blocking(StoreClient.get_run_by_id)
    query_runs = _Blocking(StoreClient.query_runs)
    update_run = _Blocking(StoreClient.update_run)
    pause_dispatch = _Blocking(StoreClient.pause_dispatch)
    resume_dispatch = _Blocking(StoreClient.resume_dispatch)
    get_group = _Blocking(StoreClient.get_group)

    create_training_run = _Blocking(StoreClient.create_training_run)
    get_training_run_by_id = _Blocking(StoreClient.get_training_run_by_id)
    query_training_runs = _Blocking(StoreClient.query_training_runs)
    acquire_training_run = _Blocking(StoreClient.acquire_training_run)
    finish_training_run = _Blocking(StoreClient.finish_training_run)
    stop_training_run = _Blocking(StoreClient.stop_training_run)
    report_metrics = _Blocking(StoreClient.report_metrics)
    watch_training_run = _Iterating(StoreClient.watch_training_run)
    watch_training_log = _Iterating(StoreClient.watch_training_log)
    watch_training_runs = _Iterating(StoreClient.watch_training_runs)
    claim_batch = _Blocking(StoreClient.claim_batch)
    get_batch = _Blocking(StoreClient.get_batch)
    query_batches = _Blocking(StoreClient.query_batches)
    stream_batch = _Iterating(StoreClient.stream_batch)
    replay_batch = _Iterating(StoreClient.replay_batch)
    explain_tokens = _Blocking(StoreClient.explain_tokens)
    commit_batches = _Blocking(StoreClient.commit_batches)
    release_batches = _Blocking(StoreClient.release_batches)

    prepare_policy_version = _Blocking(StoreClient.prepare_policy_version)
    commit_policy_version = _Blocking(StoreClient.commit_policy_version)
    abort_policy_version = _Blocking(StoreClient.abort_policy_version)
    get_policy_version = _Blocking(StoreClient.get_policy_version)
    query_policy_versions = _Blocking(StoreClient.query_policy_versions)
    watch_policy_versions = _Iterating(StoreClient.watch_policy_versions)
    report_engine_state = _Blocking(StoreClient.report_engine_state)
    query_engines = _Blocking(StoreClient.query_engines)


def _from_async(client: StoreClient) -> SyncStoreClient:
    sync = SyncStoreClient(client.target)
    sync.async_client = client
    return sync
