"""The numbers that bound what a ring holds. Several modules count on each; none may differ from another."""

from __future__ import annotations

MAX_CHUNK_ROWS = 512
"""Rows of one chunk: 16 MiB of hidden rows for the widest model we know (8192 float32)."""
MAX_LIVING_ROWS = 400
"""Draft rows of one session that the stages hold at most; more of them are hardly ever accepted."""
MAX_TREE_ROWS = 400
"""Draft rows of one session, sent or not, beyond which nothing more is drafted."""
TREE_MARGIN = 512
"""Cache rows beyond the length limit, at stages and in the drafter: for MAX_LIVING_ROWS or MAX_TREE_ROWS, and for dead
rows of which the holder of the cache has not been told yet."""
PREFILL_ROWS = 128
"""Rows of a prefill chunk: enough to amortise a forward, and few enough to keep every stage busy on a long prompt."""
CREDITS_PER_HOP = 2
"""Chunks a sender may have waiting at the next hop: one to start the moment the running one ends, one on the wire."""
MAX_SESSIONS = 64
"""Sessions that one origin may have open at one stage."""
MAX_WAITING_ADVANCES = 1024
"""How many Advances may wait for rows in flight: far more than a ring can hold, and a bound on a broken origin."""

MAX_COUNT = 2**63 - 1
"""The largest number in a message."""
MAX_PASSAGE_S = 3600.0
"""Seconds at one stage: far longer than an origin waits before it takes its ring for lost."""
MAX_PASSAGES = 256
"""Stages that a chunk may have passed: twice as many as the deepest model we know has layers."""
