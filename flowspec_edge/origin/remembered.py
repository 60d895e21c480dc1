"""What an origin remembers of a bundle from one run to the next: where its layers were, and what its drafts brought."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from flowspec_edge.core.planning.draft_gain import MOST, REMEMBERED_TOKENS, DraftGain
from flowspec_edge.core.planning.placement import LoadedLayers, Plan
from flowspec_edge.errors import StateError
from flowspec_edge.files import read_private, state_directory, write_private

PLACEMENTS, GAINS = "placements", "draft-gains"

_log = logging.getLogger(__name__)


def load_placement(digest: str) -> dict[str, LoadedLayers]:
    """Which node served which layers of that bundle last: its weights lie there."""
    try:
        kept = _load(PLACEMENTS, digest) or {}
        return {str(name): LoadedLayers(int(a), int(b), str(precision)) for name, (a, b, precision) in kept.items()}
    except (StateError, ValueError, TypeError, AttributeError) as cause:
        _log.warning("the last placement is not used: %s", cause)
        return {}


def keep_placement(digest: str, plan: Plan) -> None:
    """For the next plan, which moves layers as little as possible."""
    _keep(PLACEMENTS, digest, {stage.node: [stage.start, stage.stop, stage.precision] for stage in plan.stages})


def load_draft_gain(digest: str) -> DraftGain:
    """What the drafts of that bundle have brought so far."""
    try:
        if (kept := _load(GAINS, digest)) is None:
            return DraftGain()
        gain = DraftGain(float(kept["factor"]), int(kept["num_tokens"]))
        if not (0 <= gain.factor <= MOST and 0 <= gain.num_tokens <= REMEMBERED_TOKENS):
            raise ValueError(f"{gain} is out of range")
        return gain
    except (StateError, ValueError, KeyError, TypeError) as cause:
        _log.warning("what drafts have brought so far is not used: %s", cause)
        return DraftGain()


def learn_draft_gain(digest: str, factor: float, num_tokens: int) -> None:
    """A text of so many tokens had this factor of :class:`DraftGain`. It is for the next plan."""
    gain = load_draft_gain(digest).with_text(factor, num_tokens)
    _keep(GAINS, digest, {"factor": round(gain.factor, 4), "num_tokens": gain.num_tokens})


def _load(what: str, digest: str) -> Any:
    """None where nothing is kept."""
    text = read_private(_path(what, digest))
    return json.loads(text) if text else None


def _keep(what: str, digest: str, kept: object) -> None:
    try:
        write_private(_path(what, digest), json.dumps(kept) + "\n")
    except StateError as cause:
        _log.warning("nothing is kept in %s: %s", what, cause)


def _path(what: str, digest: str) -> Path:
    return state_directory() / what / f"{digest[:16]}.json"
