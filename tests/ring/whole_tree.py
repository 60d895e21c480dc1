"""One tree at a time: draft it whole, verify it whole, take the accepted path, repeat. The yardstick of a drafter."""

import numpy as np

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.events import RunDraft, RunForward
from flowspec_edge.core.limits import TREE_MARGIN
from flowspec_edge.core.rows import NO_PARENT, Advance, Row
from flowspec_edge.core.speculation.drafting import Drafting, DraftShape
from flowspec_edge.core.speculation.kv_slots import KvSlots
from flowspec_edge.core.speculation.tree import Tree
from flowspec_edge.core.speculation.verify import Sampler, noise_of
from flowspec_edge.engine.drafters.eagle1 import Eagle1Drafter
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.stage_runner import StageRunner


class WholeTree:
    """The demo bundle's target and drafter in one process."""

    def __init__(self, bundle: Bundle, num_nodes: int, depth: int, width: int = 10) -> None:
        self.stage = StageRunner(bundle.directory, bundle.manifest, 0, bundle.manifest.geometry.num_layers)
        self.head = Head(bundle.directory, bundle.manifest)
        self.drafter = Eagle1Drafter(bundle.directory, bundle.manifest, self.head, k=width)
        self.vocab_size = bundle.manifest.geometry.vocab_size
        self.eos = bundle.manifest.eos_token_ids
        self.num_nodes, self.depth = num_nodes, depth
        self.shape = DraftShape(width=width, children=width, rows_per_pass=width * width)

    def generate(self, prompt: list[int], options: GenerateOptions) -> tuple[list[int], int]:
        """Returns the tokens and how many verifications gave them."""
        self.tree, self.next_id, self.num_extended = Tree(), len(prompt), 0
        self.dropped: tuple[int, ...] = ()
        capacity = len(prompt) + options.max_new_tokens + TREE_MARGIN
        self.slots = KvSlots(capacity)
        self.stage.open_cache(1, capacity)
        self.drafter.open(1, capacity)
        draw = Sampler(options, noise_of(self.vocab_size)).draw
        rows = [Row(i, i - 1 if i else NO_PARENT, token) for i, token in enumerate(prompt)]
        for row in rows:
            self.tree.add(row)
        self.hidden = dict(zip(range(len(rows)), self._forward(rows), strict=True))
        tokens = [draw(self.head.logits(self.hidden[rows[-1].id][None])[0], len(prompt))]
        self._root_at(rows[-1].id, tokens[0])
        num_verifications = 0
        while len(tokens) < options.max_new_tokens and tokens[-1] not in self.eos:
            rows = self._draft()
            hidden = self._forward(rows)
            self.hidden.update((row.id, hidden[i]) for i, row in enumerate(rows))
            logits = dict(zip((row.id for row in rows), self.head.logits(hidden), strict=True))
            num_verifications += 1
            while self.root in logits and len(tokens) < options.max_new_tokens and tokens[-1] not in self.eos:
                root = self.tree[self.root]
                tokens.append(draw(logits[self.root], root.depth + 1))
                self._root_at(self.root, tokens[-1])
            self.dropped = tuple(self.tree.take_dropped())
            self.slots.drop(self.dropped)
        self.stage.free_cache(1)
        self.drafter.close(1)
        return tokens, num_verifications

    def _root_at(self, parent: int, token: int) -> None:
        child = self.tree[parent].children.get(token)
        if child is None:
            child = self.next_id
            self.next_id += 1
            self.tree.add(Row(child, parent, token))
        self.root = child
        self.tree.advance(Advance(parent, token))

    def _draft(self) -> list[Row]:
        drafting = Drafting(self.tree, self.shape)
        drafting.move_root(self.root, (), self.next_id)
        path = [row.id for row in self.tree.path(self.root)[self.num_extended + 1 :]]
        hidden = np.stack([self.hidden[self.tree[id].parent] for id in path])
        self.num_extended = self.tree[self.root].depth
        self._run_pass(drafting, path, hidden, self.dropped)
        for _ in range(self.depth - 1):
            frontier = drafting.frontier(self.shape.width, 10**6)
            self._run_pass(drafting, frontier, np.zeros((0, 0), np.float32))
        scores = drafting.scores
        best = sorted(scores, key=lambda id: -scores[id])[: self.num_nodes]
        chosen = sorted({self.root, *best})  # parents have the smaller ids
        return [Row(id, self.tree[id].parent, self.tree[id].token) for id in chosen]

    def _run_pass(self, drafting: Drafting, ids: list[int], hidden: np.ndarray, dropped: tuple[int, ...] = ()) -> None:
        rows = tuple(Row(id, self.tree[id].parent, self.tree[id].token) for id in ids)
        positions = np.array([self.tree[id].depth - 1 for id in ids], np.int64)
        draft = self.drafter.run(RunDraft(1, rows, positions, hidden, dropped))
        parents = ids[max(len(hidden) - 1, 0) :]
        self.next_id += len(drafting.merge(parents, draft.tokens, draft.log_probs, self.next_id))

    def _forward(self, rows: list[Row]) -> np.ndarray:
        return self.stage.run(RunForward(1, tuple(rows), None, self.slots.place(rows))).hidden.copy()
