"""The origin's head and drafter go with their ring, or wait for the next one; two sets are never kept."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import events as ev
from flowspec_edge.core.rows import Row
from flowspec_edge.core.speculation.drafting import DraftShape
from flowspec_edge.core.speculation.verify import Sampler, noise_of
from flowspec_edge.engine.head import Head
from flowspec_edge.origin import engine as engines
from flowspec_edge.origin.engine import KeptEngine, OriginEngine
from tests.narrowing import present

SHAPE = DraftShape()


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[Head]]]:
    """Weak references to all heads that were loaded. Reference cycles are not collected meanwhile."""
    loaded: list[weakref.ref[Head]] = []

    class WatchedHead(Head):
        def __init__(self, directory: Path, manifest: object, *, num_threads: int = 1) -> None:
            super().__init__(directory, manifest, num_threads=num_threads)  # type: ignore[arg-type]
            loaded.append(weakref.ref(self))

    monkeypatch.setattr(engines, "Head", WatchedHead)
    gc.disable()
    yield loaded
    gc.enable()


def draft(engine: OriginEngine, session: int, ranked_by: GenerateOptions | None = None) -> ev.DraftFinished:
    hidden = np.ones((2, 256), np.float32)
    finished = engine.run(ev.RunDraft(session, (Row(1, 0, 5), Row(2, 1, 6)), np.arange(2), hidden, (), ranked_by))
    assert isinstance(finished, ev.DraftFinished)
    return finished


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_it_draws_tokens_and_ranks_drafts_where_head_and_drafter_run(bundle: Bundle, temperature: float) -> None:
    """What the core is told has as many values as there are rows and proposals, whatever the vocabulary."""
    options = GenerateOptions(temperature=temperature, seed=3)
    engine = OriginEngine(bundle, 1, SHAPE)
    hidden = np.random.default_rng(1).normal(size=(2, 256)).astype(np.float32)
    finished = engine.run(ev.RunHead(1, (Row(4, 3, 5), Row(9, 1, 6)), (4, 7), hidden, options))
    logits = Head(bundle.directory, bundle.manifest).logits(hidden)
    sampler = Sampler(options, noise_of(bundle.manifest.geometry.vocab_size))
    assert isinstance(finished, ev.HeadFinished)
    assert finished.tokens == (sampler.draw(logits[0], 5), sampler.draw(logits[1], 8))
    found = []
    for session, ranked_by in ((1, None), (2, options)):
        present(engine.drafter).open(session, 100)
        found.append(draft(engine, session, ranked_by))
    likely, ranked = found
    np.testing.assert_array_equal(np.sort(likely.tokens), np.sort(ranked.tokens))
    assert (np.diff(ranked.log_probs) <= 0).all()
    assert np.array_equal(likely.tokens, ranked.tokens) == (temperature == 0)
    engine.close()


def test_a_closed_engine_is_freed_whatever_still_refers_to_it(bundle: Bundle, heads: list[weakref.ref[Head]]) -> None:
    engine = OriginEngine(bundle, 1, SHAPE)
    cycle = [engine]
    cycle.append(cycle)  # type: ignore[arg-type]
    assert heads[0]() is not None
    engine.close()
    assert heads[0]() is None
    engine.close()
    assert engine.drafter is None and len(heads) == 1


def test_the_next_ring_takes_the_parts_of_the_last_without_its_sessions(
    bundle: Bundle, heads: list[weakref.ref[Head]]
) -> None:
    kept = KeptEngine()
    first = kept.load(bundle, 1, SHAPE)
    present(first.drafter).open(1, 100)
    expected = draft(first, 1)
    first.close()
    second = kept.load(bundle, 1, SHAPE)
    assert len(heads) == 1
    assert not len(draft(second, 1).tokens), "the session of the first ring is closed"
    present(second.drafter).open(1, 100)
    first.close()  # says nothing to the second
    assert first.drafter is None
    np.testing.assert_array_equal(draft(second, 1).tokens, expected.tokens)
    second.close()
    kept.close()
    assert heads[0]() is None


def test_rings_at_the_same_time_have_parts_of_their_own_of_which_one_set_is_kept(
    bundle: Bundle, heads: list[weakref.ref[Head]]
) -> None:
    kept = KeptEngine()
    first, second = kept.load(bundle, 1, SHAPE), kept.load(bundle, 1, SHAPE)
    assert len(heads) == 2
    first.close()
    second.close()
    assert [head() is not None for head in heads] == [False, True]
    kept.close()
    assert [head() for head in heads] == [None, None]


def test_parts_for_other_settings_are_freed_before_others_are_loaded(
    bundle: Bundle, heads: list[weakref.ref[Head]]
) -> None:
    kept = KeptEngine()
    kept.load(bundle, 1, SHAPE).close()
    other = kept.load(bundle, 1, dataclasses.replace(SHAPE, proposals=8))
    assert heads[0]() is None and len(heads) == 2
    kept.close()
    other.close()
    assert heads[1]() is None, "after its end nothing is kept any more"
