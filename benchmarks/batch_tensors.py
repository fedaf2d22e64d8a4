"""Packed columns to torch: as a TensorDict, and through verl's TransferQueue; in the learner environment.

Arguments: a file of RawSampleColumns messages, each with its length before it, and how often to repeat them.
Prints one JSON object: tokens, and seconds of CPU (of this process, best of the repeats) for each way.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agl_grpc.learner.batch.columns import tensor_dict
from agl_grpc.model import raw
from agl_grpc.sample.wire import read_columns


def messages(path: Path) -> Iterator[bytes]:
    """The messages of a file."""
    data = path.read_bytes()
    place = 0
    while place < len(data):
        (length,) = struct.unpack_from("<I", data, place)
        yield data[place + 4 : place + 4 + length]
        place += 4 + length


def best(work: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Fewest seconds of CPU, and of wall clock."""
    cpu, wall = [], []
    for _ in range(repeats):
        start, begun = time.process_time(), time.perf_counter()
        work()
        cpu.append(time.process_time() - start)
        wall.append(time.perf_counter() - begun)
    return min(cpu), min(wall)


def main(path: Path, repeats: int) -> dict[str, float]:
    """Measures both ways."""
    packed = list(messages(path))

    def convert() -> list[Any]:
        return [tensor_dict(read_columns(raw.RawSampleColumns.FromString(data))) for data in packed]

    batches = convert()
    tokens = sum(int(batch["input_ids"].values().numel()) for batch in batches)
    cpu, _ = best(convert, repeats)
    return {"tokens": tokens, "tensor_dict": cpu, **_through_queue(batches, repeats)}


def _through_queue(batches: list[Any], repeats: int) -> dict[str, float]:
    from omegaconf import OmegaConf

    from agl_grpc.learner.verl.config import compose
    from agl_grpc.learner.verl.ray_runtime import local_ray

    with local_ray(device="cpu", gpus=1):
        import transfer_queue as tq

        tq.init(OmegaConf.create(compose({}, device="cpu", fixed={}).transfer_queue))
        try:
            rounds = iter(range(10 * repeats))

            def put() -> None:
                number = next(rounds)
                for place, batch in enumerate(batches):
                    keys = [f"r{number}.{place}_{row}_0" for row in range(len(batch))]
                    tq.kv_batch_put(keys=keys, fields=batch, partition_id="bench", tags=[{} for _ in keys])
                    tq.kv_batch_get(keys=keys, partition_id="bench")
                    tq.kv_clear(keys=keys, partition_id="bench")

            cpu, wall = best(put, max(1, repeats // 2))
        finally:
            tq.close()
    return {"queue": cpu, "queue_wall": wall}


if __name__ == "__main__":
    print("\n" + json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
