"""What a handler knows of the call that it serves: who calls, how long it may take, whether to leave."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from agl_grpc.store import errors
from agl_grpc.store.door.credentials import (
    AttemptCredential,
    CredentialSigner,
    RoleCredential,
    looks_like_credential,
    looks_like_role,
)

DEADLINE_MARGIN = 0.25
"""Seconds before the caller's deadline at which a long poll answers, at most a tenth of what remains."""

_ATTEMPT_METHODS = frozenset(
    # Export is OTLP's: spans, and logs and metrics, which nobody keeps.
    {"GetServerInfo", "AppendSpans", "StreamSpans", "ReserveSpanSequences", "PutRewards", "Export"}
)


_ROLE_METHODS = {
    "grader": frozenset(
        {
            *("GetServerInfo", "GetRun", "GetRollout", "ListRollouts", "WatchRollouts", "ListSpans"),
            # A blob is found by the digest of its content alone, which only its run's spans say.
            *("ExportSpans", "ListRewards", "PutRewards", "GetLatestResources", "GetBlob"),
        }
    )
}
"""What the bearers of roles may call, each handler for the run of its caller alone (`require_run`)."""


@dataclass(frozen=True)
class Caller:
    """Who calls: an operator, an agent that holds the credential of one attempt, or one with a role."""

    principal: str = "operator"
    """Name under which request ids are remembered (R13)."""
    credential: AttemptCredential | None = None
    """Set when the caller speaks for one attempt only."""
    role: RoleCredential | None = None
    """Set when the caller has a role in one run."""

    def require_operator(self, needs: str) -> None:
        """Refuse callers who hold an attempt credential; `needs` says what would be required."""
        if self.credential is not None or self.role is not None:
            raise errors.not_permitted(needs)

    def require_attempt(self, attempt_id: str) -> None:
        """Refuse a caller whose credential is for another attempt."""
        if self.credential is not None and self.credential.attempt_id != attempt_id:
            raise errors.not_permitted(f"a credential of attempt {attempt_id}")

    def require_run(self, run_id: str) -> None:
        """Refuse a caller whose role is in another run; empty = the run `default`, `*` = all runs."""
        if self.role is not None and (run_id or "default") != self.role.run_id:
            raise errors.not_permitted(f"a credential for run {run_id or 'default'}")


@dataclass
class Call:
    """One call in progress."""

    caller: Caller = field(default_factory=Caller)
    """Who calls."""
    method: str = ""
    """The method's bare name, for example `GetRun`."""
    deadline: float | None = None
    """Moment on the monotonic clock by which the caller wants an answer; None = it waits for ever."""
    drain: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the server goes away: long polls answer empty, streams end politely."""

    def wait_limit(self, wanted: float) -> float:
        """Seconds that a long poll may wait so that its answer comes before the caller's deadline."""
        if self.deadline is None:
            return max(0.0, wanted)
        left = self.deadline - time.monotonic()
        return max(0.0, min(wanted, left - min(DEADLINE_MARGIN, left * 0.1)))


class Authenticator:
    """Turns a call's metadata into its caller.

    Args:
        signer: checks attempt credentials.
        operator_token: when set, callers without an attempt credential must present this token; when
            None, they are trusted as operators (the server listens on loopback).
    """

    def __init__(self, signer: CredentialSigner, operator_token: str | None = None) -> None:
        self._signer = signer
        self._operator_token = operator_token

    def caller(self, method: str, metadata: Sequence[tuple[str, str | bytes]]) -> Caller:
        """The caller of `method`.

        Raises:
            StoreError: UNAUTHENTICATED or NOT_PERMITTED.
        """
        token = _bearer(metadata)
        if looks_like_credential(token):
            credential = self._signer.verify(token)
            if method not in _ATTEMPT_METHODS:
                raise errors.not_permitted(f"an operator's credential for {method}")
            return Caller(f"attempt:{credential.attempt_id}", credential)
        if looks_like_role(token):
            role = self._signer.verify_role(token)
            if method not in _ROLE_METHODS.get(role.role, ()):
                raise errors.not_permitted(f"an operator's credential for {method}")
            return Caller(f"{role.role}:{role.credential_id}", role=role)
        if self._operator_token is not None and not hmac.compare_digest(
            token.encode(), self._operator_token.encode()
        ):
            raise errors.unauthenticated("no valid credential came with the call")
        return Caller()


def _bearer(metadata: Sequence[tuple[str, str | bytes]]) -> str:
    for key, value in metadata:
        if key == "authorization":
            text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
            scheme, _, token = text.partition(" ")
            return token.strip() if scheme.lower() == "bearer" else ""
    return ""
