"""FlowSpec without a barrier: score-ordered chunks, as many under way as there are stages to work on them."""

from __future__ import annotations

from flowspec_edge.core.drafting import Drafting


class Flowspec:
    uses_drafter = True

    chunk_rows = 16
    """Rows per chunk (FlowSpec, section 4.1: about 16)."""

    def __init__(self, num_stages: int) -> None:
        self._window = num_stages + 1  # one chunk in each stage and one on its way

    def choose_rows(self, unsent: list[int], drafting: Drafting, num_in_flight: int) -> list[int]:
        return unsent[: self.chunk_rows] if num_in_flight < self._window else []

    def wants_pass(self, num_unsent: int, drafting: Drafting, num_in_flight: int) -> bool:
        shape = drafting.shape
        if drafting.passes < shape.depth:
            return True
        starving = num_in_flight < self._window and num_unsent < self.chunk_rows
        return starving and drafting.passes < shape.depth + shape.extra_depth
