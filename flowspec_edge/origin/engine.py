"""What the origin itself computes: the tokens drawn after rows that came back, drafts, and the tokens of texts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakValueDictionary

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import Grammar
from flowspec_edge.core import events as ev
from flowspec_edge.core.row_kinds import widen
from flowspec_edge.core.speculation.constraint import Constraint, check_drafts
from flowspec_edge.core.speculation.drafting import DraftShape
from flowspec_edge.core.speculation.verify import Noise, draw_tokens, noise_of, rank_drafts
from flowspec_edge.engine.drafters.eagle1 import Eagle1Drafter
from flowspec_edge.engine.drafters.eagle3 import load_drafter
from flowspec_edge.engine.grammar import Grammars
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.memory import frugal_allocation
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import FlowspecError
from flowspec_edge.manifest import FileEntry, Manifest, verify_digests


@dataclass(frozen=True, slots=True)
class LoadedParts:
    """Head, drafter, tokenizer, noise and grammars of a bundle. ``drafter`` is None where the bundle has no draft head.

    They are loaded on a thread: files are read and checked, and graphs loaded.
    """

    tokenizer: Tokenizer
    head: Head
    drafter: Eagle1Drafter | None
    noise: Noise
    grammars: Grammars

    @classmethod
    def load(cls, bundle: Bundle, num_threads: int, shape: DraftShape) -> LoadedParts:
        """Raises BundleError where a file is damaged, or is no graph or tokenizer."""
        directory, manifest = bundle.directory, bundle.manifest
        verify_digests(directory, origin_files(manifest))
        tokenizer = read_tokenizer(bundle)
        head = Head(directory, manifest, num_threads=num_threads)
        drafter: Eagle1Drafter | None = None
        if manifest.drafter is not None:
            drafter = load_drafter(directory, manifest, head, k=shape.proposals, num_threads=num_threads)
        vocab_size = manifest.geometry.vocab_size
        grammars = Grammars(tokenizer, vocab_size, manifest.eos_token_ids)
        return cls(tokenizer, head, drafter, noise_of(vocab_size), grammars)


class OriginEngine:
    """The loaded parts of a bundle for one ring, which closes it in the end.

    Until then ``drafter`` is the one that was loaded, and None afterwards: what a ring says after its end reaches
    nobody. ``take_back`` gets the parts in the end, where somebody wants them for another ring.
    """

    def __init__(
        self,
        bundle: Bundle,
        num_threads: int,
        shape: DraftShape,
        *,
        parts: LoadedParts | None = None,
        take_back: Callable[[LoadedParts], None] | None = None,
    ) -> None:
        self._parts: LoadedParts | None = parts or LoadedParts.load(bundle, num_threads, shape)
        self._take_back = take_back
        self.tokenizer = self._parts.tokenizer
        self.grammars = self._parts.grammars
        self.drafter = self._parts.drafter

    def check(self, job: ev.CheckDrafts) -> ev.DraftsChecked:
        """May run beside ``run``, on another thread. It may wait for a mask, so it is not for the event loop."""
        return check_drafts(job, self.grammars.compile(job.grammar))

    def run(self, job: ev.RunHead | ev.RunDraft) -> ev.HeadFinished | ev.DraftFinished:
        """Takes time in proportion to the vocabulary, so it is not for the event loop.

        Raises:
            BundleError, StageFailedError: the parts cannot go on; they serve no other ring then.
        """
        try:
            return self._run(job)
        except FlowspecError:
            self._take_back = None
            raise

    def _run(self, job: ev.RunHead | ev.RunDraft) -> ev.HeadFinished | ev.DraftFinished:
        assert self._parts is not None, "a closed engine runs nothing"
        if (whole := widen(job.hidden)) is not job.hidden:
            job = replace(job, hidden=whole)
        if isinstance(job, ev.RunHead):
            constraint = self._constraint(job.options.grammar)
            return draw_tokens(job, self._parts.head.logits(job.hidden), self._parts.noise, constraint)
        assert self.drafter is not None, "the core drafts only where there is a drafter"
        return rank_drafts(job, self.drafter.run(job), self._parts.noise, self._constraint(job.grammar))

    def _constraint(self, grammar: Grammar | None) -> Constraint | None:
        return None if grammar is None else self.grammars.compile(grammar)

    def close(self) -> None:
        """Give the parts back, or free them at once, whoever still holds the ring.

        No job may run any more. Takes 0.3 ms per MB that is freed, so it is not for the event loop.
        """
        parts, self._parts, self.drafter = self._parts, None, None
        if parts is not None and parts.drafter is not None:
            parts.drafter.close_all()
        if parts is not None and self._take_back is not None:
            self._take_back(parts)
        with frugal_allocation():
            del parts


def read_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer of a bundle; the one that is in use already, where there is one.

    Takes up to some seconds in which no other thread of this process runs. So it is to be read before links are opened,
    and inside of ``Standstill.expected``.

    Raises:
        BundleError: the file is damaged, or is no tokenizer.
    """
    directory, entry = bundle.directory, bundle.manifest.tokenizer
    key = entry.sha256, directory
    if (tokenizer := _in_use.get(key)) is None:
        verify_digests(directory, [entry])
        tokenizer = Tokenizer(directory / entry.file, bundle.manifest.geometry.max_context)
        _in_use[key] = tokenizer
    return tokenizer


_in_use: WeakValueDictionary[tuple[str, Path], Tokenizer] = WeakValueDictionary()


def origin_files(manifest: Manifest) -> list[FileEntry]:
    """The files of a bundle that the origin computes with. Drafters embed tokens themselves."""
    files = [manifest.tokenizer, manifest.head]
    return files if manifest.drafter is None else [*files, manifest.embedding, *manifest.drafter.files()]


LoadEngine = Callable[[Bundle, int, DraftShape], OriginEngine]
"""Makes the engine of a bundle, with that many threads, for draft trees of that shape."""


class KeptEngine:
    """Loads engines for one ring after another, and keeps the parts of the last one for the next.

    At most one set of parts is kept that no ring uses. It may be used from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: tuple[object, LoadedParts] | None = None
        self._is_closed = False

    def load(self, bundle: Bundle, num_threads: int, shape: DraftShape) -> OriginEngine:
        """The engine of a bundle, of the parts that are kept where they are the right ones; see LoadEngine."""
        key = bundle.digest, bundle.directory, num_threads, shape
        with self._lock:
            kept, self._kept = self._kept, None
        parts = kept[1] if kept is not None and kept[0] == key else None
        with frugal_allocation():
            del kept  # others are freed before these are loaded
        return OriginEngine(
            bundle, num_threads, shape, parts=parts, take_back=lambda returned: self._keep(key, returned)
        )

    def close(self) -> None:
        """Free what is kept, and keep nothing any more."""
        with frugal_allocation(), self._lock:
            self._kept, self._is_closed = None, True

    def _keep(self, key: object, parts: LoadedParts) -> None:
        with self._lock:
            if not self._is_closed:
                self._kept = key, parts
