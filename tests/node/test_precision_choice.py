"""By hand goes before planned, planned before chosen, and all of them before a bundle's own."""

from __future__ import annotations

import pathlib

from flowspec_edge.node.precision_choice import FILE_NAME, PrecisionChoice, keep_precision

DIGEST = "d" * 64


def test_by_hand_before_planned_before_chosen() -> None:
    assert PrecisionChoice().of(DIGEST) is None
    keep_precision(DIGEST, "int4")
    assert PrecisionChoice().of(DIGEST) == "int4"
    assert PrecisionChoice().of("e" * 64) is None
    assert PrecisionChoice().of(DIGEST, "w8a8") == "w8a8"
    assert PrecisionChoice("fp32").of(DIGEST, "w8a8") == "fp32"


def test_a_file_that_is_broken_chooses_nothing_and_is_written_anew(state: pathlib.Path) -> None:
    (state / FILE_NAME).write_text("{")
    (state / FILE_NAME).chmod(0o600)
    assert PrecisionChoice().of(DIGEST) is None
    keep_precision(DIGEST, "int4")
    assert PrecisionChoice().of(DIGEST) == "int4"
