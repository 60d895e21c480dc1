"""A radix tree: token sequences by what they begin with, each under the number of a session."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import Struct, field


class _Node(Struct, eq=False):
    """What some sequences have in common: the labels on the way from the root, this one's included."""

    label: tuple[int, ...] = ()
    parent: _Node | None = None
    children: dict[int, _Node] = field(default_factory=dict)  # by the first token of their labels
    sessions: set[int] = field(default_factory=set)  # whose sequences end here

    def all_sessions(self) -> Iterator[int]:
        """Those whose sequences end here or below."""
        pending = [self]
        while pending:
            node = pending.pop()
            yield from node.sessions
            pending += node.children.values()


class RadixTree:
    """Sequences that begin alike share the nodes of what they have in common."""

    def __init__(self) -> None:
        self._root = _Node()
        self._ends: dict[int, _Node] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, session: int, tokens: Sequence[int]) -> None:
        """Put a sequence in under this number, which is new."""
        assert session not in self._ends
        *_, (_, num_above), (node, num_alike) = (self._root, 0), *self._walk(tokens)
        if num_alike - num_above < len(node.label):
            node = self._split(node, num_alike - num_above)
        if rest := tuple(tokens[num_alike:]):
            node.children[rest[0]] = node = _Node(rest, node)
        node.sessions.add(session)
        self._ends[session] = node

    def remove(self, session: int) -> None:
        """Take a sequence out."""
        node = self._ends.pop(session)
        node.sessions.remove(session)
        while node.parent is not None and not node.sessions and len(node.children) < 2:
            above = node.parent
            if not node.children:
                del above.children[node.label[0]]
                node = above
                continue
            (below,) = node.children.values()
            below.label, below.parent = node.label + below.label, above
            above.children[below.label[0]] = below
            return

    def common(self, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
        """All sessions, each with the number of tokens with which its sequence and ``tokens`` begin alike, the most
        first.
        """
        seen: set[int] = set()
        for node, num_alike in reversed(self._walk(tokens)):
            for session in node.all_sessions():
                if session not in seen:
                    seen.add(session)
                    yield session, num_alike

    def check(self) -> None:
        """Assert the invariants: links are mutual, and every node but the root is an end or a fork."""
        pending = [self._root]
        ends: set[int] = set()
        while pending:
            node = pending.pop()
            assert node is self._root or node.sessions or len(node.children) > 1
            assert all(self._ends[session] is node for session in node.sessions)
            ends |= node.sessions
            for first, child in node.children.items():
                assert child.label[0] == first and child.parent is node
                pending.append(child)
        assert ends == self._ends.keys()

    def _walk(self, tokens: Sequence[int]) -> list[tuple[_Node, int]]:
        """The nodes on the way of ``tokens``, each with the number of tokens that are alike up to its end.

        Of the last one's label only the first tokens may be alike.
        """
        way = [(node := self._root, num_alike := 0)]
        while num_alike < len(tokens) and (child := node.children.get(tokens[num_alike])) is not None:
            num_more = _num_alike(child.label, tokens, num_alike)
            way.append((node := child, num_alike := num_alike + num_more))
            if num_more < len(child.label):
                break
        return way

    def _split(self, node: _Node, at: int) -> _Node:
        """Cut a node's label in two. Returns the node that has the first part."""
        assert node.parent is not None, "the root has no label"
        above = _Node(node.label[:at], node.parent, {node.label[at]: node})
        node.parent.children[node.label[0]] = above
        node.label, node.parent = node.label[at:], above
        return above


def _num_alike(label: tuple[int, ...], tokens: Sequence[int], first: int) -> int:
    """How many tokens of the label are those of ``tokens`` from ``first`` on."""
    there = tuple(tokens[first : first + len(label)])
    if there == label:
        return len(label)
    pairs = enumerate(zip(label, there, strict=False))
    return next((place for place, (one, other) in pairs if one != other), len(there))
