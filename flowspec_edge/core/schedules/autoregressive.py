"""Plain pipeline parallelism: one token per trip, nothing drafted."""

from __future__ import annotations

from flowspec_edge.core.drafting import Drafting


class Autoregressive:
    uses_drafter = False

    def __init__(self, num_stages: int) -> None:
        pass

    def choose_rows(self, unsent: list[int], drafting: Drafting, num_in_flight: int) -> list[int]:
        return []

    def wants_pass(self, num_unsent: int, drafting: Drafting, num_in_flight: int) -> bool:
        return False
