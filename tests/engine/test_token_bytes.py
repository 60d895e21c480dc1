"""How much text a token can stand for, for the kinds of tokenizers that models bring."""

from typing import Any

import pytest

from flowspec_edge.engine.token_bytes import NFC_BYTES, max_token_bytes

BYTES = {chr(0x100 + byte): byte for byte in range(256)} | {"<eight->": 256}
FALLBACK = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁▁▁▁": 256}
BYTE_LEVEL = {"type": "ByteLevel"}
NFC = {"type": "NFC"}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def tokenizer(vocab: Any = BYTES, pre_tokenizer: Any = BYTE_LEVEL, added: Any = (), **changes: Any) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": vocab, "byte_fallback": vocab is FALLBACK, **changes.pop("model", {})}
    return {"model": model, "pre_tokenizer": pre_tokenizer, "added_tokens": list(added), **changes}


def sequence(name: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", name: list(steps)}


SPLIT = {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated"}
KNOWN = {
    "as GPT-2": (tokenizer(), 8),
    "as Llama 3": (tokenizer(pre_tokenizer=sequence("pretokenizers", SPLIT, BYTE_LEVEL)), 8),
    "as Qwen": (tokenizer(normalizer=NFC), 8 * NFC_BYTES),
    "as Llama 2": (tokenizer(FALLBACK, None, normalizer=sequence("normalizers", {"type": "Prepend"}, SPACES)), 12),
    "long special token": (tokenizer(added=[{"content": "<|a long one|>"}]), 14),
}


@pytest.mark.parametrize(("content", "num_bytes"), KNOWN.values(), ids=KNOWN.keys())
def test_known_kinds(content: dict[str, Any], num_bytes: int) -> None:
    assert max_token_bytes(content) == num_bytes


UNKNOWN = {
    "another model": tokenizer(model={"type": "Unigram"}),
    "bytes without a token": tokenizer({"a": 0}),
    "unknown characters": tokenizer({"a": 0}, None, model={"unk_token": "a", "fuse_unk": True}),
    "a token that takes spaces with it": tokenizer(added=[{"content": "<x>", "rstrip": True}]),
    "it leaves spaces out": tokenizer(pre_tokenizer=sequence("pretokenizers", {"type": "Whitespace"}, BYTE_LEVEL)),
    "it leaves matches out": tokenizer(
        pre_tokenizer=sequence("pretokenizers", SPLIT | {"behavior": "Removed"}, BYTE_LEVEL)
    ),
    "it shortens": tokenizer(normalizer={"type": "Replace", "pattern": {"String": "aa"}, "content": "a"}),
    "it strips": tokenizer(normalizer={"type": "Strip"}),
}


@pytest.mark.parametrize("content", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_kinds_without_a_known_bound(content: dict[str, Any]) -> None:
    assert max_token_bytes(content) is None
