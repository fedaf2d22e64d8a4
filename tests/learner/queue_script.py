"""What the local queue of rows answers; one JSON object on the last line."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import NonTensorStack, TensorDict
from transfer_queue import KVBatchMeta
from verl.protocol import BatchData, DataProtoFuture
from verl.utils import tensordict_utils
from verl.utils.tensordict_utils import (
    assign_non_tensor_data,
    get_tensordict,
    nested_tensor_from_tensor_list,
)

from agl_grpc.learner.batch.rows import queue_rows
from agl_grpc.learner.rollouts.groups import FinishedRollout, GroupRequest, Row
from agl_grpc.learner.verl.local_queue import LocalQueue, put_rows, row_queue, texts
from agl_grpc.learner.verl.ray_runtime import local_ray
from agl_grpc.learner.verl.shipping import Parcel

LENGTHS = (3, 1, 2, 2)


def _fill(queue: LocalQueue | None) -> list[str]:
    """One group of rollouts of one row each; keys of the rows."""
    request = GroupRequest("g.s0", 0, {}, len(LENGTHS), 1)
    entries = []
    for number, length in enumerate(LENGTHS):
        ids = np.arange(length) + 10 * number
        ones = np.ones(length, dtype=np.int64)
        row = Row(np.array([1, 2]), ids, ones, np.full(length, -0.5, dtype=np.float32), 0 * ones)
        rollout = FinishedRollout(request.rollout_id(number), request.uid, float(number), (row,))
        entries += queue_rows(request, number, rollout, "source")
    put_rows(queue, entries, "train")
    return [entry.key for entry in entries]


def _plain(data: TensorDict) -> dict[str, Any]:
    """Every field as lists, and how its column is held."""
    found: dict[str, Any] = {}
    for name in sorted(data.keys()):
        column = data.get(name)
        if isinstance(column, torch.Tensor):
            found[name] = [
                "jagged" if column.is_nested else "dense",
                [row.tolist() for row in column.unbind()],
            ]
        else:
            found[name] = [type(column).__name__, column.tolist()]
    return found


def _column(*rows: list[float]) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def _refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def _through(enable: bool) -> dict[str, Any]:
    """What a phase puts and the next one takes, by the calls that verl makes, of either queue."""
    section = {"enable": enable, "backend": {"SimpleStorage": {"num_data_storage_units": 1}}}
    with row_queue(OmegaConf.create({"transfer_queue": section})) as queue:
        keys = _fill(queue)
        turned = keys[::-1]
        first = tq.kv_batch_get(keys=turned, partition_id="train")
        values = [[float(place)] * length for place, length in enumerate(LENGTHS[::-1])]
        fields = TensorDict({"advantages": _column(*values), "count": torch.arange(4)}, batch_size=[4])
        put = tq.kv_batch_put(keys=turned, partition_id="train", fields=fields)
        tq.kv_batch_put(
            keys=keys[:1],
            partition_id="train",
            fields=TensorDict({"advantages": _column([9.0, 9.0, 9.0])}, batch_size=[1]),
        )
        wanted = ["advantages", "count", "uid", "values"]
        second = tq.kv_batch_get(keys=turned, partition_id="train", select_fields=wanted)
        answer = {
            "first": _plain(first),
            "second": _plain(second),
            "texts": texts(queue, turned, "train", "rollout_id", "uid"),
            "tags": put.tags,
            "listed": tq.kv_list()["train"],
        }
        tq.kv_clear(keys=keys[:2], partition_id="train")
        return {**answer, "left": sorted(tq.kv_list("train")["train"])}


def _to_workers() -> dict[str, Any]:
    """What worker groups get of a batch, and where it goes what they compute."""
    queue = LocalQueue()
    keys = _fill(queue)
    batch = KVBatchMeta(partition_id="train", keys=keys, tags=[{} for _ in keys])
    batch.extra_info["temperature"] = 0.5
    seen: list[Any] = []

    def ranks(data: Any, count: int) -> list[TensorDict]:
        # As Ray carries them.
        parts = [ray.get(ray.put(part)) for part in BatchData(data).chunk(count)]
        seen.append([_plain(part.exclude("temperature")) | {"at": part["temperature"]} for part in parts])
        return parts

    def compute(data: Any) -> TensorDict:
        lengths = [len(row) for part in ranks(data, 2) for row in part["input_ids"].unbind()]
        return get_tensordict({"log_probs": _column(*([0.25] * n for n in lengths))}, {"metrics": {}})

    def infer(data: Any) -> DataProtoFuture:
        return DataProtoFuture(collect_fn=None, futures=[ray.put(compute(data))])

    def update(data: Any) -> TensorDict:
        ranks(data, 4)
        return get_tensordict({}, {"metrics": {"loss": 1.0}})

    group = SimpleNamespace(world_size=2, compute_log_prob=compute, infer_batch=infer, update_actor=update)
    queue.bridge([group, group])
    computed = group.compute_log_prob(batch)
    logprobs = queue.kv_batch_get(keys, "train", "log_probs")
    waited = group.infer_batch(batch).get()
    return {
        "seen": seen[0],
        "same_batch": computed is batch,
        "log_probs": _plain(logprobs)["log_probs"],
        "waited": _plain(waited.select("log_probs"))["log_probs"],
        "metrics": group.update_actor(batch)["metrics"],
        "uneven": _refused(lambda: group.update_actor(batch.select_keys(keys[:3]))),
    }


def _shipped() -> dict[str, Any]:
    """Columns of every kind before and after their way, and whether those that arrive may be written to."""
    positions = [torch.arange(3 * length).reshape(3, length) for length in LENGTHS]
    sent = TensorDict(
        {
            "dense": torch.arange(8, dtype=torch.float32).reshape(4, 2).to(torch.bfloat16),
            "jagged": _column([0.5], [], [1.0, 2.0], [3.0]),
            "gaps": torch.nested.narrow(
                torch.arange(8.0).reshape(4, 2),
                1,
                torch.zeros(4).long(),
                torch.ones(4).long(),
                layout=torch.jagged,
            ),
            "positions": nested_tensor_from_tensor_list(positions, ragged_idx=2),
            "images": NonTensorStack({"a": 1}, {}, {"b": [2]}, {}),
        },
        batch_size=[4],
    )
    assign_non_tensor_data(sent, "kwargs", {"shuffle": False})
    came = ray.get(ray.put(Parcel(sent)))
    came["dense"] += 0
    index_select_tensor_dict = tensordict_utils.index_select_tensor_dict
    turned = index_select_tensor_dict(came, torch.tensor([3, 2, 1, 0]))
    return {
        "sent": _plain(sent.exclude("kwargs")),
        "came": _plain(came.exclude("kwargs")),
        "kwargs": came["kwargs"],
        "padded": list(came.select("jagged").to_padded_tensor()["jagged"].shape),
        "types": [str(came["dense"].dtype), came["positions"].dim()],
        "all_rows": _plain(index_select_tensor_dict(came, torch.arange(4)).exclude("kwargs")),
        "turned": [row.tolist() for row in turned["jagged"].unbind()],
    }


def _errors() -> list[str]:
    queue = LocalQueue()
    keys = _fill(queue)
    queue.kv_batch_put(keys[:1], "train", TensorDict({"values": torch.zeros(1)}, batch_size=[1]))
    return [
        _refused(lambda: queue.kv_batch_get([*keys, "g.s9_0_0"], "train")),
        _refused(lambda: queue.kv_batch_get(keys, "train", ["values"])),
        _refused(lambda: queue.kv_batch_put(keys, "train")),
        _refused(lambda: queue.kv_batch_put(keys, "train", TensorDict({}, batch_size=[2]))),
    ]


if __name__ == "__main__":
    with local_ray(device="cpu", gpus=0):
        found = {
            "local": _through(False),
            "verls": _through(True),
            "workers": _to_workers(),
            "shipped": _shipped(),
            "errors": _errors(),
        }
    print("\n" + json.dumps(found))
