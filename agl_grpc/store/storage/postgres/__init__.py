"""PostgreSQL: one database, several servers. The driver comes with the extra `agl-grpc[postgres]`."""

from __future__ import annotations
