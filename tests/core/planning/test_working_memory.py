"""What texts take of memory beside weights, in numbers that are worked out by hand."""

import dataclasses

import pytest

from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.core.planning.working_memory import kv_cache_bytes, origin_work_bytes, stage_work_bytes
from flowspec_edge.manifest import load_manifest
from tests.narrowing import present

MANIFEST = load_manifest(DEMO_BUNDLE)
LLAMA_7B = dataclasses.replace(
    MANIFEST.geometry,
    num_layers=32,
    hidden_size=4096,
    intermediate_size=11008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32000,
)


def test_values_of_a_cache_have_a_one_behind_them() -> None:
    assert kv_cache_bytes(LLAMA_7B, 1, 1) == 32 * (128 + 129) * 4
    assert kv_cache_bytes(LLAMA_7B, 8, 4096) == 8 * 4096 * 32 * 257 * 4


@pytest.mark.parametrize(("precision", "largest"), [("fp16", 6 * 11008), ("own", 9 * 11008), ("w8a8", 15 * 11008)])
def test_a_short_text_takes_what_its_longest_chunk_computes(precision: str, largest: int) -> None:
    masks, tables = 2 * 256 * 128, 128 * 128
    assert stage_work_bytes(LLAMA_7B, precision, 128) == 4 * (256 * (largest + 5 * 4096) + masks + tables)


def test_a_long_text_takes_its_scores_or_an_array_that_it_outgrew() -> None:
    beside = 4 * (256 * 5 * 4096 + 2 * 256 * 65536 + 128 * 65536)
    one_array = kv_cache_bytes(LLAMA_7B, 1, 65536) // 2
    assert stage_work_bytes(LLAMA_7B, "w8a8", 65536) == one_array + beside
    grouped = dataclasses.replace(LLAMA_7B, num_kv_heads=2)
    assert stage_work_bytes(grouped, "w8a8", 65536) == 4 * 16 * 5 * 32 * 65536 + beside


def test_layers_with_a_window_have_masks_and_tables_of_their_own() -> None:
    windowed = dataclasses.replace(LLAMA_7B, window=4096)
    more = stage_work_bytes(windowed, "q8", 1024) - stage_work_bytes(LLAMA_7B, "q8", 1024)
    assert more == 4 * (2 * 256 * 1024 + 128 * 1024)


def test_the_origin_has_noise_and_logits_and_with_a_draft_head_its_cache_and_scores() -> None:
    drafter = dataclasses.replace(present(MANIFEST.drafter), num_heads=32, num_kv_heads=8, head_dim=128)
    without = dataclasses.replace(MANIFEST, geometry=LLAMA_7B, drafter=None)
    assert origin_work_bytes(without, 4096) == 4 * 32000 * (64 + 2 * 64)
    cache, one_pass = 2 * 4096 * 8 * 128, 256 * (5 * 4096 + 6 * 11008 + (32 + 2) * 4096)
    beside = dataclasses.replace(without, drafter=drafter)
    assert origin_work_bytes(beside, 4096) == 4 * (32000 * 64 + cache + one_pass)
