"""Which rpc each method of Agent Lightning's store is; singles are batches of one."""

from __future__ import annotations

STORE = "agl_grpc.v1.StoreService"
RUNNER = "agl_grpc.v1.RunnerService"

RPC_OF: dict[str, str] = {
    "start_rollout": f"/{STORE}/StartRollout",
    "enqueue_rollout": f"/{STORE}/EnqueueRollouts",
    "enqueue_many_rollouts": f"/{STORE}/EnqueueRollouts",
    "dequeue_rollout": f"/{STORE}/DequeueRollouts",
    "dequeue_many_rollouts": f"/{STORE}/DequeueRollouts",
    "start_attempt": f"/{STORE}/StartAttempt",
    "add_span": f"/{STORE}/AppendSpans",
    "add_many_spans": f"/{STORE}/AppendSpans",
    "add_otel_span": f"/{STORE}/AppendSpans",
    "query_rollouts": f"/{STORE}/ListRollouts",
    "query_attempts": f"/{STORE}/ListAttempts",
    "query_spans": f"/{STORE}/ListSpans",
    "query_resources": f"/{STORE}/ListResources",
    "query_workers": f"/{STORE}/ListWorkers",
    "get_rollout_by_id": f"/{STORE}/GetRollout",
    "get_latest_attempt": f"/{STORE}/GetAttempt",
    "get_resources_by_id": f"/{STORE}/GetResources",
    "get_latest_resources": f"/{STORE}/GetLatestResources",
    "get_worker_by_id": f"/{STORE}/GetWorker",
    "get_next_span_sequence_id": f"/{STORE}/ReserveSpanSequences",
    "get_many_span_sequence_ids": f"/{STORE}/ReserveSpanSequences",
    "wait_for_rollouts": f"/{STORE}/WaitRollouts",
    "add_resources": f"/{STORE}/PublishResources",
    "update_resources": f"/{STORE}/PublishResources",
    "update_rollout": f"/{STORE}/UpdateRollout",
    "update_attempt": f"/{STORE}/UpdateAttempt",
    "update_worker": f"/{RUNNER}/Heartbeat",
    "statistics": f"/{STORE}/GetStatistics",
    "capabilities": f"/{STORE}/GetServerInfo",
}
