"""The `agl-grpc` command. Each command is a module of this package, imported only when it is used."""

from __future__ import annotations
