"""Random sessions for property tests: an origin's rows in chunks, and the Advances it would send."""

from dataclasses import dataclass

from hypothesis import strategies as st

from flowspec_edge.core.rows import NO_PARENT, Advance, Row
from flowspec_edge.core.speculation.tree import Tree

Message = Advance | tuple[Row, ...]


@dataclass
class Story:
    """What an origin sent: chunks in order, and Advances."""

    chunks: list[tuple[Row, ...]]
    advances: list[Advance]

    def in_order(self) -> list[Message]:
        return [*self.chunks, *self.advances]


def living(tree: Tree) -> dict[int, int | None]:
    """Living draft ids and their next tokens, which is the whole state of a tree."""
    return {row.id: row.next_token for row in tree}


@st.composite
def stories(draw: st.DrawFn) -> Story:
    """A prompt, then rows under living rows, Advances along a random walk, misses with a fresh root."""
    num_prompt = draw(st.integers(1, 4))
    rows = [Row(id, id - 1 if id else NO_PARENT, draw(st.integers(0, 5))) for id in range(num_prompt)]
    chunks = [tuple(rows)]
    advances: list[Advance] = []
    root = num_prompt - 1
    children: dict[int, dict[int, int]] = {row.id: {} for row in rows}
    under_root = [root]
    next_id = num_prompt
    for _ in range(draw(st.integers(1, 8))):
        chunk = []
        for _ in range(draw(st.integers(1, 6))):
            parent = draw(st.sampled_from(under_root))
            token = draw(st.integers(0, 5))
            if token in children[parent]:
                continue
            chunk.append(Row(next_id, parent, token))
            children[parent][token] = next_id
            children[next_id] = {}
            under_root.append(next_id)
            next_id += 1
        if chunk:
            chunks.append(tuple(chunk))
        for _ in range(draw(st.integers(0, 2))):
            token = draw(st.integers(0, 5))
            advances.append(Advance(root, token))
            if token not in children[root]:
                chunks.append((Row(next_id, root, token),))
                children[root][token] = next_id
                children[next_id] = {}
                next_id += 1
            root = children[root][token]
            under_root = [root]
            for id in under_root:
                under_root.extend(children[id].values())
    return Story(chunks, advances)


@st.composite
def interleavings(draw: st.DrawFn, story: Story) -> list[Message]:
    """The story's chunks in order, its Advances at any place, some twice."""
    order: list[Message] = list(story.chunks)
    for advance in story.advances:
        for _ in range(draw(st.integers(1, 2))):
            order.insert(draw(st.integers(0, len(order))), advance)
    return order
