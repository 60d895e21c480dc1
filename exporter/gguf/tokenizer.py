"""Makes a ``tokenizer.json`` of the metadata that a GGUF file has of its tokenizer.

Ids are those of llama.cpp (``src/llama-vocab.cpp``), except where the tokenizer that a model was trained with is known
to differ from it: there the model's own counts, and the comment says so. Neither torch nor transformers is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from exporter.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenization
from flowspec_edge.engine.token_texts import SPACE_MARK
from flowspec_edge.errors import CheckpointError, plain_text

_FIELDS = "tokenizer.ggml."
_REMEDY = "export the Hugging Face checkpoint, or convert it to GGUF again with a current llama.cpp"
_ENDS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
)
"""Tokens that end an answer in each model that has them. llama.cpp knows more, such as ``</s>``, which is an HTML tag
in vocabularies where it is not the EOS.
"""


class TokenType(IntEnum):
    """Of a token, as ``tokenizer.ggml.token_type`` has it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer, and what its file says of texts.

    Attributes:
        tokenizer: to be saved as ``tokenizer.json``. It puts the BOS before texts where the file wants one.
        adds_bos: whether it does.
        bos_token_id: None where there is none.
        eos_token_ids: all tokens that end an answer, the file's own EOS first.
        chat_template: in Jinja; None where there is none.
        notes: what in the file contradicts itself or is not followed, as users read it.
    """

    tokenizer: Tokenizer
    adds_bos: bool
    bos_token_id: int | None
    eos_token_ids: list[int]
    chat_template: str | None
    notes: list[str]


def build_tokenizer(metadata: Mapping[str, Any], file: str) -> GgufTokenizer:
    """The tokenizer that a GGUF file describes in its metadata: numbers, texts and lists of them by name.

    Raises:
        CheckpointError: a field is missing or senseless, or the tokenizer is of a kind that is not supported; ``file``
            is named.
    """
    fields = _Fields(metadata, file)
    kind = fields.text("model")
    vocabulary = _Vocabulary(fields)
    match kind:
        case "gpt2":
            cut = _pre_tokenization(fields)
            tokenizer, adds_bos = _byte_level(fields, vocabulary, cut), cut.adds_bos
        case "llama":
            tokenizer, adds_bos = _sentencepiece(fields, vocabulary), True
        case _:
            raise fields.error(f"model is {plain_text(kind)!r:.80}; gpt2 and llama are supported")
    strips = fields.takes_spaces()
    tokenizer.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False, rstrip=strips and text not in _KEEPING_SPACES)
            for text in vocabulary.of_type(*_SPECIAL)
        ]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in vocabulary.of_type(TokenType.USER_DEFINED)])
    bos = fields.token("bos", vocabulary)
    adds_bos = fields.flag("add_bos_token", adds_bos)
    if adds_bos and bos is None:
        raise fields.error(f"add_bos_token is true, but bos_token_id is missing; {_REMEDY}")
    if adds_bos and bos is not None:
        special = {"id": "BOS", "ids": [bos], "tokens": [vocabulary.texts[bos]]}
        tokenizer.post_processor = processors.TemplateProcessing(single="BOS $A", special_tokens=[special])
    ends = vocabulary.ends(fields)
    return GgufTokenizer(tokenizer, adds_bos, bos, ends, fields.chat_template(), list(_notes(fields, vocabulary, ends)))


class _Fields:
    """The fields of a GGUF file's tokenizer, by their names behind ``tokenizer.ggml.``, with their types checked."""

    def __init__(self, metadata: Mapping[str, Any], file: str) -> None:
        self._metadata, self._file = metadata, file

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._file}: tokenizer.ggml.{problem}")

    def text(self, name: str) -> str:
        value = self._metadata.get(_FIELDS + name)
        if value is None:
            raise self.error(f"{name} is missing, so the file has no whole tokenizer; {_REMEDY}")
        return str(self._checked(name, value, str))

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._checked(name, self._metadata.get(_FIELDS + name, default), bool))

    def token(self, name: str, vocabulary: _Vocabulary) -> int | None:
        """The id in the field ``NAME_token_id``; None where it is missing."""
        token = self._metadata.get(f"{_FIELDS}{name}_token_id")
        if token is None:
            return None
        if not 0 <= self._checked(f"{name}_token_id", token, int) < len(vocabulary.texts):
            raise self.error(f"{name}_token_id is {token}, outside the vocabulary of {len(vocabulary.texts)} tokens")
        return int(token)

    def values(self, name: str, kind: type | tuple[type, ...], length: int | None = None) -> Sequence[Any]:
        values = self._metadata.get(_FIELDS + name)
        if values is None:
            raise self.error(f"{name} is missing, so the file has no whole tokenizer; {_REMEDY}")
        if not isinstance(values, Sequence) or isinstance(values, str) or not all(isinstance(v, kind) for v in values):
            raise self.error(f"{name} is not a list of the type that it must be; the file is damaged")
        if length is not None and len(values) != length:
            raise self.error(f"{name} has {len(values)} entries for {length} tokens; the file is damaged")
        return values

    def takes_spaces(self) -> bool:
        """Whether special tokens take the spaces behind them: Phi-3's do, which only the model's name tells."""
        return re.search("phi-?3", str(self._metadata.get("general.name", "")).lower()) is not None

    def chat_template(self) -> str | None:
        template = self._metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    def _checked(self, name: str, value: Any, kind: type) -> Any:
        if not isinstance(value, kind):
            raise self.error(f"{name} is {value!r:.80}, not of type {kind.__name__}; the file is damaged")
        return value


class _Vocabulary:
    """Tokens by id and by text.

    Raises:
        CheckpointError: two ids have the same text.
    """

    def __init__(self, fields: _Fields) -> None:
        texts = fields.values("tokens", str)
        self.texts = [text or f"[EMPTY_{token}]" for token, text in enumerate(texts)]  # as llama.cpp names them
        self.types = list(fields.values("token_type", int, len(texts)))
        self.ids = {text: token for token, text in enumerate(self.texts)}
        for token, text in enumerate(self.texts):
            if self.ids[text] != token:
                raise fields.error(
                    f"tokens has {plain_text(text)!r:.80} twice, as {token} and {self.ids[text]}; the file is damaged"
                )
            if text in _ENDS:  # some files have them as plain text
                self.types[token] = TokenType.CONTROL

    def of_type(self, *types: TokenType) -> Iterator[str]:
        return (text for text, kind in zip(self.texts, self.types, strict=True) if kind in types)

    def ends(self, fields: _Fields) -> list[int]:
        """All tokens that end an answer."""
        named = [fields.token(name, self) for name in ("eos", "eot", "eom")]
        known = [self.ids[text] for text in _ENDS if text in self.ids]
        return list(dict.fromkeys([*(token for token in named if token is not None), *known]))


_SPECIAL = (TokenType.CONTROL, TokenType.UNKNOWN)
_KEEPING_SPACES = ("<unk>", "<s>", "<|endoftext|>")
_NOT_MERGED = (*_SPECIAL, TokenType.BYTE)


def _pre_tokenization(fields: _Fields) -> PreTokenization:
    name = fields.text("pre")
    if name not in PRE_TOKENIZERS:
        raise fields.error(
            f"pre is {plain_text(name)!r:.80}, a way to cut text into words that is not supported; these are: "
            f"{', '.join(PRE_TOKENIZERS)}"
        )
    return PRE_TOKENIZERS[name]


def _byte_level(fields: _Fields, vocabulary: _Vocabulary, cut: PreTokenization) -> Tokenizer:
    merges = [_pair(merge) for merge in fields.values("merges", str)]
    for first, second in merges:
        if not vocabulary.ids.keys() >= {first, second, first + second}:
            raise fields.error(f"merges has {plain_text(f'{first} {second}')!r:.80}, which are no tokens; {_REMEDY}")
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=cut.ignores_merges))
    if cut.is_composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = cut.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    """The two tokens of a merge, between which stands a space; the first one may itself begin with one."""
    at = merge.find(" ", 1)
    return merge[:at], merge[at + 1 :]


def _sentencepiece(fields: _Fields, vocabulary: _Vocabulary) -> Tokenizer:
    missing = next((name for byte in range(256) if (name := f"<0x{byte:02X}>") not in vocabulary.ids), None)
    if missing is not None:
        raise fields.error(f"tokens has no {missing}; SentencePiece models without a token for each byte are not read")
    scores = fields.values("scores", (int, float), len(vocabulary.texts))
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, _merges(vocabulary, scores), byte_fallback=True))
    marks = normalizers.Replace(" ", SPACE_MARK)
    text = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.flag("add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), marks])
        text.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = marks
    tokenizer.decoder = decoders.Sequence(text)
    return tokenizer


def _merges(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """The pairs that make up each token, those of the highest score first, as SentencePiece merges them.

    No merge makes a special token, so no plain text does. In llama.cpp it may.
    """
    made = {text for text in vocabulary.ids if vocabulary.types[vocabulary.ids[text]] not in _NOT_MERGED}
    return [
        (text[:at], text[at:])
        for text in sorted(made, key=lambda text: (-scores[vocabulary.ids[text]], vocabulary.ids[text]))
        for at in range(len(text) - 1, 0, -1)
        if text[:at] in made and text[at:] in made
    ]


def _notes(fields: _Fields, vocabulary: _Vocabulary, ends: Sequence[int]) -> Iterator[str]:
    if fields.flag("add_eos_token", False):
        yield "add_eos_token is true; prompts are to be continued, so none gets an EOS"
    if fields.token("eos", vocabulary) is None:
        known = ", ".join(vocabulary.texts[token] for token in ends)
        yield f"there is no EOS; answers end at {known or 'their greatest length'}"
