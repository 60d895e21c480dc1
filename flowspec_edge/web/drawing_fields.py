"""The fields that say how tokens are drawn, which every dialect has."""

from __future__ import annotations

import msgspec

from flowspec_edge.web.fields import Whole


class Drawing(msgspec.Struct, kw_only=True):
    """How tokens are drawn, which every dialect can be told: what its own API lacks are extra fields of it."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: Whole | None = None
    schedule: str | None = None
