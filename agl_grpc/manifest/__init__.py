"""What made a run, written down; and what differs between two runs."""

from __future__ import annotations

from agl_grpc.manifest.describe import describe_run, git_state, hardware, versions_here
from agl_grpc.manifest.diff import Difference, ManifestError, RunRecord, compare

__all__ = [
    "Difference",
    "ManifestError",
    "RunRecord",
    "compare",
    "describe_run",
    "git_state",
    "hardware",
    "versions_here",
]
