"""The token tree of an attempt: every stretch of tokens once, however many calls repeat it.

A radix tree: a node holds the tokens between its parent's end and its own. Whatever was put in ends at a
node, so equal sequences end at the same one, and one sequence begins with another when its node lies below.
Putting a sequence in costs the tokens after the node from which it is put in, so a conversation whose prompts
are stored as differences costs its tokens once, not once a turn.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from agl_grpc.sample.types import Int32Array, SampleError

_NOTHING = np.zeros(0, dtype=np.int32)


class Node:
    """The end of a stretch of tokens.

    Attributes:
        parent: The node before; None at the root.
        tokens: Tokens between the parent's end and this one's.
        end: Tokens from the root to here.
        children: Nodes after this one by their first token.
    """

    __slots__ = ("children", "end", "parent", "tokens")

    def __init__(self, parent: Node | None, tokens: Int32Array, end: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.end = end
        self.children: dict[int, Node] = {}

    def upwards(self) -> Iterator[Node]:
        """This node and all before it, to the root."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent


class TokenTree:
    """All token sequences of an attempt."""

    def __init__(self) -> None:
        self.root = Node(None, _NOTHING, 0)

    def put(self, start: Node, tokens: Int32Array) -> Node:
        """The node at which the sequence of `start`, followed by `tokens`, ends."""
        node, done, count = start, 0, len(tokens)
        while done < count:
            first = int(tokens[done])
            child = node.children.get(first)
            if child is None:
                new = Node(node, tokens[done:] if done else tokens, node.end + count - done)
                node.children[first] = new
                return new
            same = common_prefix(child.tokens, tokens[done:])
            node = child if same == len(child.tokens) else self._split(child, same)
            done += same
        return node

    def beginning(self, node: Node, length: int) -> Node:
        """The node that ends after the first `length` tokens of a node's sequence.

        Raises SampleError when the sequence is shorter.
        """
        if length > node.end:
            raise SampleError(f"a prompt keeps {length} tokens of a sequence of {node.end}")
        for place in node.upwards():
            before = place.end - len(place.tokens)
            if length == place.end:
                return place
            if length > before:
                return self._split(place, length - before)
        return self.root

    def tokens(self, node: Node, start: int = 0) -> Int32Array:
        """The sequence that ends at a node, from its `start`-th token on."""
        pieces: list[Int32Array] = []
        for place in node.upwards():
            if place.end <= start:
                break
            before = place.end - len(place.tokens)
            pieces.append(place.tokens if before >= start else place.tokens[start - before :])
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces[::-1]) if pieces else _NOTHING

    @staticmethod
    def _split(node: Node, length: int) -> Node:
        """Cuts a node's stretch after `length` tokens; the new node ends there, `node` ends where it did."""
        parent = node.parent
        assert parent is not None
        upper = Node(parent, node.tokens[:length], node.end - len(node.tokens) + length)
        parent.children[int(upper.tokens[0])] = upper
        node.parent, node.tokens = upper, node.tokens[length:]
        upper.children[int(node.tokens[0])] = node
        return upper


def common_prefix(first: Int32Array, second: Int32Array) -> int:
    """Length of the common beginning of two sequences."""
    limit = min(len(first), len(second))
    differ = first[:limit] != second[:limit]
    place = int(differ.argmax()) if limit else 0
    return place if limit and differ[place] else limit


def shared_length(first: Node, second: Node) -> int:
    """Length of the common beginning of the sequences of two nodes."""
    above = {id(node) for node in first.upwards()}
    return next(node.end for node in second.upwards() if id(node) in above)
