"""Runs in an environment with the released agentlightning 0.3.0: its adapters over traces from stdin.

Reads a JSON list of traces, each a list of spans; prints one JSON list of what its adapters make of each.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from agentlightning.adapter import LlmProxyTraceToTriplet, TracerTraceToTriplet, TraceToMessages
from agentlightning.adapter.triplet import RewardMatchPolicy
from agentlightning.types import Span

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unrepaired": {"repair_hierarchy": False},
    "agents": {"agent_match": "^good"},
    "siblings": {"reward_match": RewardMatchPolicy.FIRST_SIBLING},
    "rewards too": {"exclude_llm_call_in_reward": False},
    "with tokens": {"_skip_empty_token_spans": True},
}


def adapted(spans: list[Span]) -> dict[str, Any]:
    """What each adapter makes of a trace."""
    made = {
        name: [triplet.model_dump() for triplet in TracerTraceToTriplet(**settings).adapt(spans)]
        for name, settings in VARIANTS.items()
    }
    made["proxy"] = [triplet.model_dump() for triplet in LlmProxyTraceToTriplet().adapt(spans)]
    made["messages"] = TraceToMessages().adapt(spans)
    return made


traces = [[Span.model_validate(span) for span in trace] for trace in json.load(sys.stdin)]
print(json.dumps([adapted(trace) for trace in traces]))
