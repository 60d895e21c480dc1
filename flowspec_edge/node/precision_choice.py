"""The precision that this device runs a bundle in: what its user says, what a plan says, or what was chosen here."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

from flowspec_edge.errors import StateError
from flowspec_edge.files import read_private, state_directory, write_private

FILE_NAME = "precisions.json"

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class PrecisionChoice:
    """``by_hand`` is the precision that a node's user has set for all bundles, if any."""

    by_hand: str | None = None

    def of(self, digest: str, planned: str = "") -> str | None:
        """What the layers of a bundle run in: set by hand, planned, or chosen; None for the bundle's own precision."""
        return self.by_hand or planned or chosen_precision(digest)


def chosen_precision(digest: str) -> str | None:
    """What was kept for the bundle of that digest; None where nothing was, or it cannot be read."""
    try:
        chosen = _read().get(digest)
    except StateError as cause:
        _log.warning("%s", cause)
        return None
    return chosen if isinstance(chosen, str) else None


def keep_precision(digest: str, precision: str) -> None:
    """Raises StateError where it cannot be written."""
    write_private(state_directory() / FILE_NAME, json.dumps({**_read(), digest: precision}, indent=1) + "\n")


def _read() -> dict[str, object]:
    try:
        chosen = json.loads(read_private(state_directory() / FILE_NAME) or "{}")
    except ValueError:
        return {}  # only plan_options; the next one writes it anew
    return chosen if isinstance(chosen, dict) else {}
