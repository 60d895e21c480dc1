"""An EAGLE-3 draft head: it fuses features from some layers of the target, and has a vocabulary of its own.

It works like an EAGLE-1 head: the pair (hidden rows at position i, token i+1) is at position i, and the output of the
one decoder layer is the feature of the pair's children. Two things differ. The hidden rows are those that enter a low,
a middle and a high layer, or more, which one matrix fuses. And the tokens come from a norm and a head over the target's
most frequent tokens; the graph returns them by the target's ids. (Li et al., EAGLE-3, arXiv 2503.01840, section 3.)
"""

from __future__ import annotations

from pathlib import Path

from flowspec_edge.core.rows import Floats
from flowspec_edge.engine.drafters.eagle1 import Eagle1Drafter
from flowspec_edge.engine.graphs import load_graph, pad_rows
from flowspec_edge.engine.head import Head
from flowspec_edge.errors import BundleError
from flowspec_edge.manifest import HIDDEN, HIDDEN_OUT, Manifest


class Eagle3Drafter(Eagle1Drafter):
    """The draft head of a bundle. It shares the target's embedding, but has a top of its own."""

    kind = "eagle3"

    def __init__(self, directory: Path, manifest: Manifest, head: Head, *, k: int, num_threads: int = 1) -> None:
        super().__init__(directory, manifest, head, k=k, num_threads=num_threads)
        if self._entry.fuse is None or self._top is None:
            raise BundleError(f"{directory}: the EAGLE-3 head lacks its fuse or its top; export the bundle again")
        self._fuse = load_graph(directory / self._entry.fuse.file, num_threads)

    def _features_of(self, hidden: Floats) -> Floats:
        if not len(hidden):
            return hidden
        (features,) = self._fuse.run([HIDDEN_OUT], {HIDDEN: pad_rows(hidden, self._min_rows)})
        return features[0, : len(hidden)]  # type: ignore[no-any-return]


def load_drafter(directory: Path, manifest: Manifest, head: Head, *, k: int, num_threads: int = 1) -> Eagle1Drafter:
    """The drafter of a bundle that has a draft head, with ``k`` proposals per row.

    Raises:
        BundleError: the draft head is of an unknown kind.
    """
    assert manifest.drafter is not None, "asked only of bundles with a draft head"
    kinds = {kind.kind: kind for kind in (Eagle1Drafter, Eagle3Drafter)}
    if manifest.drafter.kind not in kinds:
        raise BundleError(
            f"{directory}: a draft head of kind {manifest.drafter.kind!r}; this flowspec-edge knows {', '.join(kinds)}"
        )
    return kinds[manifest.drafter.kind](directory, manifest, head, k=k, num_threads=num_threads)
