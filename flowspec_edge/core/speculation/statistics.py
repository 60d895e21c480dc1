"""What one generation took and brought, in counts."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class GenerationStatistics:
    """Counts of one generation.

    A trip is a chunk that came back; a verification is a trip that yielded at least one token. ``num_rows_sent`` counts
    rows after the prompt, ``num_rows_useful`` those of them that became part of the text. ``num_rows_kept`` are rows of
    the prompt that an earlier session had left at the stages.
    """

    num_tokens: int = 0
    num_trips: int = 0
    num_verifications: int = 0
    num_rows_sent: int = 0
    num_rows_useful: int = 0
    num_draft_passes: int = 0
    num_rows_kept: int = 0

    def __add__(self, other: GenerationStatistics) -> GenerationStatistics:
        """The counts of one text that was written on two rings, one after the other."""
        return GenerationStatistics(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def acceptance_length(self) -> float:
        """Tokens per verification, bonus included: num_tokens / num_verifications."""
        return self.num_tokens / self.num_verifications if self.num_verifications else 0.0
