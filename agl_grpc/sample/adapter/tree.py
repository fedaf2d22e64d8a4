"""The spans of an attempt as a tree, and the calls of models in it.

Algorithm: Agent Lightning 0.3, `adapter/triplet.py` (MIT), written anew from its description.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from agl_grpc.model import semconv
from agl_grpc.model.reading import get_reward_value
from agl_grpc.model.span import Span

ROOT = "virtual-root"
"""Name of the node above several roots."""

RESPONSE_ID = ("gen_ai.response.id", "agentlightning.operation.output.id")
"""Attributes that tell two spans of one call from spans of two calls."""


@dataclass(eq=False)
class Node:
    """A span with what was done inside it, in the order in which the spans came.

    ``start`` and ``end`` are seconds since the epoch.
    """

    span: Span
    start: float
    end: float
    children: list[Node] = field(default_factory=list)

    @property
    def id(self) -> str:
        """The span's id."""
        return self.span.span_id

    @property
    def attributes(self) -> dict[str, Any]:
        """The span's attributes."""
        return self.span.attributes

    def walk(self) -> Iterator[Node]:
        """This node and all below it, depth first."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += reversed(node.children)

    def reward(self) -> float | None:
        """The reward that the span carries."""
        return get_reward_value(self.span)

    def is_reward(self) -> bool:
        """Whether the span is there for a reward: it carries one, or is an operation that finds one."""
        named = self.attributes.get(semconv.OPERATION_NAME) == semconv.REWARD
        return self.reward() is not None or (self.span.name == semconv.SPAN_OPERATION and named)


def build(spans: Sequence[Span]) -> Node:
    """The tree; a parent that never came is made up, and so is a root above several.

    Raises `ValueError` when there is no span, or none that could be a root.
    """
    if not spans:
        raise ValueError("there are no spans to make a tree of")
    nodes = {span.span_id: Node(span, span.start_time, span.end_time) for span in spans}
    roots: list[str] = []
    lost: dict[str, list[Node]] = {}
    for span in spans:
        if span.parent_id is None:
            roots.append(span.span_id)
        elif span.parent_id in nodes:
            nodes[span.parent_id].children.append(nodes[span.span_id])
        else:
            lost.setdefault(span.parent_id, []).append(nodes[span.span_id])
    found = [nodes[one] for one in roots] + [_made_up(one, children) for one, children in lost.items()]
    if not found:
        raise ValueError("no span is a root: each one's parent is another one of them")
    if len(found) == 1:
        return found[0]
    return _virtual(ROOT, "", found, found[0].start, found[-1].end)


def _made_up(span_id: str, children: list[Node]) -> Node:
    start, end = min(child.start for child in children), max(child.end for child in children)
    return _virtual(semconv.SPAN_VIRTUAL, span_id, children, start, end)


def _virtual(name: str, span_id: str, children: list[Node], start: float, end: float) -> Node:
    like = children[0].span
    span = Span.from_attributes(
        attributes={},
        rollout_id=like.rollout_id,
        attempt_id=like.attempt_id,
        name=name,
        span_id=span_id or None,
    )
    return Node(span, start, end, children)


def repair(root: Node) -> None:
    """Puts spans that hang at the top into the tightest span that encloses them in time.

    Frameworks that trace by several systems lose who called whom. Where a node has one child nothing moves.
    """
    while len(root.children) == 1:
        root = root.children[0]
    for stray in list(root.children):
        if len(root.children) == 1:
            return
        own = {id(node) for node in stray.walk()}
        tightest, least = None, float("inf")
        for node in root.walk():
            if node is root or id(node) in own:
                continue
            if node.start <= stray.start and node.end >= stray.end:
                slack = (node.end - stray.end) + (stray.start - node.start)
                if 0 < slack < least:
                    tightest, least = node, slack
        if tightest is not None:
            root.children.remove(stray)
            tightest.children.append(stray)


def agent_name(node: Node) -> str | None:
    """The agent that a span stands for, by whichever framework's attributes say so; None = for none."""
    attributes = node.attributes
    named = (
        attributes.get("agent.name"),
        attributes.get("operation.name") if attributes.get("agentops.span.kind") == "agent" else None,
        attributes.get("recipient_agent_type"),
        attributes.get("langchain.chain.type"),
        attributes.get("executor.id"),
        attributes.get("agentlightning.operation.input.name") if attributes.get("type") == "agent" else None,
        attributes.get("lc_name") if node.span.name.startswith("langchain.Chain.") else None,
    )
    return next((name for name in named if name is not None), None)


@dataclass(frozen=True)
class CallRules:
    """Which spans are calls of the model that is trained.

    ``name``: pattern that the span's name has to contain. ``agent``: pattern that the name of the agent
    around it has to contain; ``None`` = any agent, or none. ``skip_rewards``: leave calls out that were made
    to find a reward.
    """

    name: str
    agent: str | None = None
    skip_rewards: bool = True


def find_calls(root: Node, rules: CallRules) -> list[tuple[Node, str]]:
    """The calls, depth first, each with the agent that made it (``*`` = any).

    A span whose response id was seen before is the same call told again, and so is one without an id inside
    a call.
    """
    calls: list[tuple[Node, str]] = []
    seen: set[str] = set()
    waiting: list[tuple[Node, str | None, bool, bool]] = [
        (root, "*" if rules.agent is None else None, False, False)
    ]
    while waiting:
        node, agent, in_reward, in_call = waiting.pop()
        if agent is not None and not in_reward and _is_call(node, rules, seen, in_call):
            calls.append((node, agent))
            in_call = True
        name = agent_name(node)
        if name is not None:
            agent = name if rules.agent is None or re.search(rules.agent, name) else None
        in_reward = in_reward or (rules.skip_rewards and node.is_reward())
        waiting += [(child, agent, in_reward, in_call) for child in reversed(node.children)]
    return calls


def _is_call(node: Node, rules: CallRules, seen: set[str], in_call: bool) -> bool:
    """Whether a span is a call that was not told of before; remembers its response id."""
    if re.search(rules.name, node.span.name) is None:
        return False
    response = response_id(node.attributes)
    if response is None:
        return not in_call
    if response in seen:
        return False
    seen.add(response)
    return True


def response_id(attributes: dict[str, Any]) -> str | None:
    """The engine's name of an answer; None = not told."""
    values = (attributes.get(name) for name in RESPONSE_ID)
    return next((value for value in values if isinstance(value, str)), None)
