"""Small tokenizers of every kind that models bring, as GGUF metadata and as files that llama.cpp loads."""

import io
import json
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from exporter.gguf.tokenizer import TokenType
from tests.many_texts import many_texts

BOS, END, UNKNOWN, TOOL, RUN, WHOLE = "<s>", "<|im_end|>", "<unk>", "<tool_call>", "    ", "wholly"
SPECIAL = [BOS, END, UNKNOWN]
SAID = [*SPECIAL, TOOL, RUN, WHOLE, "<|im_end", "<s", f"{BOS}{BOS}", f"{END}\n"]
"""What the texts that are compared say, beside words: tokens that are special or added, and what only looks like it."""

_WIDTH = 32
_ADD: dict[type, Callable[[gguf.GGUFWriter, str, Any], None]] = {
    bool: gguf.GGUFWriter.add_bool,
    int: gguf.GGUFWriter.add_uint32,
    str: gguf.GGUFWriter.add_string,
    list: gguf.GGUFWriter.add_array,
}


@cache
def _trained_bytes() -> dict[str, Any]:
    """Tokens and merges of bytes, trained without cutting text into words: so merges join what a pre-tokenizer parts,
    and any cut in a wrong place shows.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1800, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(many_texts(1500, seed=1), trainer)
    return {"tokens": sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id), "merges": _merges_of(tokenizer)}


def _merges_of(tokenizer: Tokenizer) -> list[str]:
    return [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def byte_level(pre: str, **changes: Any) -> dict[str, Any]:
    """Metadata of a byte-level tokenizer: special tokens first as in SmolLM, an added one and a run of spaces last.

    WHOLE is a token that no merges make.
    """
    trained = _trained_bytes()
    normal = [*trained["tokens"], WHOLE]
    tokens = [BOS, END, UNKNOWN, *normal, TOOL, RUN]
    types = [TokenType.CONTROL] * 3 + [TokenType.NORMAL] * len(normal) + [TokenType.USER_DEFINED] * 2
    return _metadata("gpt2", tokens, types, pre=pre, merges=trained["merges"], **changes)


@cache
def trained_pieces() -> bytes:
    """A SentencePiece model like Llama's: BPE with a token for each byte."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.replace("\n", " ") for text in many_texts(1500, seed=1)),
        model_writer=model,
        model_type="bpe",
        vocab_size=1800,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=[TOOL],
        control_symbols=[END],
        split_digits=True,
        minloglevel=2,
    )
    return model.getvalue()


def sentence_pieces(added: Sequence[str] = (), **changes: Any) -> dict[str, Any]:
    """Metadata of a SentencePiece tokenizer, whose ids are in no order; added tokens come last, as Gemma's runs do."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained_pieces())
    kinds = [
        (pieces.IsUnknown, TokenType.UNKNOWN),
        (pieces.IsControl, TokenType.CONTROL),
        (pieces.IsByte, TokenType.BYTE),
        (pieces.IsUnused, TokenType.UNUSED),
        (lambda token: pieces.IdToPiece(token) == TOOL, TokenType.USER_DEFINED),
    ]
    ids = list(range(pieces.GetPieceSize()))
    random.Random(0).shuffle(ids)
    types = [next((kind for is_kind, kind in kinds if is_kind(token)), TokenType.NORMAL) for token in ids]
    scores = [pieces.GetScore(token) for token in ids] + [-1000.0] * len(added)
    types += [TokenType.USER_DEFINED] * len(added)
    return _metadata("llama", [*map(pieces.IdToPiece, ids), *added], types, scores=scores, **changes)


def _metadata(model: str, tokens: Sequence[str], types: Sequence[int], **fields: Any) -> dict[str, Any]:
    ids = {f"{name}_token_id": tokens.index(text) for name, text in (("bos", BOS), ("eos", END))}
    named = {"model": model, "tokens": list(tokens), "token_type": list(map(int, types)), **ids, **fields}
    return {f"tokenizer.ggml.{name}": value for name, value in named.items()}


def write_model(path: Path, metadata: dict[str, Any]) -> Path:
    """A model of one layer with this tokenizer, which llama.cpp loads."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": _WIDTH,
        "feed_forward_length": _WIDTH,
        "attention.head_count": 1,
        "attention.head_count_kv": 1,
    }.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for name, value in metadata.items():
        _ADD[type(value)](writer, name, value)
    square, row = np.zeros((_WIDTH, _WIDTH), np.float32), np.ones(_WIDTH, np.float32)
    writer.add_tensor("token_embd.weight", np.zeros((len(metadata["tokenizer.ggml.tokens"]), _WIDTH), np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", row)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", square)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
