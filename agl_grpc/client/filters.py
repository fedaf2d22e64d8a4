"""Conditions by which rollouts are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agl_grpc.model.enums import FailureKind, FilterLogic, RolloutMode, RolloutStatus
from agl_grpc.model.times import to_timestamp
from agl_grpc.model.value import to_labels
from agl_grpc.v1 import rollout_pb2


def rollout_filter(
    *,
    run_id: str = "default",
    status_in: Sequence[RolloutStatus | str] | None = None,
    rollout_id_in: Sequence[str] | None = None,
    rollout_id_contains: str | None = None,
    group_id_in: Sequence[str] | None = None,
    queue_in: Sequence[str] | None = None,
    mode_in: Sequence[RolloutMode | str] | None = None,
    labels: Mapping[str, str] | None = None,
    failure_kind_in: Sequence[FailureKind | str] | None = None,
    create_time_before: float | None = None,
    create_time_after: float | None = None,
    end_time_before: float | None = None,
    end_time_after: float | None = None,
    logic: FilterLogic | str = FilterLogic.AND,
) -> rollout_pb2.RolloutFilter:
    """A choice of rollouts of a run (``*`` = all runs); conditions that are not given match everything.

    Times are seconds since the epoch. ``logic`` says whether all conditions must hold or one is enough.
    """
    return rollout_pb2.RolloutFilter(
        run_id=run_id,
        status_in=[RolloutStatus.parse(status).number for status in status_in or ()],
        rollout_id_in=rollout_id_in or (),
        rollout_id_contains=rollout_id_contains or "",
        group_id_in=group_id_in or (),
        queue_in=queue_in or (),
        mode_in=[RolloutMode.parse(mode).number for mode in mode_in or ()],
        labels=to_labels(labels),
        failure_kind_in=[FailureKind.parse(kind).number for kind in failure_kind_in or ()],
        create_time_before=to_timestamp(create_time_before),
        create_time_after=to_timestamp(create_time_after),
        end_time_before=to_timestamp(end_time_before),
        end_time_after=to_timestamp(end_time_after),
        logic=FilterLogic.parse(logic).number,
    )


def excludes_everything(
    *allowed: Sequence[object] | None, logic: FilterLogic | str, others: bool = False
) -> bool:
    """Whether lists of allowed values match nothing at all: an empty list allows nothing.

    The contract cannot say "none of these", so the client answers such a query by itself. ``others`` says
    whether there are conditions beside the lists.
    """
    given = [values for values in allowed if values is not None]
    empty = [values for values in given if not values]
    if FilterLogic.parse(logic) is FilterLogic.AND:
        return bool(empty)
    return bool(given) and len(empty) == len(given) and not others
