"""Attempt credentials: signed, expiring strings that let an agent write spans of its own attempt.

A credential reads `agl1.<claims>.<signature>`, both parts base64url without padding; the claims are a
small JSON object, the signature is HMAC-SHA256 over `agl1.<claims>` with the database's own key. Nothing
is stored per credential: expiry and the attempt's state (R8, R10) bound what it can do.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import orjson

from agl_grpc.store import errors

PREFIX = "agl1"
"""First part of every credential; tells the scheme's version."""

DEFAULT_LIFETIME = 7 * 24 * 3600.0
"""Seconds that a credential lasts unless the minter says otherwise."""

KEY_BYTES = 32
"""Length of a signing key."""


ROLE_PREFIX = "agl1r"
"""First part of the credentials of roles."""


@dataclass(frozen=True)
class RoleCredential:
    """What the credential of a role says: what its bearer may do, and in which run."""

    role: str
    """The role, for example `grader`."""
    run_id: str
    """The run."""
    credential_id: str
    """Tells two credentials of one role apart."""
    expires: float
    """Seconds since the epoch after which it is refused."""


@dataclass(frozen=True)
class AttemptCredential:
    """What a credential says: the one attempt that its bearer speaks for."""

    run_id: str
    """The run."""
    rollout_id: str
    """The rollout."""
    attempt_id: str
    """The attempt."""
    expires: float
    """Seconds since the epoch after which it is refused."""


def new_key() -> bytes:
    """A fresh signing key for a new database."""
    return secrets.token_bytes(KEY_BYTES)


def looks_like_credential(text: str) -> bool:
    """Whether the text claims to be an attempt credential."""
    return text.startswith(f"{PREFIX}.")


def looks_like_role(text: str) -> bool:
    """Whether the text claims to be the credential of a role."""
    return text.startswith(f"{ROLE_PREFIX}.")


class CredentialSigner:
    """Mints and checks attempt credentials with one key.

    Args:
        key: the database's signing key, at least 16 bytes.
        clock: seconds since the epoch.
    """

    def __init__(self, key: bytes, clock: Callable[[], float] = time.time) -> None:
        if len(key) < 16:
            raise ValueError(f"a signing key needs at least 16 bytes, not {len(key)}")
        self._key = key
        self._clock = clock

    def mint(self, run_id: str, rollout_id: str, attempt_id: str, lifetime: float = DEFAULT_LIFETIME) -> str:
        """A credential for one attempt that lasts `lifetime` seconds."""
        return self._signed(PREFIX, [run_id, rollout_id, attempt_id, int(self._clock() + lifetime)])

    def mint_role(self, role: str, run_id: str, lifetime: float = DEFAULT_LIFETIME) -> str:
        """A credential of a role in one run that lasts `lifetime` seconds."""
        return self._signed(ROLE_PREFIX, [role, run_id, secrets.token_hex(6), int(self._clock() + lifetime)])

    def _signed(self, prefix: str, claims: list[str | int]) -> str:
        body = f"{prefix}.{_encode(orjson.dumps(claims))}"
        return f"{body}.{_encode(self._sign(body))}"

    def verify(self, text: str) -> AttemptCredential:
        """The claims of a credential.

        Raises:
            StoreError: UNAUTHENTICATED when it is malformed, not signed by this key, or expired.
        """
        return AttemptCredential(*self._checked(text, PREFIX, "attempt credential"))

    def verify_role(self, text: str) -> RoleCredential:
        """The claims of a role's credential; raises as `verify`."""
        return RoleCredential(*self._checked(text, ROLE_PREFIX, "credential"))

    def _checked(self, text: str, prefix: str, what: str) -> tuple[str, str, str, int]:
        body, _, signature = text.rpartition(".")
        if not hmac.compare_digest(_decode(signature), self._sign(body)):
            raise errors.unauthenticated(f"the {what} is not one of this store")
        claims = _claims(body, prefix)
        if claims[3] <= self._clock():
            raise errors.unauthenticated(f"the {what} has expired")
        return claims

    def _sign(self, body: str) -> bytes:
        return hmac.new(self._key, body.encode(), hashlib.sha256).digest()


def _claims(body: str, wanted: str) -> tuple[str, str, str, int]:
    prefix, _, encoded = body.partition(".")
    if prefix != wanted:
        raise errors.unauthenticated("the attempt credential is of an unknown scheme")
    first, second, third, expires = orjson.loads(_decode(encoded))
    return first, second, third, expires


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError) as error:
        raise errors.unauthenticated("the attempt credential is malformed") from error
