"""The built-in texts, prose and code: what precisions are measured on, and other ones that they are calibrated on."""

from __future__ import annotations

from pathlib import Path

NAME = "built-in prose and code"
_DIRECTORY = Path(__file__).parent / "texts"
_KINDS = "prose", "code"


def measured_texts() -> list[str]:
    """A text of each kind, of more than 1024 tokens in any tokenizer."""
    return _read("measured")


def calibration_texts() -> list[str]:
    """A text of each kind, none of which is in the measured ones."""
    return _read("calibration")


def _read(purpose: str) -> list[str]:
    return [(_DIRECTORY / f"{purpose}_{kind}.txt").read_text(encoding="utf-8") for kind in _KINDS]
