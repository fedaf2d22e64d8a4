"""Batches on their way to verl's workers: as plain arrays, which Ray carries in shared memory as they are.

Workers import this module with the first batch that they are sent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import NonTensorData, NonTensorStack, TensorDict
from verl.utils import tensordict_utils


class _Column(NamedTuple):
    """A tensor with rows of one length, or (with ``offsets``) a jagged one.

    numpy does not know every type of torch's: ``dtype`` is the tensor's own, the values are its bytes.
    """

    values: NDArray[np.uint8]
    shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: NDArray[np.int64] | None = None
    jagged_dim: int = 1


class Parcel:
    """Rows of a batch, which arrive in another process as the ``TensorDict`` that they are."""

    def __init__(self, rows: TensorDict) -> None:
        self._rows = rows

    def __reduce__(self) -> tuple[Any, ...]:
        columns, stacks, whole = {}, {}, {}
        for name, value in self._rows.items():
            if isinstance(value, torch.Tensor):
                columns[name] = _packed(value)
            elif isinstance(value, NonTensorStack):
                stacks[name] = value.tolist()
            else:
                whole[name] = value.data if isinstance(value, NonTensorData) else value
        return _unpacked, (columns, stacks, whole, len(self._rows))


def _packed(tensor: torch.Tensor) -> _Column:
    if not tensor.is_nested:
        return _Column(_bytes(tensor), tuple(tensor.shape), tensor.dtype)
    if tensor.lengths() is not None:
        # Rows with gaps between them.
        tensor = torch.nested.as_nested_tensor(list(tensor.unbind()), layout=torch.jagged)
    values = tensor.values()
    # The dimension of the tensor that is ragged; verl has some in which it is not the first of a row's.
    dim = int(getattr(tensor, "_ragged_idx", 1))
    return _Column(_bytes(values), tuple(values.shape), values.dtype, tensor.offsets().numpy(), dim)


def _bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return found


def _tensor(column: _Column) -> torch.Tensor:
    # Copied: what Ray shares may not be written to.
    values = torch.from_numpy(np.array(column.values)).view(column.dtype).view(column.shape)
    if column.offsets is None:
        return values
    lengths = np.diff(column.offsets)
    return torch.nested.nested_tensor_from_jagged(
        values,
        torch.from_numpy(np.array(column.offsets)),
        jagged_dim=column.jagged_dim,
        # Left to itself, torch pads rows to the length of all of them together when it is first asked to.
        min_seqlen=int(lengths.min()),
        max_seqlen=int(lengths.max()),
    )


def _unpacked(
    columns: dict[str, _Column], stacks: dict[str, list[Any]], whole: dict[str, Any], size: int
) -> TensorDict:
    rows = TensorDict({name: _tensor(column) for name, column in columns.items()}, batch_size=[size])
    for name, values in stacks.items():
        rows[name] = NonTensorStack(*values)
    for name, value in whole.items():
        tensordict_utils.assign_non_tensor_data(rows, name, value)
    return rows


_select = tensordict_utils.index_select_tensor_dict


def _selected(batch: TensorDict, indices: Any) -> TensorDict:
    """Stands where verl takes the rows of a mini-batch, one by one: all in their order are there already."""
    if len(indices) == len(batch) and torch.equal(torch.as_tensor(indices), torch.arange(len(batch))):
        return batch.copy()
    return _select(batch, indices)


tensordict_utils.index_select_tensor_dict = _selected
