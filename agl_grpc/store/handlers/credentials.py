"""IssueCredential."""

from __future__ import annotations

import time

from agl_grpc.store.clock import SECOND
from agl_grpc.store.door.call import Call
from agl_grpc.store.door.credentials import DEFAULT_LIFETIME, CredentialSigner
from agl_grpc.store.errors import invalid_field, not_found
from agl_grpc.store.rollouts.encode import duration_of
from agl_grpc.store.store import Store
from agl_grpc.v1 import store_service_pb2

_ROLES = {store_service_pb2.ROLE_GRADER: "grader"}


class CredentialHandlers:
    """Makes credentials of roles."""

    def __init__(self, store: Store, signer: CredentialSigner) -> None:
        self._store = store
        self._signer = signer

    async def issue_credential(
        self, request: store_service_pb2.IssueCredentialRequest, _call: Call
    ) -> store_service_pb2.IssueCredentialResponse:
        """A signed credential; nothing is stored."""
        role = _ROLES.get(request.role)
        if role is None:
            raise invalid_field("role", "must be ROLE_GRADER")
        seconds = DEFAULT_LIFETIME
        if request.HasField("lifetime"):
            seconds = duration_of(request.lifetime) / SECOND
        run_id = request.run_id or "default"
        known = await self._store.read(
            lambda db: db.execute("SELECT 1 FROM runs WHERE run_id = ?", (run_id,)).fetchone()
        )
        if known is None:
            raise not_found("run", run_id)
        response = store_service_pb2.IssueCredentialResponse(
            credential=self._signer.mint_role(role, run_id, seconds)
        )
        response.expire_time.FromSeconds(int(time.time() + seconds))
        return response
