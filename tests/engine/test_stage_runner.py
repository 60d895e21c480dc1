"""A stage computes the same rows however they are cut: by chunk, by layer range, in a tree or in a chain."""

import dataclasses
import gc
import itertools
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.core.events import RunForward
from flowspec_edge.core.limits import MAX_PREFILL_ROWS
from flowspec_edge.core.rows import Placement, Row
from flowspec_edge.core.speculation.kv_slots import KvSlots
from flowspec_edge.engine import graphs, kv_cache, rotary, row_check, stage_runner
from flowspec_edge.engine.graphs import as_ort_value
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.errors import BundleError, CacheFullError, PlacementError, StageFailedError
from tests.engine.conftest import NUM_LAYERS, Session, make_chain

TREE = [-1, -1, -1, 0, 0, 1, 3, 3, 5, 6]  # parents by place, counted from the tree's first row; -1 is the chain's last


def make_tree(chain: Sequence[Row], tokens: list[int]) -> list[Row]:
    first = len(chain)
    return [Row(first + i, first + parent, tokens[i]) for i, parent in enumerate(TREE)]


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 8, 16, 32])
def test_a_rows_bits_do_not_depend_on_its_chunk(
    whole: StageRunner, bundle: Bundle, tokens: list[int], num_rows: int
) -> None:
    chain = make_chain(tokens)
    expected = Session(whole).run(chain)
    session = Session(whole)
    found = np.concatenate([session.run(chain[i : i + num_rows]) for i in range(0, len(chain), num_rows)])
    np.testing.assert_array_equal(found, expected)
    head = Head(bundle.directory, bundle.manifest)
    parts = [head.logits(found[i : i + num_rows]) for i in range(0, len(found), num_rows)]
    np.testing.assert_array_equal(np.concatenate(parts), head.logits(expected))


def test_in_the_longest_chunk_of_a_prompt_rows_have_the_same_bits(whole: StageRunner, tokens: list[int]) -> None:
    chain = make_chain((tokens * 5)[: MAX_PREFILL_ROWS + 24])
    large, small = Session(whole), Session(whole)
    found = [large.run(chain[:MAX_PREFILL_ROWS]), large.run(chain[MAX_PREFILL_ROWS:])]
    expected = [small.run(chain[i : i + 40]) for i in range(0, len(chain), 40)]
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(expected))


@pytest.mark.parametrize("cuts", [(1,), (4,), (7,), (2, 5), (1, 2, 3, 4, 5, 6, 7)])
def test_any_split_of_the_layers_gives_the_same_bits(
    whole: StageRunner, bundle: Bundle, tokens: list[int], cuts: tuple[int, ...]
) -> None:
    bounds = [0, *cuts, NUM_LAYERS]
    stages = [StageRunner(bundle.directory, bundle.manifest, start, stop) for start, stop in itertools.pairwise(bounds)]
    chain = make_chain(tokens[:20])
    tree = make_tree(chain, tokens[20:])
    split, unsplit = Session(*stages), Session(whole)
    for rows in (chain, tree[:4], tree[4:5], tree[5:]):
        np.testing.assert_array_equal(split.run(rows), unsplit.run(rows))


@pytest.mark.parametrize("parts", [((0, 3), (3, 5), (5, 8)), ((0, 8),), ((2, 3), (7, 8))])
def test_what_others_have_loaded_is_not_loaded_again_and_gives_the_same_bits(
    whole: StageRunner,
    bundle: Bundle,
    tokens: list[int],
    parts: tuple[tuple[int, int], ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = [StageRunner(bundle.directory, bundle.manifest, *part) for part in parts]
    loaded = {sha256: graph for other in others for sha256, graph in other.parts.items()}
    read: list[str] = []

    def load(path: Path, num_threads: int, *, rounds_cache: bool = False) -> object:
        read.append(path.name)
        return real(path, num_threads, rounds_cache=rounds_cache)

    real = graphs.load_graph
    for module in (graphs, stage_runner):
        monkeypatch.setattr(module, "load_graph", load)
    runner = StageRunner(bundle.directory, bundle.manifest, 0, NUM_LAYERS, loaded=loaded)
    files = bundle.manifest.stage_files(0, NUM_LAYERS)
    missing = {entry.file.rpartition("/")[2] for entry in files if entry.sha256 not in loaded}
    assert set(read) == missing - {"embedding.npy"}, "that is mapped, not loaded"
    for other in others:
        other.close()
    chain = make_chain(tokens[:20])
    np.testing.assert_array_equal(Session(runner).run(chain), Session(whole).run(chain))
    assert runner.parts.keys() == {entry.sha256 for entry in files}


def test_each_row_of_a_tree_is_what_its_path_gives_as_a_chain(whole: StageRunner, tokens: list[int]) -> None:
    chain = make_chain(tokens[:20])
    tree = make_tree(chain, tokens[20:])
    session = Session(whole)
    session.run(chain)
    found = session.run(tree)
    for place in range(len(tree)):
        path, parent = [], place
        while parent >= 0:
            path.append(tokens[20 + parent])
            parent = TREE[parent]
        alone = Session(whole).run(make_chain([*tokens[:20], *reversed(path)]))
        np.testing.assert_array_equal(found[place], alone[-1])


def test_the_first_chunk_has_its_positions(whole: StageRunner, tokens: list[int]) -> None:
    chain = make_chain(tokens[:6])
    siblings = [Row(0, 2**32 - 1, tokens[0]), Row(1, 0, tokens[1]), Row(2, 0, tokens[2]), Row(3, 2, tokens[3])]
    first = Session(whole).run(siblings)
    later = Session(whole)
    expected = np.concatenate([later.run(siblings[:1]), later.run(siblings[1:])])
    np.testing.assert_array_equal(first, expected)
    assert not np.allclose(first[2], Session(whole).run(chain)[2], atol=1e-2)


def test_a_compacted_cache_is_as_good_as_a_new_one(whole: StageRunner, tokens: list[int]) -> None:
    chain = make_chain(tokens[:20])
    tree = make_tree(chain, tokens[20:])
    session = Session(whole)
    session.run(chain)
    session.run(tree)
    kept = {20, 23, 26, 29}  # the path 0 -> 3 -> 6 -> 9 of the tree
    session.drop([row.id for row in tree if row.id not in kept])
    found = session.run([Row(40, 29, tokens[50])])
    path = [*tokens[:20], *(tokens[20 + id - 20] for id in sorted(kept)), tokens[50]]
    alone = Session(whole).run(make_chain(path))
    np.testing.assert_array_equal(found[0], alone[-1])


@pytest.mark.parametrize("num_blocks", [0, 3])
def test_a_cancelled_forward_ends_between_blocks_and_spoils_nothing(
    whole: StageRunner, tokens: list[int], num_blocks: int
) -> None:
    chain = make_chain(tokens[:20])
    tree = make_tree(chain, tokens[20:])
    dead = [row.id for row in tree if row.id not in {20, 23, 26, 29}]  # off the path 0 -> 3 -> 6 -> 9 of the tree

    def pruned() -> Session:
        session = Session(whole)
        session.run(chain)
        session.run(tree)
        session.drop(dead)
        return session

    session = pruned()
    answers = [False] * num_blocks + [True]
    given_up = session.run([Row(40, 23, tokens[50])], is_cancelled=lambda: answers.pop(0))
    assert not answers, "it ended before it was told to"
    assert given_up.shape == (1, whole._geometry.hidden_size)
    session.drop([40])
    found = session.run([Row(41, 29, tokens[51])])
    np.testing.assert_array_equal(found, pruned().run([Row(41, 29, tokens[51])]))


def test_slots_may_run_past_the_context_while_positions_do_not(
    whole: StageRunner, bundle: Bundle, tokens: list[int]
) -> None:
    max_context = bundle.manifest.geometry.max_context
    session = Session(whole, capacity=max_context + 1024)
    chain = make_chain((tokens * 20)[: max_context - 1])
    for start in range(0, len(chain), 128):
        session.run(chain[start : start + 128])
    for start in range(max_context, max_context + 512, 128):
        leaves = [Row(start + i, chain[-1].id, tokens[i % 64]) for i in range(128)]
        found = session.run(leaves)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[0], found[64])  # the same token at the same place


def test_a_session_goes_on_after_a_longer_one_came(bundle: Bundle, whole: StageRunner, tokens: list[int]) -> None:
    """Its bindings keep the rotary tables that it began with."""
    chain = make_chain(tokens[:20])
    expected = Session(whole).run(chain)
    stage = StageRunner(bundle.directory, bundle.manifest, 0, NUM_LAYERS)
    short = Session(stage, capacity=40)
    found = [short.run(chain[:10])]
    for session, capacity in ((2, 60), (3, 4000)):
        stage.open_cache(session, capacity)
        stage.run(_forward(session, chain[:3]))
    half_head = bundle.manifest.geometry.head_dim // 2
    reused = [np.full((128, half_head), np.nan, np.float32) for _ in range(50)]  # where freed tables were
    found.append(short.run(chain[10:]))
    np.testing.assert_array_equal(np.concatenate(found), expected)
    del reused


def test_long_rotary_tables_go_back_with_the_last_session(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle, whole: StageRunner, tokens: list[int]
) -> None:
    monkeypatch.setattr(rotary, "KEPT_SLOTS", 256)  # whole pages
    chain = make_chain(tokens[:20])
    expected = Session(whole).run(chain)
    stage = StageRunner(bundle.directory, bundle.manifest, 0, NUM_LAYERS)
    for session in (1, 2):
        stage.open_cache(session, 2000)
        stage.run(_forward(session, chain[:3]))
    num_filled = []
    for session in (1, 2):
        stage.free_cache(session)
        num_filled.append(stage._rotary.reach(0)._num_filled)
    assert num_filled == [rotary.BLOCK_SLOTS, 256]
    np.testing.assert_array_equal(Session(stage).run(chain), expected)


def test_rows_are_written_to_memory_of_their_own(bundle: Bundle, whole: StageRunner, tokens: list[int]) -> None:
    """Not over rows that came in, nor over those of another chunk or session."""
    chain = make_chain(tokens[:30])
    expected = Session(whole).run(chain)
    first = StageRunner(bundle.directory, bundle.manifest, 0, 4)
    later = StageRunner(bundle.directory, bundle.manifest, 4, 8)
    found = []
    for session, num_rows in ((1, 10), (2, 1), (1, 30)):
        for stage in (first, later):
            stage.open_cache(session, 100)
        forward = _forward(session, chain[:num_rows])
        hidden = first.run(forward).hidden
        hidden.flags.writeable = False  # as rows are that came in a message
        before = hidden.copy()
        found.append(later.run(dataclasses.replace(forward, hidden=hidden)).hidden)
        np.testing.assert_array_equal(hidden, before)
    for rows in found:
        np.testing.assert_array_equal(rows, expected[: len(rows)])


def _forward(session: int, rows: Sequence[Row]) -> RunForward:
    """A chain from the first slot on."""
    slots = KvSlots(100)
    return RunForward(session, tuple(rows), None, slots.place(rows))


def test_a_closed_runner_holds_nothing_that_takes_memory(bundle: Bundle, tokens: list[int]) -> None:
    runner = StageRunner(bundle.directory, bundle.manifest, 0, NUM_LAYERS)
    runner.open_cache(1, 100)
    runner.run(_forward(1, make_chain(tokens[:4])))
    cache = runner._sessions[1].cache
    large = [*(graph for _, _, graph in runner._blocks), runner._embedding, *cache._kept]
    del cache
    freed = [weakref.ref(each) for each in large]
    del large
    gc.disable()
    try:
        runner.close()
        assert [each() for each in freed] == [None] * len(freed)
    finally:
        gc.enable()
    runner.free_cache(1)


def test_a_view_with_gaps_is_refused() -> None:
    with pytest.raises(StageFailedError, match="has gaps"):
        as_ort_value(np.zeros((4, 8), np.float32)[:, ::2])


def test_a_range_that_is_not_of_whole_blocks_is_refused(bundle: Bundle) -> None:
    with pytest.raises(PlacementError, match=r"layers \[3, 9\) cannot be cut"):
        StageRunner(bundle.directory, bundle.manifest, 3, 9)


def test_a_block_that_is_no_graph_is_named(bundle: Bundle, tmp_path: Path) -> None:
    broken = shutil.copytree(bundle.directory, tmp_path / "broken")
    (broken / "blocks/layers-002-003.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"layers-002-003\.onnx: not a graph"):
        StageRunner(broken, bundle.manifest, 2, 3)


def test_a_forward_that_fails_is_a_failed_stage(bundle: Bundle, tokens: list[int]) -> None:
    stage = StageRunner(bundle.directory, bundle.manifest, 1, 2)
    stage.open_cache(1, 100)
    forward = _forward(1, make_chain(tokens[:3]))
    nowhere = dataclasses.replace(forward.placement, positions=np.full(3, 10**6))
    hidden = np.zeros((3, bundle.manifest.geometry.hidden_size), np.float32)
    forward = dataclasses.replace(forward, hidden=hidden, placement=nowhere)
    with pytest.raises(StageFailedError, match=r"layers \[1, 2\) failed"):
        stage.run(forward)


def test_a_cache_that_cannot_grow_is_refused_by_name(
    bundle: Bundle, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session keeps what it has, and others go on."""
    stage = StageRunner(bundle.directory, bundle.manifest, 0, 2)
    chain = make_chain((tokens * 3)[:130])
    session, other = Session(stage), Session(StageRunner(bundle.directory, bundle.manifest, 0, 2))
    session.run(chain[:128])
    stage.open_cache(2, 100)

    monkeypatch.setattr(kv_cache, "memory_left", lambda: 1000)
    with pytest.raises(CacheFullError, match=r"no memory for a KV cache of 129 slots \(\d+ bytes are needed, 1000 are"):
        session.run(chain[128:129])
    monkeypatch.undo()
    other.run(chain[:128])
    stage.run(_forward(2, chain[:3]))
    session.slots.drop([128])
    np.testing.assert_array_equal(session.run([Row(129, 127, 5)]), other.run([Row(129, 127, 5)]))


def test_rows_run_one_by_one_where_chunks_change_their_bits(
    bundle: Bundle, tokens: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chain = make_chain(tokens[:20])
    expected = Session(StageRunner(bundle.directory, bundle.manifest, 0, 2)).run(chain)
    monkeypatch.setattr(row_check, "gives_rows_the_same_bits", lambda *block: False)
    stage = StageRunner(bundle.directory, bundle.manifest, 0, 2, num_threads=2)
    assert [record.message.split()[1] for record in caplog.records] == ["2", "1", "bits"]
    ran: list[int] = []
    place = stage._place

    def place_and_count(session: Any, placement: Placement) -> Any:
        ran.append(len(placement.positions))
        return place(session, placement)

    monkeypatch.setattr(stage, "_place", place_and_count)
    np.testing.assert_array_equal(Session(stage).run(chain), expected)
    assert ran == [1] * 20


def test_rows_are_tapped_where_they_enter_a_layer_and_only_where_that_is_asked(
    bundle: Bundle, tokens: list[int]
) -> None:
    assert bundle.manifest.drafter is not None
    drafter = dataclasses.replace(bundle.manifest.drafter, taps=[0, 3, 8])
    manifest = dataclasses.replace(bundle.manifest, drafter=drafter)
    before, stage = (StageRunner(bundle.directory, manifest, *layers) for layers in ((0, 2), (2, NUM_LAYERS)))
    for runner in (before, stage):
        runner.open_cache(1, 100)
    forward = _forward(1, make_chain(tokens[:10]))
    forward = dataclasses.replace(forward, hidden=before.run(forward).hidden.copy())
    tapped = dataclasses.replace(forward, is_tapped=True)
    assert not stage.run(forward).tapped
    third = StageRunner(bundle.directory, manifest, 2, 3)
    third.open_cache(1, 100)
    found = stage.run(tapped).tapped
    assert list(found) == [3], "of its own layers"
    np.testing.assert_array_equal(found[3], third.run(forward).hidden)
    assert not stage.run(tapped, lambda: True).tapped, "given up"


def test_all_caches_are_freed_at_once(bundle: Bundle, tokens: list[int]) -> None:
    stage = StageRunner(bundle.directory, bundle.manifest, 0, 1)
    for session in (1, 2):
        stage.open_cache(session, 100)
    stage.free_caches()
    assert not stage.run(_forward(1, make_chain(tokens[:4]))).hidden.any(), "a session that is closed runs nothing"


def test_a_session_goes_on_from_the_cache_of_an_ended_one(
    bundle: Bundle, whole: StageRunner, tokens: list[int]
) -> None:
    """Its rows are the same to the last bit, where those behind the first ones belong to another text."""
    chain = make_chain(tokens[:40])
    expected = Session(whole).run(chain)
    for is_half in (False, True):
        stage = StageRunner(bundle.directory, bundle.manifest, 0, NUM_LAYERS, has_half_cache=is_half)
        stage.open_cache(1, 100)
        slots = KvSlots(100)
        rows = (*chain[:10], Row(90, 9, 3), *chain[10:25])
        anew = stage.run(RunForward(1, rows, None, slots.place(rows))).hidden
        moves = slots.keep([row.id for row in chain[:25]])
        stage.keep_cache(1, moves)
        assert stage._kept.num_bytes > 0 and not stage._sessions
        stage.open_cache(2, 300)
        assert stage.take_over_cache(2, 1) and not stage.take_over_cache(2, 1)
        placement = KvSlots(300, 20).place(chain[20:])
        found = stage.run(RunForward(2, tuple(chain[20:]), None, placement)).hidden
        if is_half:
            np.testing.assert_array_equal(found[:5], anew[21:])
        else:
            np.testing.assert_array_equal(found, expected[20:])
        stage.free_caches()
        assert stage._kept.num_bytes == 0


def test_what_is_kept_makes_room_the_oldest_first(
    bundle: Bundle, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, chain = StageRunner(bundle.directory, bundle.manifest, 0, NUM_LAYERS), make_chain(tokens[:4])
    for session in (1, 2, 3):
        stage.open_cache(session, 100)
        stage.run(_forward(session, chain))
        stage.keep_cache(session, ())
    one = stage._kept.num_bytes // 3
    monkeypatch.setattr(kv_cache, "memory_left", lambda: 0 if stage._kept.num_bytes > one else 2**30)
    stage.open_cache(4, 100)
    stage.run(_forward(4, chain))
    for session in (1, 2):
        assert not stage.take_over_cache(4, session)
    monkeypatch.setattr(kv_cache, "memory_left", lambda: 0)
    stage.open_cache(5, 100)
    with pytest.raises(CacheFullError, match="no memory for a KV cache of 4 slots"):
        stage.run(_forward(5, chain))
    assert stage._kept.num_bytes == 0, "all of it was given for that"


def test_a_kept_cache_goes_with_its_session_and_a_free_one_is_not_kept(bundle: Bundle, tokens: list[int]) -> None:
    stage = StageRunner(bundle.directory, bundle.manifest, 0, NUM_LAYERS)
    for session in (1, 2):
        stage.open_cache(session, 100)
        stage.run(_forward(session, make_chain(tokens[:4])))
    stage.keep_cache(1, ())
    stage.free_cache(1)
    stage.free_cache(2)
    stage.keep_cache(2, ())
    assert stage._kept.num_bytes == 0
    stage.open_cache(3, 100)
    assert not stage.take_over_cache(3, 1) and not stage.take_over_cache(3, 2)
