"""Publications of resources (R22). Versions of an id rise; a publication never changes."""

from __future__ import annotations

from collections.abc import Sequence

from agl_grpc.store.errors import exists, invalid_field
from agl_grpc.store.ids import mint
from agl_grpc.store.limits import LARGE_ANSWER_BYTES, RESOURCES_BYTES
from agl_grpc.store.rollouts.encode import set_time
from agl_grpc.store.storage.catalog import RunRow, require_id
from agl_grpc.store.storage.engine import Connection
from agl_grpc.store.storage.sql import by_key
from agl_grpc.store.storage.transaction import Tx
from agl_grpc.v1 import event_pb2, resources_pb2

RESOURCES = int(event_pb2.ENTITY_KIND_RESOURCES)


def check_resources(resources: Sequence[resources_pb2.Resource]) -> None:
    """Refuse a set whose resources lack a kind or a unique name.

    Raises:
        StoreError: INVALID_FIELD.
    """
    size = sum(resource.ByteSize() for resource in resources)
    if size > RESOURCES_BYTES:
        rule = (
            f"have {size} bytes, at most {RESOURCES_BYTES} are taken: they go with each delivery; use blobs"
        )
        raise invalid_field("resources", rule)
    seen: set[str] = set()
    for index, resource in enumerate(resources):
        path = f"resources[{index}]"
        if not resource.name:
            raise invalid_field(f"{path}.name", "must not be empty")
        if resource.name in seen:
            raise invalid_field(f"{path}.name", f"is {resource.name!r} again; names must be unique")
        if resource.WhichOneof("kind") is None:
            raise invalid_field(path, "must be one of llm, proxy_llm, prompt_template, custom")
        seen.add(resource.name)


def publish(
    tx: Tx, run: RunRow, resources_id: str, resources: Sequence[resources_pb2.Resource]
) -> tuple[int, resources_pb2.ResourceSet]:
    """Publish the next version of a set.

    Args:
        tx: The transaction.
        run: The run.
        resources_id: The set's id; empty = a new one.
        resources: Checked resources.

    Returns:
        The publication's key and the publication.

    Raises:
        StoreError: INVALID_FIELD, or ENTITY_EXISTS when the id belongs to another run.
    """
    resources_id = require_id(resources_id, "resources_id") if resources_id else mint("rs")
    row = tx.execute(
        "SELECT run_key, version, create_time FROM resources WHERE resources_id = ? "
        "ORDER BY version DESC LIMIT 1",
        (resources_id,),
    ).fetchone()
    if row is not None and row[0] != run.run_key:
        raise exists("resources", resources_id)
    version, create_time = (row[1] + 1, row[2]) if row else (1, tx.now)
    made = resources_pb2.ResourceSet(
        resources_id=resources_id, version=version, run_id=run.run_id, resources=resources
    )
    set_time(made.update_time, tx.now)
    set_time(made.create_time, create_time)
    key = tx.insert(
        "INSERT INTO resources (run_key, resources_id, version, update_time, create_time, body) "
        "VALUES (?, ?, ?, ?, ?, ?) RETURNING resource_key",
        (run.run_key, resources_id, version, tx.now, create_time, made.SerializeToString()),
    )
    tx.event(run.run_key, event_pb2.ENTITY_KIND_RESOURCES, event_pb2.EVENT_KIND_CREATED, key)
    return key, made


def load_resources(
    db: Connection, keys: Sequence[int], *, most_bytes: int = LARGE_ANSWER_BYTES
) -> list[resources_pb2.ResourceSet]:
    """Publications by their keys, in that order, no more than have so many bytes."""
    sizes = by_key(
        db, "SELECT resource_key, length(body) FROM resources WHERE resource_key IN ({keys})", keys
    )
    chosen, size = [], 0
    for key, (_, length) in sizes.items():
        chosen.append(key)
        size += length
        if size > most_bytes:
            break
    rows = by_key(db, "SELECT resource_key, body FROM resources WHERE resource_key IN ({keys})", chosen)
    return [resources_pb2.ResourceSet.FromString(body) for _, body in rows.values()]
