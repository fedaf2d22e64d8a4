"""Cases of weight transfer, sender and receivers in one process that has torch; `test_transfer` runs them.

Each `case_*` function gets a sender with small buckets.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from agl_grpc.weights import ReceiverState, ReceiverStatus, TransferError, TransferReport
from agl_grpc.weights import group as groups
from agl_grpc.weights.adapters import adapter_set, is_adapter, merged
from agl_grpc.weights.digest import combined_digest, digest_tensors, segment_digests
from agl_grpc.weights.kept import kept_path
from agl_grpc.weights.receiver import WeightReceiver
from agl_grpc.weights.sender import WeightSender, pack_segments

Named = list[tuple[str, torch.Tensor]]


@contextlib.contextmanager
def refused(part: str) -> Iterator[None]:
    """The body must raise TransferError with `part` in its one line."""
    try:
        yield
    except TransferError as error:
        message = str(error)
    else:
        message = "nothing was refused"
    assert part in message, f"{part!r} is not in {message!r}"
    assert "\n" not in message


def tensors(seed: int) -> Named:
    generator = torch.Generator().manual_seed(seed)
    return [
        ("a.weight", torch.randn(33, 17, generator=generator)),
        ("b.weight", torch.randn(5, 3, generator=generator).to(torch.bfloat16)),
        ("scalar", torch.tensor(3.5)),
        ("empty", torch.empty(0, 4)),
        ("transposed", torch.randn(8, 6, generator=generator).t()),
        ("big", torch.randint(0, 255, (5000,), generator=generator, dtype=torch.uint8)),
        ("int", torch.arange(9)),
    ]


def settle(receiver: WeightReceiver, limit: float = 20.0) -> ReceiverStatus:
    until = time.monotonic() + limit
    while (status := receiver.status()).state is ReceiverState.RECEIVING:
        assert time.monotonic() < until, f"still receiving: {status}"
        time.sleep(0.005)
    return status


class Join(Protocol):
    def __call__(self, nudge: Callable[[], None] = lambda: None) -> TransferReport: ...


def in_thread(call: Callable[[], TransferReport]) -> Join:
    box: list[TransferReport | BaseException] = []

    def body() -> None:
        try:
            box.append(call())
        except BaseException as error:
            box.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()

    def join(nudge: Callable[[], None] = lambda: None) -> TransferReport:
        until = time.monotonic() + 30
        while thread.is_alive() and time.monotonic() < until:
            nudge()
            thread.join(0.01)
        assert box, "the sender did not return"
        if isinstance(box[0], BaseException):
            raise box[0]
        return box[0]

    return join


def case_all_bytes_arrive_at_two_receivers_and_the_group_is_reused(sender: WeightSender) -> None:
    receivers = [WeightReceiver(f"engine/{i}") for i in range(2)]
    groups = []
    for step in range(3):
        sent = tensors(step)
        join = in_thread(lambda sent=sent, step=step: sender.send(f"t{step}", sent, receivers=2, timeout=30))
        for receiver in receivers:
            receiver.prepare(f"t{step}", sender.endpoint, 30)
        report = join()
        assert report.digest == digest_tensors(sent)
        for receiver in receivers:
            status = settle(receiver)
            assert (status.state, status.digest, status.error) == (ReceiverState.RECEIVED, report.digest, "")
            got = receiver.staged(f"t{step}")
            assert [name for name, _ in got] == [name for name, _ in sent]
            for (name, have), (_, want) in zip(got, sent, strict=True):
                assert have.dtype == want.dtype, name
                assert torch.equal(have, want), name
        groups.append(sender._group_number)
    assert groups == [1, 1, 1]


def case_a_changed_set_of_receivers_gets_a_new_group(sender: WeightSender) -> None:
    first = WeightReceiver("engine/0")
    join = in_thread(lambda: sender.send("t1", tensors(1), receivers=1, timeout=30))
    first.prepare("t1", sender.endpoint, 30)
    join()
    assert settle(first).state is ReceiverState.RECEIVED
    second = WeightReceiver("engine/1")
    join = in_thread(lambda: sender.send("t2", tensors(2), receivers=2, timeout=30))
    first.prepare("t2", sender.endpoint, 30)
    second.prepare("t2", sender.endpoint, 30)
    join()
    assert settle(first).digest == settle(second).digest == digest_tensors(tensors(2))


def case_a_flipped_byte_is_named_and_nothing_is_staged(sender: WeightSender) -> None:
    honest: Callable[..., None] = groups.broadcast

    def flip(group: Any, tensor: torch.Tensor, deadline: groups.Deadline) -> None:
        if threading.current_thread().name != "agl-weight-receiver":
            tensor = tensor.clone()
            tensor[64] ^= 1
        honest(group, tensor, deadline)

    groups.broadcast = flip
    try:
        one_damaged_transfer(sender)
    finally:
        groups.broadcast = honest


def one_damaged_transfer(sender: WeightSender) -> None:
    receiver = WeightReceiver("engine/0")
    join = in_thread(lambda: sender.send("t1", [("only", torch.ones(300))], receivers=1, timeout=30))
    receiver.prepare("t1", sender.endpoint, 30)
    join()
    status = settle(receiver)
    assert status.state is ReceiverState.FAILED
    assert status.error == "digest mismatch: tensor only differs from what was sent"
    with refused("t1 is not staged here"):
        receiver.staged("t1")


def case_a_missing_receiver_ends_at_the_deadline_on_both_sides(sender: WeightSender) -> None:
    receiver = WeightReceiver("engine/0")
    join = in_thread(lambda: sender.send("t1", tensors(1), receivers=2, timeout=1.0))
    receiver.prepare("t1", sender.endpoint, 1.0)
    with refused("deadline passed while waiting for 2 receivers to join"):
        join()
    assert settle(receiver).state is ReceiverState.FAILED
    # The next transfer of the same pair works.
    join = in_thread(lambda: sender.send("t2", tensors(2), receivers=1, timeout=30))
    receiver.prepare("t2", sender.endpoint, 30)
    assert join().digest == settle(receiver).digest


def case_abort_frees_the_staging_memory_and_cancel_ends_the_sender(sender: WeightSender) -> None:
    receiver = WeightReceiver("engine/0")
    join = in_thread(lambda: sender.send("t1", tensors(1), receivers=2, timeout=60))
    receiver.prepare("t1", sender.endpoint, 60)
    receiver.abort("a newer version")
    assert receiver.status().state is ReceiverState.IDLE
    with refused("the learner stops"):
        join(lambda: sender.cancel("the learner stops"))


def case_a_sender_that_is_not_there_is_one_line(_: WeightSender) -> None:
    receiver = WeightReceiver("engine/0")
    receiver.prepare("t1", "127.0.0.1:1", 2.0)
    status = settle(receiver)
    assert status.state is ReceiverState.FAILED
    assert "cannot reach the sender at 127.0.0.1:1" in status.error
    assert "\n" not in status.error


def case_the_digest_does_not_depend_on_the_bucket_size(_: WeightSender) -> None:
    sizes = [64, 1000, 1 << 20]
    digests = set()
    for size in sizes:
        digests.add(
            combined_digest(
                d
                for header, memory in pack_segments(tensors(5), size)
                for d in segment_digests(memory, header.entries)
            )
        )
    assert digests == {digest_tensors(tensors(5))}


def case_kept_weights_come_back_and_damaged_ones_do_not(sender: WeightSender) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        receiver = WeightReceiver("0", folder)
        digests = []
        for number in (1, 2):
            receiver.prepare(f"k{number}", sender.endpoint, 20)
            sender.send(f"k{number}", tensors(number), receivers=1, timeout=20)
            digests.append(settle(receiver).digest)
            wait_for(kept_path(folder, digests[-1]).exists)
            if number == 1:
                receiver.loaded()
        # Version 2 was staged and is given up: version 1, which serves, stays.
        receiver.abort("given up")
        assert [path.name for path in folder.iterdir()] == [kept_path(folder, digests[0]).name]
        again = WeightReceiver("0", folder)
        again.restore("back", folder, digests[0])
        assert again.status().digest == digest_tensors(again.staged("back")) == digests[0]
        assert [name for name, _ in again.staged("back")] == [name for name, _ in tensors(1)]
        with refused("cannot be read"):
            again.restore("other", folder, digests[1])
        path = kept_path(folder, digests[0])
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with refused("are damaged"):
            again.restore("flipped", folder, digests[0])
        path.write_bytes(whole[:-1])
        with refused("end in the middle of int"):
            again.restore("short", folder, digests[0])


def case_adapters_are_added_to_their_base_and_others_refused(_: WeightSender) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {
        name: torch.randn(6, 4, generator=generator, dtype=torch.bfloat16)
        for name in ("layers.0.q.weight", "layers.0.norm.weight", "head.weight")
    }
    a, b = torch.randn(2, 4, generator=generator), torch.randn(6, 2, generator=generator)
    stem = "base_model.model.layers.0.q"
    adapter = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    head = {"base_model.model.head.weight": torch.ones(6, 4)}

    def served(parts: dict[str, torch.Tensor], **config: object) -> dict[str, torch.Tensor]:
        settings = {"r": 2, "lora_alpha": 8, **config}
        return dict(merged(base.items(), adapter_set(parts.items(), settings)))

    for settings, scaling in (({}, 4.0), ({"use_rslora": True}, 8 / 2**0.5)):
        found = served(adapter | head, **settings)
        expected = (base["layers.0.q.weight"].float() + scaling * b @ a).bfloat16()
        assert torch.equal(found["layers.0.q.weight"], expected)
        assert torch.equal(found["layers.0.norm.weight"], base["layers.0.norm.weight"])
        assert torch.equal(found["head.weight"], torch.ones(6, 4))
        assert list(found) == list(base)
    assert is_adapter(adapter_set(adapter.items(), {"r": 2, "lora_alpha": 8}))
    assert not is_adapter(base.items())
    with refused("use_dora cannot be sent alone"):
        served(adapter, use_dora=True)
    with refused("1 modules that the model lacks, first layers.1.q.weight"):
        served({name.replace("layers.0", "layers.1"): tensor for name, tensor in adapter.items()})
    with refused("one half of layers.0.q.weight only"):
        served({f"{stem}.lora_A.weight": a})
    with refused("makes (6, 3), the model has (6, 4)"):
        served({f"{stem}.lora_A.weight": a[:, :3], f"{stem}.lora_B.weight": b})


def wait_for(condition: Callable[[], bool], limit: float = 20.0) -> None:
    until = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < until, "not seen in time"
        time.sleep(0.005)


CASES: dict[str, Callable[[WeightSender], None]] = {
    name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")
}


def main() -> None:
    """Run all cases; print their tracebacks (empty: passed) as one JSON object."""
    outcomes = {}
    for name, case in CASES.items():
        sender = WeightSender(bucket_bytes=1024)
        try:
            case(sender)
            outcomes[name] = ""
        except Exception:  # whatever failed is the outcome
            outcomes[name] = traceback.format_exc()
        sender.close()
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
