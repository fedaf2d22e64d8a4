"""Rollouts that an earlier trainer of the same training run left in the store, and which of them to take.

Group ids are deterministic, so a resumed trainer that asks for a group finds what was made of it before: it
takes what is finished or under way instead of paying for it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from agl_grpc.client import StoreClient
from agl_grpc.client.filters import rollout_filter
from agl_grpc.learner.rollouts.groups import FinishedRollout, GroupRequest
from agl_grpc.learner.training_run import STEP_LABEL, TrainingIdentity
from agl_grpc.model.enums import FailureKind, RolloutStatus
from agl_grpc.model.rollout import Rollout


@dataclass(frozen=True)
class LeftBehind:
    """The newest try at one place of a group, and how many tries there were."""

    rollout: Rollout
    tries: int

    @property
    def is_worth_taking(self) -> bool:
        """Whether it is, or will be, what a new one would be: not cancelled, and no fault of the machines."""
        failure = self.rollout.failure
        if self.rollout.status is RolloutStatus.CANCELLED:
            return False
        return failure is None or failure.kind is not FailureKind.INFRASTRUCTURE


@dataclass
class OpenGroup:
    """A group that was asked for: the rollouts that make it up, by number, and those that are sealed.

    ``adopted`` are rollouts of an earlier trainer: taken only if this trainer's weights sampled them.
    """

    request: GroupRequest
    members: list[str] = field(default_factory=list)
    adopted: set[str] = field(default_factory=set)
    sealed: dict[str, Rollout] = field(default_factory=dict)

    def fill(self, older: dict[int, LeftBehind]) -> list[str]:
        """Chooses the members from what is there; answers the ids of those that have to be made."""
        new, taken = [], []
        for number in range(self.request.size):
            found = older.get(number)
            if found is not None and found.is_worth_taking:
                self.members.append(found.rollout.rollout_id)
                self.adopted.add(found.rollout.rollout_id)
                taken.append(found.rollout)
            else:
                new.append(self.request.rollout_id(number, found.tries if found else 0))
                self.members.append(new[-1])
        self.date_back(taken)
        return new

    def date_back(self, members: Iterable[Rollout]) -> None:
        """Makes the group as old as the first of these that was asked for: staleness is about the weights
        that sampled it.
        """
        steps = (int(member.labels[STEP_LABEL]) for member in members)
        self.request = replace(self.request, step=min([self.request.step, *steps]))

    def take_newer(self, rollout_id: str) -> None:
        """Makes a later try at one place the member, if it is one."""
        number, again = self.request.place_of(rollout_id)
        if number < len(self.members) and again > self.request.place_of(self.members[number])[1]:
            self.sealed.pop(self.members[number], None)
            self.members[number] = rollout_id

    def note(self, rollout: Rollout) -> bool:
        """Takes note of a sealed member; whether now all are."""
        if rollout.rollout_id in self.members:
            self.sealed[rollout.rollout_id] = rollout
        return len(self.sealed) == len(self.members)

    def replace_useless(self, rollouts: Sequence[FinishedRollout]) -> list[str]:
        """Replaces adopted rollouts that weights of no use here have sampled; the ids of the new ones."""
        new = []
        for rollout in rollouts:
            old = rollout.rollout_id
            if old in self.adopted and any(row.oldest_step < self.request.step - 1 for row in rollout.rows):
                number, again = self.request.place_of(old)
                new.append(self.request.rollout_id(number, again + 1))
                self.members[number] = new[-1]
                self.adopted.remove(old)
                del self.sealed[old]
        return new


async def left_behind(
    client: StoreClient, identity: TrainingIdentity, groups: Sequence[GroupRequest]
) -> dict[str, dict[int, LeftBehind]]:
    """What earlier trainers left of training groups, by group and number."""
    requests = {group.uid: group for group in groups if not group.validate}
    if not requests or not identity.is_resumed:
        return {}
    mine = rollout_filter(run_id=identity.run_id, labels=identity.labels, group_id_in=list(requests))
    found: dict[str, dict[int, LeftBehind]] = {}
    for rollout in await client.query_rollouts(filter=mine):
        request = requests[rollout.group_id or ""]
        number, again = request.place_of(rollout.rollout_id)
        places = found.setdefault(request.uid, {})
        if number not in places or again >= places[number].tries:
            places[number] = LeftBehind(rollout, again + 1)
    return found
