"""The ways in which byte-level tokenizers cut text into words, by the names that GGUF files have for them.

The regular expressions are those of the tokenizers that the models were trained with. llama.cpp writes some of them
otherwise, since it knows fewer character classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS}|{_END}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SYMBOLS}|{_END}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_END}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (  # a new word begins where a capital follows a small letter
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%(end)s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%(end)s"
    rf"|%(digits)s| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_END}"
)


@dataclass(frozen=True)
class PreTokenization:
    """How text is prepared before its words are made into tokens.

    Attributes:
        steps: how it is cut; bytes become letters in the last one.
        is_composed: whether it is put into composed form (NFC) before. llama.cpp never does that.
        ignores_merges: whether a word that is a token is taken as it is, whatever the merges would make of it.
        adds_bos: whether files that do not say it want a BOS before texts.
    """

    steps: tuple[PreTokenizer, ...]
    is_composed: bool = False
    ignores_merges: bool = False
    adds_bos: bool = False

    @property
    def pre_tokenizer(self) -> PreTokenizer:
        return pre_tokenizers.Sequence(list(self.steps))

    @property
    def normalizer(self) -> Normalizer | None:
        return normalizers.NFC() if self.is_composed else None


def _cut_by(expression: str) -> tuple[PreTokenizer, ...]:
    words = pre_tokenizers.Split(Regex(expression), behavior="isolated")
    return words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


_GPT2 = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),)
_DIGITS = (pre_tokenizers.Digits(individual_digits=True), *_GPT2)

PRE_TOKENIZERS = {
    **dict.fromkeys(("gpt-2", "phi-2"), PreTokenization(_GPT2)),
    "olmo": PreTokenization(_GPT2, is_composed=True),
    **dict.fromkeys(("smollm", "starcoder", "refact", "minerva-7b"), PreTokenization(_DIGITS)),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3"),
        PreTokenization(_cut_by(_LLAMA3), ignores_merges=True, adds_bos=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), PreTokenization(_cut_by(_LLAMA3))),
    "qwen2": PreTokenization(_cut_by(_QWEN2), is_composed=True),
    "qwen35": PreTokenization(_cut_by(_QWEN35), is_composed=True),
    "deepseek-r1-qwen": PreTokenization(_cut_by(_QWEN2)),
    "tekken": PreTokenization(_cut_by(_CASED % {"end": "", "digits": r"\p{N}"}), ignores_merges=True, adds_bos=True),
    **dict.fromkeys(
        ("gpt-4o", "llama4"), PreTokenization(_cut_by(_CASED % {"end": f"{_CONTRACTIONS}?", "digits": r"\p{N}{1,3}"}))
    ),
}
"""By the name in ``tokenizer.ggml.pre``: GPT-2 and Phi-2; OLMo 1; SmolLM, StarCoder 2, Granite; Llama 3; OLMo 2 and
Phi-4; Qwen 2, 2.5 and 3; Qwen 3.5; Mistral Nemo, Small and Ministral; Phi-4-mini and Llama 4.
"""
