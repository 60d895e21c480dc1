"""The paper's tensor-parallel baselines, modelled from what they compute and send. They are not implemented here.

In both, every device computes a share of every layer, and the devices exchange activations inside each layer. Both
draft a tree, verify all of it in one forward, and then draft the next one. So they accept what ``chunked`` accepts on
the same texts, and differ only in the time of a step. The model favours them: work is split without loss in proportion
to each device's speed, and every exchange runs at the full rate of the wire.

* Megatron-LM (Shoeybi et al., arXiv 1909.08053): two all-reduces per layer, each a ring of ``2 (N - 1)`` messages of
  ``1 / N`` of the rows. Nothing overlaps.
* Galaxy (Ye et al., arXiv 2405.17245): two reduce-scatters and two all-gathers per layer, each ``N - 1`` messages, cut
  into tiles so that a tile is sent while the next is computed.
"""

from __future__ import annotations

from dataclasses import replace

from flowspec_edge.bench.compare import Figures
from flowspec_edge.bench.testbed import Testbed

MEGA_LM, GALAXY = "mega-lm", "galaxy"
MODELLED = (MEGA_LM, GALAXY)
EXCHANGES_PER_LAYER = 4
"""Reduce-scatters and all-gathers together. An all-reduce counts as one of each."""


def forward_ms(name: str, testbed: Testbed, num_rows: float) -> float:
    """One forward of the whole model over ``num_rows``, split over all devices of the testbed."""
    num_devices, num_layers = len(testbed.stages), testbed.num_layers
    # The time that each device would take per layer by itself. Together they are as fast as the sum of their speeds.
    alone_ms = [stage.forward_ms(num_rows) / stage.num_layers for stage in testbed.stages]
    layer_ms = 1 / sum(1 / alone for alone in alone_ms)
    message_ms = testbed.hop_ms + testbed.transfer_ms(num_rows * testbed.hidden_bytes / num_devices)
    if name == MEGA_LM:
        return num_layers * (layer_ms + EXCHANGES_PER_LAYER * (num_devices - 1) * message_ms)
    tile_ms = layer_ms / EXCHANGES_PER_LAYER / num_devices
    exchange_ms = tile_ms + (num_devices - 1) * max(tile_ms, message_ms)
    return num_layers * EXCHANGES_PER_LAYER * exchange_ms


def model_figures(name: str, testbed: Testbed, chunked: Figures) -> Figures:
    """The figures that this baseline would have for the texts with which ``chunked`` got its own."""
    # The first verification of each text is of the prompt.
    num_rounds = chunked.num_verifications - chunked.num_generations
    if num_rounds <= 0:
        return replace(chunked, decode_s=0.0, num_decoded=0)
    num_rows = chunked.num_rows_sent / num_rounds
    draft_ms = chunked.num_draft_passes / num_rounds * testbed.draft_pass_ms
    tree_ms = testbed.hop_ms  # token ids and parents, told to all devices at once
    step_ms = draft_ms + tree_ms + forward_ms(name, testbed, num_rows) + testbed.head_ms
    return replace(chunked, decode_s=num_rounds * step_ms / 1000)
