"""The store server: lifecycle rules, transactions, back ends and gRPC handlers of all three services.

How a change is made: a handler decodes, submits a command (`Store.write` or, with a request id,
`Store.change`), encodes. The command runs in the writer's thread with a `Tx`: statements on
`tx.execute`, log entries by `tx.event`, timers by `tx.arm`. Reads go through `Store.read`. Tables
stand in `schema_<family>.py`; a family registers in `schema.families`. Timers of a family are
sweeps (`Store.timers.register`), prunes go to `Store.maintenance.register`.
"""

from __future__ import annotations
