"""The KV caches of ended sessions, which others may take over. They give way to whoever needs their memory."""

from __future__ import annotations

import threading

from flowspec_edge.engine.kv_cache import KvCache, memory_left


class KeptCaches:
    """Those of all stages of a node, the oldest first. It may be used from any thread.

    Each belongs to a ``stage``, and has the number of its session there.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._caches: dict[tuple[object, int], KvCache] = {}

    @property
    def num_bytes(self) -> int:
        """What all of them take."""
        with self._lock:
            return sum(cache.num_bytes for cache in self._caches.values())

    def keep(self, stage: object, session: int, cache: KvCache) -> None:
        """Keep the cache of a session that has ended."""
        with self._lock:
            self._caches[stage, session] = cache

    def take(self, stage: object, session: int) -> KvCache | None:
        """It is kept no longer. None where it has given way."""
        with self._lock:
            return self._caches.pop((stage, session), None)

    def free_all(self, stage: object) -> None:
        """Those of a stage that has ended."""
        with self._lock:
            for key in [key for key in self._caches if key[0] is stage]:
                del self._caches[key]

    def drop_oldest(self) -> bool:
        """Free the oldest; False where there is none."""
        with self._lock:
            oldest = next(iter(self._caches), None)
            if oldest is not None:
                del self._caches[oldest]
            return oldest is not None

    def make_room(self, num_bytes: int) -> None:
        """Free the oldest until the system has so much memory left, or none is kept any more.

        Takes 0.3 ms per MB that is freed, so it is not for the event loop.
        """
        while memory_left() < num_bytes and self.drop_oldest():
            pass
