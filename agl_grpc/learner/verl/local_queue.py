"""The rows of batches in the trainer's own memory, where verl has them in processes of its TransferQueue.

verl's trainer puts every column of a batch into the TransferQueue and takes it out again, a controller and a
storage process away each time; its workers take whole rows. Here all rows come from the trainer's process
(the manager puts them), and it reads them between the phases: so they stay in it. Calls of the queue's
key-value interface end in `LocalQueue`, and a worker group is given the tensors that its method works on,
over Ray. ``transfer_queue.enable=True`` brings verl's own back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from unittest.mock import patch

import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import NonTensorStack, TensorDict
from transfer_queue import BatchMeta, KVBatchMeta
from verl.protocol import DataProtoFuture
from verl.utils import tensordict_utils
from verl.utils.tensordict_utils import concat_tensordict, list_of_dict_to_tensordict

from agl_grpc.learner.batch.rows import QueueRow
from agl_grpc.learner.verl.shipping import Parcel

# verl's worker methods that take a batch, and put what they compute beside it.
_METHODS = (
    "compute_log_prob",
    "compute_ref_log_prob",
    "infer_batch",
    "train_batch",
    "train_mini_batch",
    "update_actor",
)
# What verl's engines take of a row besides tensors, where it holds anything.
_MULTI_MODAL = "multi_modal_inputs"
# Of a row's tensors those that only the trainer's process reads; what verl's engines computed is for it too.
_NOT_SENT = frozenset({"policy_versions", "rm_scores", "rollout_log_probs", "log_probs", "entropy"})


class _Tag(dict[str, Any]):
    """A row's tag, whose values are scalars: verl copies tags deeply with every put."""

    def __deepcopy__(self, _memo: Any) -> _Tag:
        return _Tag(self)


class _Block:
    """A column as it was put; its rows are taken apart when one of them is asked for."""

    def __init__(self, column: Any) -> None:
        self.column = column

    @cached_property
    def rows(self) -> list[Any]:
        """Its rows."""
        return list(self.column.unbind() if self.is_tensor else self.column.tolist())

    @property
    def is_tensor(self) -> bool:
        """Whether rows are tensors."""
        return isinstance(self.column, torch.Tensor)


@dataclass(frozen=True)
class _Cell:
    """A row of a block."""

    block: _Block
    place: int


@dataclass
class _Row:
    tag: _Tag = field(default_factory=_Tag)
    # Values, or cells of what was put as columns.
    fields: dict[str, Any] = field(default_factory=dict)

    def value(self, name: str) -> Any:
        """A field's value."""
        found = self.fields[name]
        return found.block.rows[found.place] if isinstance(found, _Cell) else found

    def is_tensor(self, name: str) -> bool:
        """Whether a field's value is a tensor."""
        found = self.fields[name]
        return found.block.is_tensor if isinstance(found, _Cell) else isinstance(found, torch.Tensor)


@dataclass
class _Partition:
    rows: dict[str, _Row] = field(default_factory=dict)
    # By field, the column that was put or read last and the keys of its rows: what one phase puts for a
    # batch, the next takes as it is.
    columns: dict[str, tuple[list[str], Any]] = field(default_factory=dict)


class LocalQueue:
    """The TransferQueue's key-value interface over this process's memory, as far as verl's trainer uses it.

    Columns come back as the TransferQueue gives them: tensors jagged, scalars stacked, other values as a
    ``NonTensorStack``. They share memory with what was put: they are not to be written to.
    """

    def __init__(self) -> None:
        self._partitions: dict[str, _Partition] = {}

    def kv_batch_put(
        self,
        keys: list[str],
        partition_id: str,
        fields: TensorDict | None = None,
        tags: list[dict[str, Any]] | None = None,
    ) -> KVBatchMeta:
        """Adds columns to rows, and sets their tags; new keys are new rows.

        Raises:
            ValueError: a column or the tags are not as many as the keys, or neither is given.
        """
        if fields is None and tags is None:
            raise ValueError("a put into the queue needs fields or tags")
        if fields is not None and fields.batch_size[0] != len(keys):
            raise ValueError(f"{len(keys)} keys were put with {fields.batch_size[0]} rows of fields")
        partition = self._partitions.setdefault(partition_id, _Partition())
        rows = [partition.rows.setdefault(key, _Row()) for key in keys]
        if tags is not None:
            for row, tag in zip(rows, tags, strict=True):
                row.tag = _Tag(tag)
        for name, column in fields.items() if fields is not None else ():
            partition.columns[name] = (list(keys), _as_read(column))
            block = _Block(column)
            for place, row in enumerate(rows):
                row.fields[name] = _Cell(block, place)
        return KVBatchMeta(partition_id=partition_id, keys=list(keys), tags=[row.tag for row in rows])

    def put_rows(self, rows: Sequence[QueueRow], partition_id: str) -> None:
        """Adds whole rows, which are new."""
        partition = self._partitions.setdefault(partition_id, _Partition())
        for row in rows:
            partition.rows[row.key] = _Row(_Tag(row.tag), dict(row.fields))

    def values(self, keys: Iterable[str], partition_id: str, name: str) -> list[Any]:
        """One field of rows as it was put, row by row."""
        rows = self._partitions[partition_id].rows
        return [rows[key].value(name) for key in keys]

    def kv_batch_get(
        self, keys: list[str] | str, partition_id: str, select_fields: list[str] | str | None = None
    ) -> TensorDict:
        """Columns of rows: those that were asked for (None = all) and that exist.

        Raises:
            ValueError: a key is unknown, or a field is there for some of the rows only.
        """
        keys = [keys] if isinstance(keys, str) else keys
        wanted = [select_fields] if isinstance(select_fields, str) else select_fields
        partition = self._partitions.get(partition_id, _Partition())
        unknown = [key for key in keys if key not in partition.rows]
        if unknown or not keys:
            raise ValueError(f"keys are not in partition {partition_id!r}: {unknown[:5]}")
        rows = [partition.rows[key] for key in keys]
        known = dict.fromkeys(name for row in rows for name in row.fields)
        names = [name for name in (known if wanted is None else wanted) if name in known]
        columns = {name: _column(partition, keys, rows, name) for name in names}
        return TensorDict(columns, batch_size=[len(keys)])

    def kv_list(self, partition_id: str | None = None) -> dict[str, dict[str, dict[str, Any]]]:
        """Tags of all keys, by partition."""
        chosen = self._partitions if partition_id is None else {partition_id}
        return {
            name: {key: dict(row.tag) for key, row in self._partitions[name].rows.items()}
            for name in chosen
            if name in self._partitions
        }

    def kv_clear(self, keys: list[str] | str, partition_id: str) -> None:
        """Forgets rows; unknown keys are none."""
        partition = self._partitions.get(partition_id, _Partition())
        gone = {key for key in ([keys] if isinstance(keys, str) else keys) if partition.rows.pop(key, None)}
        for name, (held, _) in list(partition.columns.items()):
            if not gone.isdisjoint(held):
                del partition.columns[name]

    def bridge(self, groups: Iterable[Any]) -> None:
        """Lets verl's worker groups take rows of this queue where a method is given a ``KVBatchMeta``."""
        for group in {id(group): group for group in groups}.values():
            for name in _METHODS:
                if hasattr(group, name):
                    setattr(group, name, self._bridged(getattr(group, name), group.world_size))

    def _bridged(self, method: Callable[[BatchMeta], Any], size: int) -> Callable[[KVBatchMeta], Any]:
        ours: dict[str, Any] = {"verl.utils.tensordict_utils.concat_tensordict": _joined}
        if size == 1:
            ours["verl.utils.ray_utils.parallel_put"] = _as_arguments

        def called(batch: KVBatchMeta) -> Any:
            with ExitStack() as stack:
                for name, instead in ours.items():
                    stack.enter_context(patch(name, instead))
                answer = method(_Parts(lambda chunks: self._parts(batch, chunks)))
            output = answer.get() if isinstance(answer, DataProtoFuture) else answer
            computed = [name for name, value in output.items() if isinstance(value, torch.Tensor)]
            if not computed:
                return answer
            self.kv_batch_put(batch.keys, batch.partition_id, fields=output.select(*computed))
            # A future stays one, for those who wait for it; it has come.
            return answer if isinstance(answer, DataProtoFuture) else batch

        return called

    def _parts(self, batch: KVBatchMeta, chunks: int) -> list[Parcel]:
        """What each of the ranks gets of a batch: its share of the tensors, and what was said of the whole.

        Raises:
            ValueError: the rows cannot be shared out evenly.
        """
        if len(batch.keys) % chunks:
            raise ValueError(f"{len(batch.keys)} rows cannot be shared by {chunks} ranks")
        share = len(batch.keys) // chunks
        names = self._sent(batch)
        parts = []
        for start in range(0, len(batch.keys), share):
            data = self.kv_batch_get(batch.keys[start : start + share], batch.partition_id, names)
            for name, value in batch.extra_info.items():
                tensordict_utils.assign_non_tensor_data(data, name, value)
            parts.append(Parcel(data))
        return parts

    def _sent(self, batch: KVBatchMeta) -> list[str]:
        """The fields of rows that workers get."""
        rows = self._partitions[batch.partition_id].rows
        chosen = [rows[key] for key in batch.keys]
        # Rows that verl pads with have columns more than others.
        names = [
            name
            for name in chosen[0].fields
            if chosen[0].is_tensor(name)
            and name not in _NOT_SENT
            and all(name in each.fields for each in chosen)
        ]
        if any(_MULTI_MODAL in each.fields and each.value(_MULTI_MODAL) for each in chosen):
            names.append(_MULTI_MODAL)
        return names


class _Parts(BatchMeta):  # type: ignore[misc]  # TransferQueue is untyped
    """A batch as verl's dispatch takes it: asked for as many parts as there are ranks, it answers parcels."""

    def __init__(self, parts: Callable[[int], list[Parcel]]) -> None:
        super().__init__(global_indexes=[], partition_ids=[])
        self._parts = parts

    def chunk(self, chunks: int) -> list[Parcel]:
        return self._parts(chunks)


def _joined(parts: list[TensorDict]) -> TensorDict:
    """Stands where verl puts the answers of ranks together: one rank's is the whole."""
    return parts[0] if len(parts) == 1 else concat_tensordict(parts)


def _as_arguments(parts: list[Any], **_options: Any) -> list[Any]:
    """Stands where verl puts parts into Ray's store first, for its ranks to share: a small one comes with
    the call to the only one.
    """
    return parts


def _as_read(column: Any) -> Any:
    """A column as reading its rows would make it; what is not jagged yet is made when it is read."""
    jagged = isinstance(column, torch.Tensor) and column.is_nested and column.layout is torch.jagged
    return column if jagged else None


def _column(partition: _Partition, keys: list[str], rows: list[_Row], name: str) -> Any:
    held, column = partition.columns.get(name, ([], None))
    if column is not None and held == keys:
        return column
    if any(name not in row.fields for row in rows):
        raise ValueError(f"field {name!r} is not there for all of {len(rows)} rows")
    column = _packed([row.value(name) for row in rows])
    if len(keys) >= len(held):
        # A part of a batch, as a rank gets it, is not worth the whole.
        partition.columns[name] = (list(keys), column)
    return column


def _packed(values: list[Any]) -> torch.Tensor | NonTensorStack:
    if not all(isinstance(value, torch.Tensor) for value in values):
        return NonTensorStack(*values)
    if all(value.dim() == 0 for value in values):
        return torch.stack(values)
    return torch.nested.as_nested_tensor(values, layout=torch.jagged)


def put_rows(queue: LocalQueue | None, rows: Sequence[QueueRow], partition_id: str) -> None:
    """Puts whole rows into this process's queue, or (None) into verl's TransferQueue."""
    if queue is not None:
        queue.put_rows(rows, partition_id)
        return
    tq.kv_batch_put(
        keys=[row.key for row in rows],
        fields=list_of_dict_to_tensordict([row.fields for row in rows]),
        tags=[row.tag for row in rows],
        partition_id=partition_id,
    )


def texts(queue: LocalQueue | None, keys: list[str], partition_id: str, *names: str) -> list[list[str]]:
    """Text fields of rows, each as a list in the order of the keys."""
    if queue is not None:
        return [queue.values(keys, partition_id, name) for name in names]
    data = tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=list(names))
    return [[str(getattr(item, "data", item)) for item in data[name]] for name in names]


@contextmanager
def row_queue(config: DictConfig) -> Iterator[LocalQueue | None]:
    """Where the rows of a run are: in this process, or in verl's TransferQueue if the configuration says so.

    Args:
        config: verl's configuration.

    Yields:
        The queue whose rows worker groups are to be given; None = they take them out of the TransferQueue.
    """
    if config.transfer_queue.enable:
        tq.init(config.transfer_queue)
        try:
            yield None
        finally:
            tq.close()
        return
    queue = LocalQueue()
    calls = {name: getattr(queue, name) for name in ("kv_batch_put", "kv_batch_get", "kv_list", "kv_clear")}
    # verl calls these by the module's name.
    with patch.multiple(tq, **calls):
        yield queue
