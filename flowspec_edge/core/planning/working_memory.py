"""The memory that texts take beside weights: caches, and what is there while a chunk is computed.

``python -m benchmarks.memory`` shows what is taken beside what is planned.
"""

from __future__ import annotations

from flowspec_edge.core.limits import GROUP_ROWS, MAX_PREFILL_ROWS
from flowspec_edge.core.speculation.verify import NUM_KEPT_POSITIONS
from flowspec_edge.manifest import Geometry, Manifest

VALUE_BYTES = 4
"""Caches, rows, scores and masks are float32; sums of bytes are int32."""
NUM_HIDDEN = 5
"""How many times the rows between layers are there at once: as they enter and leave a layer, normed, and added."""
NUM_INNER = 6
"""How many times the rows within an MLP are there at once: as products, and before and behind the activation function
(onnxruntime 1.32).
"""
NUM_INNER_ROUNDED = {"w8a8": 15, "q8": 9, "int4": 9, "own": 9}
"""The same where columns are multiplied apart, and added. In w8a8 gate and up are one product, of integers first."""
NUM_SCORES = 5
"""How many times the scores of a group of rows are there at once: as products, masked, and as weights."""
HEAD_ROWS = 64
"""The rows of a chunk of drafts, which the head takes together; longer ones are rare."""
NUM_LOGITS = 2
"""How many times logits are there at once: as such, and as log-probabilities."""


def kv_cache_bytes(geometry: Geometry, num_layers: int, num_slots: int) -> int:
    """Bytes of the keys and values of one session. Each value has a 1 behind it."""
    return num_layers * num_slots * geometry.num_kv_heads * (2 * geometry.head_dim + 1) * VALUE_BYTES


def stage_work_bytes(geometry: Geometry, precision: str, num_slots: int) -> int:
    """What a stage takes for a session of ``num_slots`` beside weights and cache.

    One layer runs at a time, and attention before its MLP. Before that, the cache may have grown, an array at a time.
    """
    inner = NUM_INNER_ROUNDED.get(precision, NUM_INNER)
    of_mlp = MAX_PREFILL_ROWS * inner * geometry.intermediate_size
    of_attention = GROUP_ROWS * NUM_SCORES * geometry.num_heads * num_slots
    largest = max(VALUE_BYTES * max(of_mlp, of_attention), kv_cache_bytes(geometry, 1, num_slots) // 2)
    hidden = MAX_PREFILL_ROWS * NUM_HIDDEN * geometry.hidden_size
    masks = MAX_PREFILL_ROWS * 2 * len(geometry.ropes) * num_slots
    tables = geometry.head_dim * len(geometry.ropes) * num_slots
    return largest + VALUE_BYTES * (hidden + masks + tables)


def origin_work_bytes(manifest: Manifest, num_slots: int) -> int:
    """What head and drafter take for a session of ``num_slots`` beside their weights: the noise of draws, logits, and
    the draft head's cache and passes, which are taken for as wide as the target's layers.

    The head's attention is one operator, which has the scores of all rows at once.
    """
    geometry, drafter = manifest.geometry, manifest.drafter
    noise, logits = NUM_KEPT_POSITIONS * geometry.vocab_size, HEAD_ROWS * NUM_LOGITS * geometry.vocab_size
    if drafter is None:
        return VALUE_BYTES * (noise + logits)
    cache = 2 * num_slots * drafter.num_kv_heads * drafter.head_dim
    of_a_row = NUM_HIDDEN * geometry.hidden_size + NUM_INNER * geometry.intermediate_size
    one_pass = MAX_PREFILL_ROWS * (of_a_row + (drafter.num_heads + 2) * num_slots)  # 2: its masks
    return VALUE_BYTES * (noise + cache + max(logits, one_pass))
