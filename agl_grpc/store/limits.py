"""Sizes and counts that the store accepts; GetServerInfo tells them."""

from __future__ import annotations

MESSAGE_BYTES = 64 << 20
"""Largest message in either direction."""

PAGE_SIZE = 1000
"""Most items of a page, spans excepted."""

SPAN_PAGE_SIZE = 10_000
"""Most spans of a page."""

SPAN_BYTES = 4 << 20
"""Largest span."""

SPANS_PER_MESSAGE = 10_000
"""Most spans of one message."""

STREAM_BYTES = 32 << 20
"""Most unacknowledged bytes of one span stream."""

STREAM_MESSAGES = 1024
"""Most unacknowledged messages of one span stream."""

QUEUE_BYTES = 256 << 20
"""Most bytes of spans that wait for the disk, of all callers together (R28)."""

PAYLOAD_BYTES = 1 << 20
"""Largest inline payload."""

LONG_POLL_SECONDS = 60.0
"""Longest wait of a long poll."""

BATCH_ITEMS = 10_000
"""Most items of a batched call."""

ANSWER_BYTES = 24 << 20
"""A page ends early when its items have so many bytes: a message holds 64 MiB."""

LARGE_ANSWER_BYTES = 48 << 20
"""An answer that has no pages takes nothing more when it has so many bytes."""

RESOURCES_BYTES = 8 << 20
"""Largest set of resources: it goes with each delivery."""

BLOB_BYTES = 1 << 30
"""Largest blob."""
