"""Measures what a bundle costs on this device, as the figures of a testbed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from flowspec_edge.bench.testbed import DRAFT_PASS_ROWS
from flowspec_edge.bundle import Bundle
from flowspec_edge.core.line import fit_line
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.timing import CHUNK_SIZES, StageUnderTest, time_draft_ms, time_head_ms
from flowspec_edge.errors import BundleError
from flowspec_edge.manifest import Quality

SIZES_IN_USE = (1, 4, 16)
"""The chunk sizes that a ring runs most: a new root, a root with few children, and chunks of its tree."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Measured milliseconds.

    ``fixed_ms`` and ``row_ms`` are per layer, and ``forward_ms`` is the time of all layers by chunk size, both in the
    bundle's own precision. ``precision_ms`` has the time of all layers, by chunk size, for each precision of the bundle
    that runs on this device; ``refused`` says of each other precision why it does not run.
    """

    bundle: str
    num_threads: int
    num_layers: int
    hidden_size: int
    fixed_ms: float
    row_ms: float
    head_ms: float
    draft_pass_ms: float | None
    draft_row_ms: float | None
    forward_ms: dict[int, float]
    precision_ms: dict[str, dict[int, float]]
    refused: dict[str, str]

    @property
    def fastest_precision(self) -> str:
        """The precision with the smallest geometric mean over the chunk sizes in use, in which each
        size counts alike.
        """
        return min(self.precision_ms, key=lambda name: fmean(math.log(ms) for ms in self.precision_ms[name].values()))


def calibrate(
    bundle: Bundle,
    *,
    num_threads: int,
    sizes_in_use: Sequence[int] = SIZES_IN_USE,
    report: Callable[[str], None] = lambda line: None,
) -> Calibration:
    """Measure a bundle. ``report`` is told what is measured next. Precisions are compared at ``sizes_in_use``.

    Raises:
        BundleError: the bundle cannot be loaded.
    """
    directory, manifest = bundle.directory, bundle.manifest
    geometry = manifest.geometry
    own, *others = manifest.precisions
    forward_ms = _forward_ms(bundle, num_threads, own, sorted({*CHUNK_SIZES, *sizes_in_use}), report)
    precision_ms = {own: {size: forward_ms[size] for size in sizes_in_use}}
    refused = {}
    for precision in others:
        try:
            precision_ms[precision] = _forward_ms(bundle, num_threads, precision, sizes_in_use, report)
        except BundleError as cause:  # such as w8a8 on a processor whose sums would be wrong
            refused[precision] = str(cause)
    forward = fit_line(list(forward_ms), list(forward_ms.values()))
    report("head")
    head = Head(directory, manifest, num_threads=num_threads)
    head_ms = time_head_ms(head, manifest)
    draft_pass_ms = draft_row_ms = None
    if manifest.drafter is not None:
        report("draft head")
        draft_pass_ms, wide_ms = (
            time_draft_ms(directory, manifest, head, num_rows, DRAFT_PASS_ROWS, num_threads)
            for num_rows in (DRAFT_PASS_ROWS, 4 * DRAFT_PASS_ROWS)
        )
        draft_row_ms = max(wide_ms - draft_pass_ms, 0.0) / (3 * DRAFT_PASS_ROWS)
    return Calibration(
        bundle=bundle.manifest.name,
        num_threads=num_threads,
        num_layers=geometry.num_layers,
        hidden_size=geometry.hidden_size,
        fixed_ms=forward.fixed / geometry.num_layers,
        row_ms=forward.per_row / geometry.num_layers,
        head_ms=head_ms,
        draft_pass_ms=draft_pass_ms,
        draft_row_ms=draft_row_ms,
        forward_ms=forward_ms,
        precision_ms=precision_ms,
        refused=refused,
    )


def _forward_ms(
    bundle: Bundle, num_threads: int, precision: str, sizes: Sequence[int], report: Callable[[str], None]
) -> dict[int, float]:
    """Milliseconds of all layers by chunk size."""
    num_layers = bundle.manifest.geometry.num_layers
    stage = StageUnderTest(bundle.directory, bundle.manifest, 0, num_layers, num_threads, precision)
    times = {}
    for num_rows in sizes:
        report(f"{num_layers} layers in {precision}, chunks of {num_rows}")
        times[num_rows] = stage.time_ms(num_rows)
    return times


def format_precisions(calibration: Calibration, quality: Sequence[Quality]) -> str:
    """A table of the bundle's precisions as comments of a testbed file: milliseconds by chunk size, and quality."""
    by_name = {entry.precision: entry for entry in quality}
    sizes = list(next(iter(calibration.precision_ms.values())))
    heads = "".join(f"{size:>5} rows" for size in sizes)
    lines = [f"# precision {heads}   same token  perplexity"]
    for name, times in calibration.precision_ms.items():
        figures = "".join(f"{ms:>10.2f}" for ms in times.values())
        entry = by_name.get(name)
        told = f"{entry.greedy_agreement:>13.1%}{entry.perplexity:>12.3f}" if entry else f"{'-':>13}{'-':>12}"
        lines.append(f"# {name:<10}{figures}{told}")
    lines += [f"# {name:<10} does not run here: {reason}" for name, reason in calibration.refused.items()]
    if quality:
        first = quality[0]
        lines.append(
            f"# ms of all layers; quality on {first.num_tokens} tokens of {first.text}, where the checkpoint's own "
            f"weights have perplexity {first.reference_perplexity:.3f}"
        )
    best = calibration.fastest_precision
    lines.append(f"# fastest on this device for chunks of {', '.join(map(str, sizes))}: {best}")
    return "\n".join(lines)


def format_testbed(calibration: Calibration, source: str) -> str:
    """A testbed file that describes this device with all layers, from which users make their own."""
    layers = calibration.num_layers
    lines = [
        f'summary = "{calibration.bundle} on this device"',
        "",
        "[network]",
        "hop_ms = 1.0  # half of what ping says between two boards",
        "rate_mbit_per_s = 1000  # what iperf3 says",
        'source = "not measured: put in your own"',
        "",
        "[model]",
        f"hidden_size = {calibration.hidden_size}",
        "bytes_per_value = 4  # hidden rows travel as float32",
        f'source = "bundle {calibration.bundle}"',
        "",
        "[origin]",
        f"head_ms = {calibration.head_ms:.3f}",
        f"draft_pass_ms = {calibration.draft_pass_ms or 0:.3f}",
        f"draft_row_ms = {calibration.draft_row_ms or 0:.4f}",
        f'source = "{source}"',
        "",
        "[[stages]]",
        'device = "this device"',
        f"num_layers = {layers}",
        f"fixed_ms = {calibration.fixed_ms * layers:.3f}  # {calibration.fixed_ms:.4f} a layer",
        f"row_ms = {calibration.row_ms * layers:.4f}  # {calibration.row_ms:.5f} a layer",
        f'source = "{source}"',
    ]
    return "\n".join(lines)
