"""The store server: lifecycle rules, transactions, back ends and gRPC handlers of all three services."""

from __future__ import annotations
