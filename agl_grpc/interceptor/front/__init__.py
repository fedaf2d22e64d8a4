"""The interceptor in front of engines that somebody else runs: an HTTP proxy that captures model calls.

`server` holds the parts together; `handler` takes one request from its arrival to its end, with what
`exchange` and `streams` do between engine and client; `recording` begins and ends its record (`capture`),
`journal` takes that to the disk and the store.
"""

from __future__ import annotations
