"""Which optimiser step a policy version holds, also for versions that an earlier trainer published."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from agl_grpc.learner.rollouts.groups import UNKNOWN_STEP, IntArray
from agl_grpc.learner.training_run import TrainingIdentity
from agl_grpc.model.enums import PolicyVersionStatus
from agl_grpc.model.policy import PolicyVersion


def transfer_name(identity: TrainingIdentity, step: int, version: int) -> str:
    """Name of the transfer of a version's weights: it says in the store which step they are."""
    return f"{identity.training_run_id}/{identity.trainer_epoch}/{step}/{version}"


def step_of(version: PolicyVersion) -> int:
    """The optimiser step of a version, whichever training run it is of; 0 where none is named."""
    parts = version.source.group_id.split("/")
    return int(parts[-2]) if len(parts) == 4 and parts[-2].isdigit() else 0


def _step_in(name: str, training_run_id: str) -> int | None:
    """The step in a transfer's name; None for another training run's."""
    parts = name.removeprefix(f"{training_run_id}/").split("/")
    if not name.startswith(f"{training_run_id}/") or len(parts) != 3:
        return None
    return int(parts[1])


class PolicyLineage:
    """Steps of policy versions.

    Versions only rise, also when a resumed trainer goes back to an earlier step; so one step may have been
    published several times. An older version is a step of this trainer when its weights are the same, byte
    for byte, as its digest says. Tokens sampled by any other version are not this trainer's.

    Args:
        offset: published policy version minus optimiser step, for this trainer's versions.
        start: the step that this trainer begins with.
        older: the versions that are in the store.
        training_run_id: whose versions count.
    """

    def __init__(
        self,
        *,
        offset: int = 0,
        start: int = 0,
        older: Iterable[PolicyVersion] = (),
        training_run_id: str = "",
    ) -> None:
        self.offset = offset
        self._first = offset + start
        committed = [item for item in older if item.status is PolicyVersionStatus.COMMITTED]
        self._digests = {item.policy_version: item.weights_digest for item in committed}
        newest: dict[int, str] = {}
        for item in sorted(committed, key=lambda item: item.policy_version):
            step = _step_in(item.source.group_id, training_run_id)
            if step is not None and step <= start:
                newest[step] = item.weights_digest
        self._steps = {digest: step for step, digest in sorted(newest.items())}

    def published(self, step: int, digest: str) -> None:
        """Notes that this trainer has published the weights after ``step``."""
        self._steps[digest] = step

    def step(self, version: int) -> int:
        """Step of a version; -1 stays -1, `UNKNOWN_STEP` = weights that are none of this trainer's."""
        if version >= self._first:
            return version - self.offset
        if version <= 0:
            # 0 is the model on disk, with which every trainer begins.
            return version
        return self._steps.get(self._digests.get(version, ""), UNKNOWN_STEP)

    def steps(self, versions: IntArray) -> IntArray:
        """``step`` for every version of an array."""
        if len(versions) and versions[0] == versions.min() == versions.max():
            # Nearly always: one policy sampled all that is not masked.
            return np.full(len(versions), self.step(int(versions[0])), dtype=np.int64)
        found, places = np.unique(versions, return_inverse=True)
        return np.array([self.step(int(version)) for version in found], dtype=np.int64)[places]
