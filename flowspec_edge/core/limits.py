"""The limits of a ring. Several modules rely on each of them, so each is defined once, here."""

from __future__ import annotations

MAX_CHUNK_ROWS = 512
"""Rows of one chunk: 16 MiB of hidden rows for the widest model we know (8192 float32)."""
MAX_LIVING_ROWS = 400
"""The most draft rows of one session that stages hold. Further ones would hardly ever be accepted."""
MAX_TREE_ROWS = 400
"""Where a session has more draft rows than this, sent or not, nothing more is drafted."""
TREE_MARGIN = 512
"""Cache rows that a stage and the drafter have beyond the length limit: for MAX_LIVING_ROWS or MAX_TREE_ROWS draft
rows, and for dead rows of which they have not been told yet."""
RECENT_ROWS = 32
"""How many rows at the end of a row's path, its own included, are attended to wherever they are in the cache; older
ones must be in the slots of their positions. Drafts are less deep than this below the root. The bits of a row depend on
this number, so all nodes of a ring have the same."""
PREFILL_ROWS = 128
"""Rows of a prompt's chunk where nothing is known of the ring, and the most of one that other sessions wait for: enough
to amortise a forward, and few enough to keep every stage busy on a long prompt."""
MAX_PREFILL_ROWS = 256
"""The most rows of a prompt's chunk: with 512 a prompt of 2,000 tokens is through four Jetsons (7B, float16) 3 %
sooner, and what a layer computes between its matrices takes twice the memory."""
GROUP_ROWS = 16
"""Attention takes at most this many rows at once: the scores of more would leave the processor's cache on their way
from one operator to the next. 128 rows after 1024 slots take 18 ms so, and 22 ms at once (32 heads, x86, one thread).
"""
CREDITS_PER_HOP = 2
"""Chunks a sender may have waiting at the next hop: one to start the moment the running one ends, one on the wire."""
MAX_SESSIONS = 64
"""Sessions that one origin may have open at one stage."""
MAX_KEPT_SESSIONS = 64
"""Ended sessions whose rows one origin may have kept at one stage."""
SLOTS_PER_STEP = 128
"""A KV cache has a multiple of this many slots: ONNX Runtime adds up a product in blocks of this many terms, or of a
multiple, and so a block is always at the same slots."""
MAX_WAITING_ADVANCES = 1024
"""How many Advances may wait for rows in flight: far more than a ring holds, and a bound on a broken origin."""

MAX_COUNT = 2**63 - 1
"""The largest number in a message."""
MAX_PASSAGE_S = 3600.0
"""Seconds at one stage: far longer than an origin waits before it takes its ring for lost."""
MAX_PASSAGES = 256
"""Stages that a chunk may have passed: twice as many as the deepest model we know has layers."""
