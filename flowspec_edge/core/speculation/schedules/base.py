"""What a schedule may decide, and what happens where it does not care."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from flowspec_edge.core.speculation.generation import Generation


class Schedule:
    """A policy over the machinery of one generation, whose public attributes it reads."""

    uses_drafter: ClassVar[bool] = True
    uses_lookup: ClassVar[bool] = False
    """Whether repetitions of the text are drafts as well."""
    is_calibrated: ClassVar[bool] = False
    """Whether scores are chances of acceptance as observed, or the drafter's own probabilities."""
    is_coupled: ClassVar[bool] = False
    """Whether drafts are ranked by their chance of being drawn, with the very noise that the target will be sampled with."""

    cancels: ClassVar[bool] = False
    """Whether a stage gives up a forward none of whose rows lives any more."""

    def __init__(self, num_stages: int) -> None:
        self.num_stages = num_stages
        self.turn = 0
        """The turn that the next chunk belongs to; 0 where there are no turns."""

    def choose_rows(self, generation: Generation, now: float) -> list[int]:
        """Draft ids of the next chunk, parents before children; empty to wait."""
        raise NotImplementedError

    def choose_pass(self, generation: Generation, now: float) -> list[int] | None:
        """Drafted rows for the drafter's next pass, to which verified rows are added; None for no pass now."""
        return None

    def may_verify(self, generation: Generation) -> bool:
        """Whether returned rows may be verified now."""
        return True

    def next_time(self) -> float | None:
        """When to ask for rows again though nothing has happened, if the last answer was to wait."""
        return None

    def next_turn(self, generation: Generation, has_credit: bool) -> int | None:
        """The number of the turn that begins now, if one does."""
        return None

    def take_verified(self, generation: Generation, num_tokens: int, now: float) -> None:
        """Tokens were accepted and the root has moved."""
