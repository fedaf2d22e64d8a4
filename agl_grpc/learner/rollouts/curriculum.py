"""The curriculum of a training run: which task comes next, by what the store and this run know of tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agl_grpc.client import StoreClient
from agl_grpc.client.filters import rollout_filter
from agl_grpc.dataset import Curriculum, CurriculumRules, DatasetError, task_key
from agl_grpc.dataset.curriculum import Before, start_from
from agl_grpc.learner.checkpoints.checkpoint import ORDER_FILE
from agl_grpc.learner.errors import ConfigError
from agl_grpc.learner.store_link import StoreLink
from agl_grpc.model.enums import RolloutMode
from agl_grpc.model.reward import PRIMARY

if TYPE_CHECKING:
    from agl_grpc.learner.verl.manager import RolloutManager

_AT_ONCE = 500

Settled = Mapping[str, tuple[int, int]]


class TaskOrder:
    """Gives the next tasks, and counts groups as they are settled: trained, or given up.

    Groups are counted when the trainer settles them, in the order in which they were asked for, and not when
    they arrive: a resumed run that trains the same batches again chooses the same tasks again.
    """

    def __init__(self, rules: CurriculumRules, size: int, seed: int, manager: RolloutManager) -> None:
        self.curriculum = Curriculum(size, rules, seed)
        self._manager = manager
        self._before: Before = {}

    def take(self) -> int:
        """Dataset index of the next task."""
        return self.curriculum.take()

    def settle(self, groups: Settled, trained: bool) -> None:
        """Counts the rewards of groups: place and dataset index by uid."""
        before = self.curriculum.look(index for _, index in groups.values())
        for uid, (_, index) in sorted(groups.items(), key=lambda item: item[1]):
            self.curriculum.observe(index, self._manager.take_rewards(uid))
        if trained:
            self._before = {**before, **self._before}

    def begin_step(self) -> None:
        """What was trained before this cannot be put back any more."""
        self._before = {}

    def put_back(self) -> None:
        """The groups that this step would have trained do not count: it failed."""
        self.curriculum.put_back(self._before)
        self._before = {}

    def restore(self, state: bytes) -> None:
        """Goes on from a checkpoint's state; ConfigError when it is of another dataset or seed."""
        try:
            self.curriculum.restore(state)
        except DatasetError as error:
            raise ConfigError(str(error)) from error


class OrderedTasks:
    """The part of a trainer of verl's that asks a `TaskOrder` for the next task, where its hooks make one."""

    hooks: Any
    config: Any
    train_dataset: Any
    replay_buffer: Any
    order: TaskOrder | None = None

    def _init_dataloader(self) -> None:
        super()._init_dataloader()  # type: ignore[misc]  # verl's trainer comes after this class
        if self.hooks.order is not None:
            self.order = self.hooks.order(self.train_dataset)

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()  # type: ignore[misc]  # as above
        if self.order is None or self.config.trainer.resume_mode != "resume_path":
            return
        file = Path(self.config.trainer.resume_from_path) / ORDER_FILE
        if not file.is_file():
            raise ConfigError(
                f"the checkpoint was saved without a curriculum ({file} is missing): begin anew"
            )
        self.order.restore(file.read_bytes())

    def fit(self, agent_loop_manager: RolloutManager) -> None:
        """As the trainer's."""
        if self.order is not None:
            self.replay_buffer.on_settled = self.order.settle
        super().fit(agent_loop_manager)  # type: ignore[misc]  # as above

    def on_step_begin(self) -> None:
        """As the trainer's."""
        if self.order is not None:
            self.order.begin_step()
        super().on_step_begin()  # type: ignore[misc]  # as above


def stored_rewards(link: StoreLink, runs: Iterable[str]) -> dict[bytes, list[float]]:
    """Primary rewards of the training rollouts of some runs (``*`` = all), by the content of their tasks."""
    found: dict[bytes, list[float]] = {}
    for run in runs:
        for key, rewards in link.run(_stored(link.client, run)).items():
            found.setdefault(key, []).extend(rewards)
    return found


async def _stored(client: StoreClient, run: str) -> dict[bytes, list[float]]:
    rollouts = await client.query_rollouts(filter=rollout_filter(run_id=run))
    tried = [each for each in rollouts if each.mode is RolloutMode.TRAIN and each.status.is_terminal]
    found: dict[bytes, list[float]] = {}
    for at in range(0, len(tried), _AT_ONCE):
        some = {each.rollout_id: each for each in tried[at : at + _AT_ONCE]}
        for reward in await client.query_rewards([*some]):
            rollout = some[reward.rollout_id]
            last = reward.attempt_id == rollout.latest_attempt_id
            whole = last and reward.step is None and not reward.target_span_id
            if whole and reward.name == PRIMARY and reward.value is not None:
                found.setdefault(task_key(rollout.input), []).append(reward.value)
    return found


def begin_with(order: TaskOrder, dataset: Any, rewards: Mapping[bytes, list[float]]) -> int:
    """Counts what is known of a dataset's tasks; how many of them are known."""
    if not rewards:
        return 0
    keys = (task_key(dataset.task(index)) for index in range(len(dataset)))
    return start_from(order.curriculum, keys, rewards)
