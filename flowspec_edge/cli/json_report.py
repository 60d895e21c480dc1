"""What a command with ``--json`` prints where it fails: one JSON object too, of what it has done and why it ended."""

from __future__ import annotations

import json
from typing import Any

from flowspec_edge.errors import FlowspecError


class PartlyDoneError(FlowspecError):
    """A command failed in the middle. ``report`` is what it has done, as far as JSON tells it."""

    def __init__(self, report: dict[str, Any], cause: FlowspecError) -> None:
        super().__init__(str(cause))
        self.report, self.cause = report, cause


def print_failure(error: FlowspecError) -> None:
    """Print the report of a command that ended in this error."""
    report, cause = (error.report, error.cause) if isinstance(error, PartlyDoneError) else ({}, error)
    print(json.dumps({**report, "error": {"type": type(cause).__name__, "message": str(cause)}}), flush=True)
