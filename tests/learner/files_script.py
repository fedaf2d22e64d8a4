"""Writes samples as a torch file, reads them back, prints their digest; in the learner environment."""

from __future__ import annotations

import sys
from pathlib import Path

from agl_grpc.sample import Sample, build_attempt, pack, read_columns, token_digest
from agl_grpc.sample.export import read_samples, write_samples
from tests.sample.calls import call, record


def rows() -> list[Sample]:
    """Two rows, one of two turns."""
    spans = [call([1, 2], [3, 4], at=1), call([1, 2, 3, 4, 5], [6], at=2), call([9], [8], at=3)]
    return build_attempt(record(*spans)).rows


def main(path: Path) -> str:
    """The digest of what comes back."""
    import torch

    assert write_samples(path, rows(), "pt") == 2
    columns = torch.load(path, weights_only=True)
    first = slice(*columns["row_offsets"][:2].tolist())
    assert columns["input_ids"][first].tolist() == [1, 2, 3, 4, 5, 6]
    assert columns["loss_mask"][first].tolist() == [0, 0, 1, 1, 0, 1]
    assert columns["logprobs"].dtype is torch.float32
    _same_as_a_tensor_dict()
    return token_digest(read_samples(path))


def _same_as_a_tensor_dict() -> None:
    """Packed columns as jagged tensors: the rows' tokens, and one number a row."""
    from agl_grpc.learner.batch.columns import tensor_dict

    batch = tensor_dict(read_columns(pack(rows())))
    for place, row in enumerate(rows()):
        whole = [*row.prompt_ids.tolist(), *row.response_ids.tolist()]
        assert batch["input_ids"][place].tolist() == whole
        assert batch["loss_mask"][place].tolist()[len(row.prompt_ids) :] == row.response_mask.tolist()
        assert int(batch["prompt_lengths"][place]) == len(row.prompt_ids)
        assert float(batch["rewards"][place]) == row.reward


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
