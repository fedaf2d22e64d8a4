"""Token-exact capture of model calls inside vLLM, and weight swaps driven by the store.

`front` is the same in front of engines that somebody else runs. Common to both: `attribution`, `record`,
`sampling`, `deltas`, `retries`, `raw`, `spool` and `transport`.
"""

from __future__ import annotations
