"""Digests that prove a batch from store to optimiser; all are sensitive to order."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

from agl_grpc.sample.types import Sample


def batch_digest(rows: Iterable[tuple[str, float, str]]) -> str:
    """`sha256:<hex>` over (rollout id, reward, group id) of each row, in order.

    Fields are length-prefixed and rewards taken as 64-bit floats, so no two different lists of rows
    have the same encoding.
    """
    digest = hashlib.sha256(b"agl-grpc batch v1\n")
    for rollout_id, reward, group_id in rows:
        for text in (rollout_id.encode(), group_id.encode()):
            digest.update(struct.pack("<I", len(text)) + text)
        digest.update(struct.pack("<d", reward))
    return f"sha256:{digest.hexdigest()}"


def sample_digest(samples: Iterable[Sample]) -> str:
    """`batch_digest` of samples."""
    return batch_digest((s.rollout_id, s.reward, s.group_id) for s in samples)


def token_digest(samples: Iterable[Sample]) -> str:
    """`sha256:<hex>` over prompt ids, response ids and mask of each row, in order."""
    digest = hashlib.sha256(b"agl-grpc tokens v1\n")
    for sample in samples:
        digest.update(struct.pack("<II", len(sample.prompt_ids), len(sample.response_ids)))
        digest.update(sample.prompt_ids.astype("<i4").tobytes())
        digest.update(sample.response_ids.astype("<i4").tobytes())
        digest.update(sample.response_mask.astype("<i1").tobytes())
    return f"sha256:{digest.hexdigest()}"
