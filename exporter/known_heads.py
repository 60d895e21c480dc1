"""The draft heads that come along with this package, each in a directory of ``exporter/heads``."""

from __future__ import annotations

from pathlib import Path

from exporter.fields import read_json
from exporter.source import Source
from exporter.target_digest import FIELD, target_digest
from flowspec_edge.errors import CheckpointError

HEADS = Path(__file__).parent / "heads"


def find_known_head(source: Source, heads: Path = HEADS) -> Path | None:
    """The directory in ``heads`` with the head that was trained for this very model; None where there is none.

    Raises:
        CheckpointError: a head's config cannot be read.
    """
    digest = None
    for path in sorted(heads.glob("*/config.json")):
        try:
            named = read_json(path).get(FIELD)
        except CheckpointError as cause:
            raise damaged_head(path.parent, cause) from cause
        digest = digest or target_digest(source)
        if isinstance(named, dict) and named.get("digest") == digest:
            return path.parent
    return None


def damaged_head(directory: Path, cause: CheckpointError) -> CheckpointError:
    """The same error, with what to do about a head that came along."""
    return CheckpointError(
        f"{cause}; this head came along with flowspec-edge, in {directory}: install flowspec-edge again, or do without "
        "the head, by flowspec-export --drafter none"
    )
