"""Weight transfer: the learner's sender and the engine's receiver, over a torch process group.

Neither half imports vllm or verl, and torch is imported only by the modules that move tensors, so this
package can be imported anywhere. A transfer is bounded on both sides by one deadline.
"""

from __future__ import annotations

from agl_grpc.weights.wire import ReceiverState, ReceiverStatus, TransferError, TransferReport

__all__ = ["ReceiverState", "ReceiverStatus", "TransferError", "TransferReport"]
