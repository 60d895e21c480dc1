"""Manifests from elsewhere: whatever is in them, they are read or refused with a name, and nothing is allocated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.errors import BundleError, is_plain
from flowspec_edge.manifest import MAX_MANIFEST_BYTES, load_manifest, parse_manifest

TEXT = (DEMO_BUNDLE / "manifest.json").read_text()
PATH = Path("bundle/manifest.json")

WRONG: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("geometry", "num_layers"), 10**9, "num_layers is 1000000000; it must lie between 1 and 1024"),
    (("geometry", "hidden_size"), 2**40, "hidden_size is"),
    (("geometry", "vocab_size"), 0, "vocab_size is 0"),
    (("geometry", "max_context"), 2**62, "max_context is"),
    (("geometry", "num_layers"), "8", "Expected `int`, got `str`"),
    (("geometry", "head_dim"), 10**400, "head_dim"),
    (("geometry", "window"), 0, "window is 0; it must lie between 1 and"),
    (("geometry", "rope_frequencies"), [1.0] * 33, "33 rope frequencies for heads of 64 values"),
    (("geometry", "rope_frequencies"), [float("nan")] * 32, "and finite ones"),
    (("drafter", "head_dim"), 2**31, "drafter.head_dim is"),
    (("drafter", "taps"), [[1]], "Expected `int`, got `array`"),
    (("drafter",), [], "field missing or unknown"),
    (("blocks", 0, "memory_bytes"), -5, "memory_bytes is -5"),
    (("drafter", "memory_bytes"), 2**50, "memory_bytes is"),
    (("head", "num_bytes"), 2**50, "expected 1 to 1099511627776"),
    (("blocks",), {"a": 1}, "field missing or unknown"),
    (("alternatives",), [], "field missing or unknown"),
    (("quality",), [[]], "field missing or unknown"),
    (("name",), "demo\x1b[31m", "is no name"),
    (("name",), "x" * 201, "is no name"),
    (("made_with", "torch"), "\u202e", "is no name"),
    (("precision",), "int8\n", "is no name"),
    (("head", "file"), "head\x9b.onnx", "or is no file name"),
    (("chat_template",), 5, "Expected `str | null`, got `int`"),
    (("eos_token_ids",), 5, "Expected `array`, got `int`"),
    (("format_version",), "\x1b[31m", "is newer"),
    (("format_version",), 3, "make it anew: flowspec-export CHECKPOINT --out"),
]


def changed(path: tuple[str | int, ...], value: Any) -> str:
    data = json.loads(TEXT)
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(("path", "value", "text"), WRONG, ids=[".".join(map(str, path)) for path, _, _ in WRONG])
def test_what_no_manifest_has_is_named(path: tuple[str | int, ...], value: Any, text: str) -> None:
    with pytest.raises(BundleError) as refused:
        parse_manifest(changed(path, value), PATH)
    assert text in str(refused.value) and is_plain(str(refused.value)) and len(str(refused.value)) < 500


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, changed(("made_with",), [[[[[]]]]]), "9" * 5000])
def test_nesting_is_refused(text: str) -> None:
    with pytest.raises(BundleError):
        parse_manifest(text, PATH)


def test_a_file_that_is_too_large_is_not_even_read(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(BundleError, match="larger than 1048576 bytes"):
        load_manifest(tmp_path)
