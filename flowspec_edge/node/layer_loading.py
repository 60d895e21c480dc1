"""How layers that an origin asks for are loaded, whether they serve at once or stand by."""

from __future__ import annotations

from flowspec_edge.bundle import Bundle
from flowspec_edge.core import wire
from flowspec_edge.core.planning.placement import standby_memory_bytes
from flowspec_edge.core.weights.fetching import Source
from flowspec_edge.engine.kept_caches import KeptCaches
from flowspec_edge.engine.stage_runner import Parts, StageRunner
from flowspec_edge.manifest import Manifest
from flowspec_edge.node.precision_choice import PrecisionChoice
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.weights.supply import StageRequest


def requested(request: wire.OpenStage | wire.PrepareLayers, precisions: PrecisionChoice) -> StageRequest:
    """The weights that an origin asks a node to load, in the precision that it would run them in here."""
    sources = tuple(Source.from_text(text) for text in request.sources)
    precision = precisions.of(request.bundle, request.precision)
    return StageRequest(request.bundle, request.start, request.stop, sources, precision)


def digests_of(wanted: StageRequest, manifest: Manifest) -> set[str]:
    """The files of these weights, by sha256."""
    return {entry.sha256 for entry in manifest.stage_files(wanted.start, wanted.stop, wanted.precision)}


def load_runner(
    bundle: Bundle, wanted: StageRequest, settings: NodeSettings, parts: Parts, caches: KeptCaches
) -> StageRunner:
    """The runner of these layers on a node of these settings; ``parts`` are loaded already. What is among ``caches``
    makes room for the layers first.
    """
    caches.make_room(standby_memory_bytes(bundle.manifest.blocks_of(wanted.start, wanted.stop, wanted.precision)))
    return StageRunner(
        bundle.directory,
        bundle.manifest,
        wanted.start,
        wanted.stop,
        num_threads=settings.num_threads,
        precision=wanted.precision,
        has_half_cache=settings.has_half_cache,
        loaded=parts,
        kept=caches,
    )
