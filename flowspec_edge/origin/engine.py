"""What the origin itself computes: the logits of rows that came back, drafts, and the tokens of texts."""

from __future__ import annotations

from collections.abc import Callable

from flowspec_edge.bundle import Bundle
from flowspec_edge.core import events as ev
from flowspec_edge.core.speculation.drafting import DraftShape
from flowspec_edge.engine.drafters.drafter import Drafter
from flowspec_edge.engine.drafters.eagle3 import load_drafter
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.manifest import FileEntry, Manifest, verify_digests


class OriginEngine:
    """Head, drafter and tokenizer of a bundle. ``drafter`` is None where the bundle has no draft head.

    It is made on a thread: files are read and checked, and graphs loaded.

    Raises:
        BundleError: a file is damaged, or is no graph or tokenizer.
    """

    def __init__(self, bundle: Bundle, num_threads: int, shape: DraftShape) -> None:
        directory, manifest = bundle.directory, bundle.manifest
        verify_digests(directory, origin_files(manifest))
        self.tokenizer = Tokenizer(directory / manifest.tokenizer.file)
        self.head = Head(directory, manifest, num_threads=num_threads)
        self.drafter: Drafter | None = None
        if manifest.drafter is not None:
            self.drafter = load_drafter(directory, manifest, self.head, k=shape.proposals, num_threads=num_threads)

    def run(self, job: ev.RunHead | ev.RunDraft) -> ev.HeadFinished | ev.DraftFinished:
        if isinstance(job, ev.RunHead):
            return ev.HeadFinished(self.head.logits(job.hidden))
        assert self.drafter is not None, "the core drafts only where there is a drafter"
        return self.drafter.run(job)


def origin_files(manifest: Manifest) -> list[FileEntry]:
    """The files of a bundle that the origin computes with. Drafters embed tokens themselves."""
    files = [manifest.tokenizer, manifest.head]
    return files if manifest.drafter is None else [*files, manifest.embedding, *manifest.drafter.files()]


LoadEngine = Callable[[Bundle, int, DraftShape], OriginEngine]
"""Makes the engine of a bundle, with that many threads, for draft trees of that shape."""
