"""What the head and the draft head cost the origin: time, which is measured once and kept, and memory."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace

from flowspec_edge.bundle import Bundle
from flowspec_edge.core.planning.measured import rounded
from flowspec_edge.core.planning.placement import Device, ModelNeeds
from flowspec_edge.core.speculation.drafting import DraftShape
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.memory import frugal_allocation
from flowspec_edge.engine.timing import RUNTIME, time_draft_ms, time_head_ms
from flowspec_edge.errors import StateError
from flowspec_edge.files import read_private, state_directory, write_private

_log = logging.getLogger(__name__)


def origin_costs(bundle: Bundle, num_threads: int) -> tuple[float, float]:
    """Milliseconds that a run of the head takes, and a pass of the draft head (0 where the bundle has none).

    Raises:
        BundleError: head or drafter cannot be loaded.
    """
    path = state_directory() / "origin" / f"{bundle.digest[:16]}-{num_threads}.json"
    try:
        kept = json.loads(read_private(path) or "{}")
        if kept.get("runtime") == RUNTIME:
            return float(kept["head_ms"]), float(kept["draft_ms"])
    except (StateError, ValueError, KeyError, TypeError, AttributeError) as cause:
        _log.warning("kept times of head and drafter are not used: %s", cause)
    manifest, shape = bundle.manifest, DraftShape()
    head = Head(bundle.directory, manifest, num_threads=num_threads)
    head_ms, draft_ms = rounded(time_head_ms(head, manifest)), 0.0
    if manifest.drafter is not None:
        draft_ms = rounded(time_draft_ms(bundle.directory, manifest, head, shape.width, shape.children, num_threads))
    with frugal_allocation():
        del head
    try:
        write_private(path, json.dumps({"head_ms": head_ms, "draft_ms": draft_ms, "runtime": RUNTIME}) + "\n")
    except StateError as cause:
        _log.warning("times of head and drafter are not kept: %s", cause)
    return head_ms, draft_ms


def with_origin_memory(devices: Sequence[Device], origin: str, model: ModelNeeds) -> list[Device]:
    """The devices, of which the node ``origin`` needs memory for head and drafter beside any stage."""
    return [replace(device, beside_bytes=model.origin_bytes if device.node == origin else 0) for device in devices]
