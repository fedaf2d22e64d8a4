"""Advisory locks and the channel by which servers of one database know of each other."""

from __future__ import annotations

_SPACE = 0x41474C47

WRITE = f"SELECT pg_advisory_xact_lock({_SPACE}, 1)"
"""Held by whoever writes, from the begin of a group to its end: groups of all servers are serial, so
positions of the event log rise in commit order and no two writers wait for each other's rows."""

PRESENT = f"SELECT pg_advisory_lock_shared({_SPACE}, 2)"
"""Held by each server as long as it lives: PostgreSQL lets it go with the connection."""

ABSENT = f"SELECT pg_advisory_unlock_shared({_SPACE}, 2)"
"""Said by a server that leaves: PostgreSQL itself notices the end of a connection only a moment later, and a
server that starts in this moment would take the one that left for a neighbour that kept all leases alive."""

OTHERS = (
    f"SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND classid = {_SPACE} AND objid = 2 "
    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND pid <> ?"
)
"""Backends of the servers that live, apart from the one with this backend."""

CHANNEL = "agl_grpc_events"
"""Told after each group that has events. A hint: who misses it looks by itself within a second."""

JOINED = "joined"
"""What a server that comes says there, with its backend: whoever looks for others now and then would miss one
that came and went in between."""
