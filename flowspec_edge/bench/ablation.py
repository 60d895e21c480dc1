"""Shows what each mechanism brings: how much slower ``flowspec`` is without it, with everything else the same."""

from __future__ import annotations

from typing import Any

from flowspec_edge.bench.report import format_table

WHOLE = "flowspec"


def add_shares(report: dict[str, Any]) -> None:
    """Add ``ablation`` to a report: by variant and temperature, the share of flowspec's tokens/s that the variant
    loses.
    """
    whole = report["mean"][WHOLE]
    report["ablation"] = {
        name: {
            temperature: {
                "tokens_per_s": mean["tokens_per_s"],
                "lost": 1 - mean["tokens_per_s"] / whole[temperature]["tokens_per_s"],
            }
            for temperature, mean in by_temperature.items()
            if mean["tokens_per_s"] is not None
        }
        for name, by_temperature in report["mean"].items()
        if name.startswith(f"{WHOLE}-")
    }


def format_shares(report: dict[str, Any]) -> str:
    """A table of what each mechanism brings."""
    temperatures = list(report["mean"][WHOLE])
    lines = [
        [name.removeprefix(f"{WHOLE}-"), *(_cell(by_temperature.get(temperature)) for temperature in temperatures)]
        for name, by_temperature in report["ablation"].items()
    ]
    header = ["variant", *(f"temperature {temperature}" for temperature in temperatures)]
    title = f"mean tokens/s of each variant, and the change against {WHOLE}"
    return f"\n\n{title}\n\n{format_table(header, lines)}"


def _cell(share: dict[str, float] | None) -> str:
    return "-" if share is None else f"{share['tokens_per_s']:.2f} {-share['lost']:+.1%}"
