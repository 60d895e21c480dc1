"""A tokenizer of every kind that models bring, as devices read them."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import decoders, pre_tokenizers

from exporter.gguf.tokenizer import build_tokenizer
from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.engine.tokenizer import Tokenizer
from tests.exporter.gguf.vocabularies import RUN, byte_level, sentence_pieces

Json = dict[str, Any]


def _built(metadata: Json) -> Json:
    content: Json = json.loads(build_tokenizer(metadata, "model.gguf").tokenizer.to_str())
    return content


def _with_metaspace() -> Json:
    """As transformers converts SentencePiece models since version 4.37."""
    content = _built(sentence_pieces())
    parts = {"normalizer": None, "pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first", split=False)}
    return content | {name: part and json.loads(part.__getstate__()) for name, part in parts.items()}


def _with_metaspace_decoder() -> Json:
    """As transformers converted them before."""
    content = _built(sentence_pieces())
    steps = [
        json.loads(step.__getstate__()) for step in (decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse())
    ]
    return content | {"decoder": {"type": "Sequence", "decoders": steps}}


KINDS: dict[str, Callable[[], Json]] = {
    "bytes, as the demo model": lambda: json.loads((DEMO_BUNDLE / "tokenizer.json").read_text()),
    "bytes, as Llama 3": lambda: _built(byte_level("llama-bpe")),
    "bytes, as Qwen": lambda: _built(byte_level("qwen2")),
    "pieces, as Llama 2": lambda: _built(sentence_pieces()),
    "pieces, as Gemma": lambda: _built(sentence_pieces((RUN, "\n\n"), add_space_prefix=False)),
    "pieces, as transformers has them": _with_metaspace,
    "pieces, as transformers had them": _with_metaspace_decoder,
}


def open_changed(directory: Path, kind: str, change: Callable[[Json], object] = lambda content: None) -> Tokenizer:
    """A tokenizer of this kind, with its file changed."""
    content = copy.deepcopy(KINDS[kind]())
    change(content)
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(content))
    return Tokenizer(path)
