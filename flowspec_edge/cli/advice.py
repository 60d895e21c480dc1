"""What the page of a ``flowspec serve`` tells whoever runs the cluster: boards to mend, and how another one joins."""

from __future__ import annotations

import dataclasses
from typing import Any

from flowspec_edge.bundle import Bundle
from flowspec_edge.cli.access import DEFAULT_CLUSTER, Access, open_join_line
from flowspec_edge.cli.api_access import code_rows
from flowspec_edge.cli.run_doctor import look_around
from flowspec_edge.core.cluster.diagnosis import diagnose
from flowspec_edge.core.planning.placement import stage_memory_bytes
from flowspec_edge.net.directory import Directory

MAX_FINDINGS = 12
"""More do not fit beside a chat."""


def advice_of(directory: Directory, bundle: Bundle, access: Access, cluster: str) -> dict[str, Any]:
    """A JSON object: what ``flowspec doctor`` would mend, and the line by which a board joins."""
    needed = min(stage_memory_bytes([block]) for block in bundle.manifest.blocks)
    around = look_around(directory.membership, needed, hears_mdns=directory.mdns_error is None)
    findings = [found for found in diagnose(directory.membership, around) if found.remedy]
    return {
        "findings": [dataclasses.asdict(finding) for finding in findings[:MAX_FINDINGS]],
        "mdns_error": directory.mdns_error,
        "join": join_advice(access, cluster),
    }


def join_advice(access: Access, cluster: str) -> dict[str, Any]:
    """How another board joins, without the cluster's key: whoever may ask the API may not do all that boards may.

    ``code``, of a line that is whole, is the line as a QR code: rows of characters, 1 where it is dark.
    """
    if access.credentials is not None:
        text = "Run this where the server runs. It prints the line for the new board, with the cluster's key in it."
        label = "" if cluster == DEFAULT_CLUSTER else f" Add --cluster {cluster} to that line."
        return {"text": text + label, "command": "flowspec key show"}
    if access.is_insecure and not access.is_loopback:
        line = open_join_line(cluster)
        return {"text": "Run this on the new board.", "command": line, "code": code_rows(line)}
    text = "This server uses this machine alone. With a cluster key, and started again, it takes in other boards."
    return {"text": text, "command": "flowspec key new"}
