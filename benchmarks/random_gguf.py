"""Writes GGUF files of random weights in the shapes of real models, one matrix at a time.

What random weights compute means nothing, and takes as long as what trained ones do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

SPREAD = 0.02
"""The standard deviation of weights, as large as in a trained model."""
LEVELS = {"Q4_0": 4.61, "Q8_0": 73.9}
"""The types that are written, and the standard deviation of their levels when all are as frequent."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama model whose embedding is its head as well. ``whole_layers`` are those of the real one."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    whole_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int = 128256
    rope_theta: float = 500000.0
    max_context: int = 2048

    def matrices(self) -> Iterator[tuple[str, int, int]]:
        """Name, outputs and inputs of each."""
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        yield "token_embd", self.vocab_size, self.hidden_size
        for layer in range(self.num_layers):
            yield f"blk.{layer}.attn_q", heads, self.hidden_size
            yield f"blk.{layer}.attn_k", kv_heads, self.hidden_size
            yield f"blk.{layer}.attn_v", kv_heads, self.hidden_size
            yield f"blk.{layer}.attn_output", self.hidden_size, heads
            yield f"blk.{layer}.ffn_gate", self.intermediate_size, self.hidden_size
            yield f"blk.{layer}.ffn_up", self.intermediate_size, self.hidden_size
            yield f"blk.{layer}.ffn_down", self.hidden_size, self.intermediate_size

    def norms(self) -> Iterator[str]:
        yield "output_norm"
        for layer in range(self.num_layers):
            yield from (f"blk.{layer}.attn_norm", f"blk.{layer}.ffn_norm")


def write_random_gguf(shape: ModelShape, kind: str, path: Path) -> Path:
    """Write all matrices of a model in one type of ``LEVELS``. ``path`` appears when the file is whole."""
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama")
    _add_fields(writer, shape)
    _add_vocabulary(writer, shape.vocab_size)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    for name in shape.norms():
        ones = np.ones(shape.hidden_size, np.float32)
        writer.add_tensor_info(f"{name}.weight", ones.shape, ones.dtype, ones.nbytes)
    for name, num_out, num_in in shape.matrices():
        row_bytes = num_in // block_size * block_bytes
        writer.add_tensor_info(
            f"{name}.weight",
            (num_out, row_bytes),
            np.dtype(np.uint8),
            num_out * row_bytes,
            gguf.GGMLQuantizationType[kind],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _ in shape.norms():
        writer.write_tensor_data(np.ones(shape.hidden_size, np.float32))
    random = np.random.default_rng(0)
    for _, num_out, num_in in shape.matrices():
        writer.write_tensor_data(_random_blocks(random, kind, num_out, num_in))
    writer.close()
    return part.replace(path)


def _random_blocks(random: np.random.Generator, kind: str, num_out: int, num_in: int) -> np.ndarray:
    """Stored rows of a matrix, uint8 [num_out, bytes of a row]: each block begins with its scale in float16."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    num_blocks = num_out * num_in // block_size
    blocks = random.integers(0, 256, (num_blocks, block_bytes), np.uint8)
    scale = np.float16(SPREAD / LEVELS[kind])
    blocks[:, :2] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks.reshape(num_out, -1)


def _add_fields(writer: gguf.GGUFWriter, shape: ModelShape) -> None:
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(shape.max_context)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(1e-5)


def _add_vocabulary(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """A token for each byte, one merge, and tokens that no text has."""
    letters = list(gguf_byte_letters())
    tokens = [*letters, "th", "<s>", "</s>"]
    types = [gguf.TokenType.NORMAL] * len(tokens)
    types[-2:] = [gguf.TokenType.CONTROL] * 2
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*tokens, *(f"unused{number}" for number in range(vocab_size - len(tokens)))])
    writer.add_token_types([*types, *[gguf.TokenType.NORMAL] * (vocab_size - len(tokens))])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("</s>"))
    writer.add_add_bos_token(False)


def gguf_byte_letters() -> Iterator[str]:
    """The letters that stand for the bytes 0 to 255 in byte-level vocabularies (GPT-2's ``bytes_to_unicode``)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = iter(range(256, 512))
    for byte in range(256):
        yield chr(byte) if byte in shown else chr(next(hidden))
