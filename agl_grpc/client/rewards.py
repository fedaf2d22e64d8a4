"""Rewards: writing and reading."""

from __future__ import annotations

from collections.abc import Sequence

from agl_grpc.client.connection import Connection
from agl_grpc.model.reward import Reward
from agl_grpc.model.times import to_duration
from agl_grpc.v1 import store_service_pb2 as pb

_ROLLOUTS_PER_CALL = 1000


class RewardCalls(Connection):
    """The client's methods for rewards."""

    async def put_rewards(self, rewards: Sequence[Reward], *, lease_token: bytes = b"") -> Sequence[Reward]:
        """Write rewards; answers them with their revisions. A leased attempt's worker shows its token."""
        if not rewards:
            return []
        request = pb.PutRewardsRequest(
            rewards=[reward.to_proto() for reward in rewards], lease_token=lease_token
        )
        response = await self.call(self.bound.store.PutRewards, request)
        return [Reward.from_proto(reward) for reward in response.rewards]

    async def create_grader_credential(
        self, run_id: str | None = None, *, lifetime_seconds: float | None = None
    ) -> str:
        """A credential that may read one run and put rewards on its attempts; only operators may.

        It lasts 7 days unless ``lifetime_seconds`` says otherwise, and cannot be taken back.
        """
        request = pb.IssueCredentialRequest(
            run_id=self.run_or_default(run_id),
            role=pb.ROLE_GRADER,
            lifetime=to_duration(lifetime_seconds),
        )
        return (await self.call(self.bound.store.IssueCredential, request)).credential

    async def query_rewards(
        self, rollout_ids: Sequence[str], *, attempt_id: str | None = None, all_revisions: bool = False
    ) -> list[Reward]:
        """Rewards of rollouts, the newest revisions only unless all are asked for."""
        rewards: list[Reward] = []
        for start in range(0, len(rollout_ids), _ROLLOUTS_PER_CALL):
            request = pb.ListRewardsRequest(
                rollout_ids=rollout_ids[start : start + _ROLLOUTS_PER_CALL],
                attempt_id=attempt_id or "",
                all_revisions=all_revisions,
            )
            rewards += await self.read_all(
                self.bound.store.ListRewards, request, lambda page: map(Reward.from_proto, page.rewards)
            )
        return rewards
