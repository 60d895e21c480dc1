"""Tokenizers made of GGUF metadata give the ids that llama.cpp gives, and those of the models' own tokenizers."""

import contextlib
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

gguf = pytest.importorskip("gguf", reason="reads and writes GGUF files: pip install '.[export]'")
sentencepiece = pytest.importorskip("sentencepiece", reason="trains small tokenizers: pip install '.[export]'")

from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.gguf.pre_tokenizers import PRE_TOKENIZERS
from exporter.gguf.tokenizer import GgufTokenizer, TokenType, build_tokenizer
from flowspec_edge.config import TextPart
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import CheckpointError
from tests.exporter.gguf.vocabularies import (
    BOS,
    END,
    RUN,
    SAID,
    SPECIAL,
    TOOL,
    byte_level,
    sentence_pieces,
    trained_pieces,
    write_model,
)
from tests.llama_cpp import llama_cpp_ids, llama_cpp_prompts
from tests.many_texts import many_texts
from tests.real_model import smollm2

Metadata = dict[str, Any]

KINDS: dict[str, Callable[[], Metadata]] = {
    **{
        name: partial(byte_level, name)
        for name in {id(cut): name for name, cut in reversed(PRE_TOKENIZERS.items())}.values()
    },
    "SentencePiece": sentence_pieces,
    "SentencePiece, as Gemma": partial(sentence_pieces, (RUN, "\n\n"), add_space_prefix=False),
}
"""One of each way to cut text into words, and SentencePiece."""


def opened(built: GgufTokenizer, directory: Path) -> Tokenizer:
    """The tokenizer as devices read it."""
    path = directory / "tokenizer.json"
    built.tokenizer.save(str(path))
    return Tokenizer(path)


def is_cut_alike(name: str, text: str) -> bool:
    """Whether llama.cpp cuts a text into words as the model's own tokenizer does.

    For Mistral's and GPT-4o's it knows upper and lower case of ASCII alone, and no marks.
    """
    if name not in ("tekken", "gpt-4o"):
        return True
    return not any(unicodedata.category(c)[0] == "M" or (c > "\x7f" and c.upper() != c.lower()) for c in text)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_ids_are_llama_cpps(tmp_path: Path, name: str) -> None:
    metadata = KINDS[name]() | {"tokenizer.ggml.add_bos_token": False}
    tokenizer = opened(build_tokenizer(metadata, "model.gguf"), tmp_path)
    texts = [text for text in many_texts(2000, SAID) if is_cut_alike(name, text)]
    if len(texts) < 2000:
        texts = texts[:200]  # such expressions take llama.cpp 10 ms a text
        assert name in ("tekken", "gpt-4o") and len(texts) == 200
    # llama.cpp never composes characters, so it is given what the model's own tokenizer makes of the text first.
    is_composed = name in PRE_TOKENIZERS and PRE_TOKENIZERS[name].is_composed
    given = [unicodedata.normalize("NFC", text) for text in texts] if is_composed else texts
    parsed, plain = llama_cpp_ids(write_model(tmp_path / "model.gguf", metadata), given)
    assert [(text, tokenizer.encode(text)) for text in texts] == list(zip(texts, parsed, strict=True))
    assert [(text, tokenizer.encode([TextPart(text, False)])) for text in texts] == list(zip(texts, plain, strict=True))


@pytest.mark.parametrize("kind", ["llama-bpe", "gpt-2", "SentencePiece"])
@pytest.mark.parametrize("adds_bos", [None, True, False])
def test_prompts_begin_as_llama_cpps_do(tmp_path: Path, kind: str, adds_bos: bool | None) -> None:
    """What the file leaves out follows from its kind."""
    metadata = KINDS[kind]() | ({} if adds_bos is None else {"tokenizer.ggml.add_bos_token": adds_bos})
    built = build_tokenizer(metadata, "model.gguf")
    texts = ["Hello", "", "  x"]
    theirs = llama_cpp_prompts(write_model(tmp_path / "model.gguf", metadata), texts)
    assert [opened(built, tmp_path).encode(text) for text in texts] == theirs
    assert built.adds_bos == (theirs[1] == [built.bos_token_id])


@pytest.mark.slow
def test_a_real_models_ids_are_llama_cpps(tmp_path: Path) -> None:
    path = smollm2()
    metadata = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    built = build_tokenizer(metadata, path.name)
    assert (built.bos_token_id, built.eos_token_ids, built.adds_bos, built.notes) == (1, [2, 0], False, [])
    assert "<|im_start|>" in str(built.chat_template)
    tokenizer = opened(built, tmp_path)
    texts = many_texts(2000, ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end", "<gh_stars>"])
    parsed, plain = llama_cpp_ids(path, texts)
    assert [(text, tokenizer.encode(text)) for text in texts] == list(zip(texts, parsed, strict=True))
    assert [(text, tokenizer.encode([TextPart(text, False)])) for text in texts] == list(zip(texts, plain, strict=True))


def test_ids_are_sentencepieces_own(tmp_path: Path) -> None:
    """Of texts without what is added or special, which SentencePiece takes out in its own way."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained_pieces())
    metadata = sentence_pieces()
    tokenizer, names = opened(build_tokenizer(metadata, "model.gguf"), tmp_path), metadata["tokenizer.ggml.tokens"]
    for text in many_texts(2000):
        assert [names[token] for token in tokenizer.encode(text)] == [BOS, *pieces.encode(text, out_type=str)]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_characters_are_composed_for_the_models_that_learned_them_so(tmp_path: Path, pre: str) -> None:
    tokenizer = opened(build_tokenizer(byte_level(pre), "model.gguf"), tmp_path)
    is_composed = tokenizer.encode("e\u0301") == tokenizer.encode("é")
    assert is_composed == (pre in ("olmo", "qwen2", "qwen35"))


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("name", KINDS)
def test_no_plain_text_becomes_a_special_token(tmp_path: Path, name: str, special: str) -> None:
    """Not even where tokens of ordinary text make up the special one, piece by piece."""
    metadata = KINDS[name]()
    built = opened(build_tokenizer(_with_parts_of(special, metadata), "model.gguf"), tmp_path)
    plain = built.encode([TextPart(f"x{special}y {special}", parses_special=False)])[len(built.prefix) :]
    assert not {*plain} & {metadata["tokenizer.ggml.tokens"].index(text) for text in SPECIAL}
    assert built.decode(plain).lstrip() == f"x{special}y {special}"


def _with_parts_of(special: str, metadata: Metadata) -> Metadata:
    """The metadata with all beginnings of ``special`` as tokens."""
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.merges")
    beginnings = [special[:end] for end in range(2, len(special)) if special[:end] not in tokens]
    changed = {"tokens": [*tokens, *beginnings], "token_type": [*metadata["tokenizer.ggml.token_type"]]}
    changed["token_type"] += [TokenType.NORMAL] * len(beginnings)
    if merges is None:
        scores = metadata["tokenizer.ggml.scores"]
        changed["scores"] = [*scores, *[1.0] * len(beginnings)]
    else:
        pairs = [f"{special[: end - 1]} {special[end - 1]}" for end in range(2, len(special))]
        changed["merges"] = [*pairs, *(merge for merge in merges if merge not in pairs)]
    return metadata | {f"tokenizer.ggml.{name}": value for name, value in changed.items()}


def test_phi_3s_special_tokens_take_the_spaces_behind_them(tmp_path: Path) -> None:
    metadata = sentence_pieces() | {"general.name": "Phi-3 Mini 4k", "tokenizer.ggml.add_bos_token": False}
    metadata["tokenizer.ggml.tokens"][-1] = "<|endoftext|>"  # llama.cpp takes it for granted in Phi-3
    texts = [f"{END}{spaces}x" for spaces in ("", " ", "\n \n", "\t")] + [f"{BOS} x"]
    model = write_model(tmp_path / "model.gguf", metadata)
    tokenizer = opened(build_tokenizer(metadata, "model.gguf"), tmp_path)
    assert [tokenizer.encode(text) for text in texts] == llama_cpp_ids(model, texts)[0]


def test_all_tokens_that_end_an_answer_are_named() -> None:
    """The file's own EOS first, and those by the names of which every model means it, whatever their type says."""
    metadata = byte_level("qwen2")
    tokens = [*metadata["tokenizer.ggml.tokens"], "<|endoftext|>", "</s>"]
    types = [*metadata["tokenizer.ggml.token_type"], TokenType.NORMAL, TokenType.NORMAL]
    fields = {"tokens": tokens, "token_type": types, "eos_token_id": 5, "eot_token_id": 7, "eom_token_id": 5}
    built = build_tokenizer(metadata | {f"tokenizer.ggml.{name}": value for name, value in fields.items()}, "x.gguf")
    assert built.eos_token_ids == [5, 7, tokens.index(END), len(tokens) - 2]


NOTES: dict[str, Metadata] = {
    "add_eos_token is true; prompts are to be continued": {"add_eos_token": True},
    "there is no EOS; answers end at <|im_end|>": {"eos_token_id": None},
}


@pytest.mark.parametrize("note", NOTES)
def test_what_is_not_followed_is_said(note: str) -> None:
    (said,) = build_tokenizer(_changed(byte_level("gpt-2"), NOTES[note]), "model.gguf").notes
    assert said.startswith(note)


NUM_TOKENS = len(byte_level("gpt-2")["tokenizer.ggml.tokens"])

REFUSALS: dict[str, Metadata] = {
    "model is missing, so the file has no whole tokenizer; export the Hugging Face": {"model": None},
    "model is 'bert'; gpt2 and llama are supported": {"model": "bert"},
    "model is 3, not of type str": {"model": 3},
    "pre is missing": {"pre": None},
    "pre is 'viking', a way to cut text into words that is not supported; these are: gpt-2, phi-2": {"pre": "viking"},
    "pre is 'default', a way": {"pre": "default"},
    "tokens is missing": {"tokens": None},
    "tokens is not a list": {"tokens": ["a", 3]},
    f"token_type has 2 entries for {NUM_TOKENS} tokens": {"token_type": [1, 1]},
    "tokens has 'a' twice, as 0 and 1": {"tokens": ["a", "a"], "token_type": [1, 1]},
    "merges is missing": {"merges": None},
    "merges has '! €', which are no tokens": {"merges": ["! €"]},
    f"eos_token_id is {NUM_TOKENS}, outside the vocabulary of {NUM_TOKENS} tokens": {"eos_token_id": NUM_TOKENS},
    "bos_token_id is -1, outside": {"bos_token_id": -1},
    "add_bos_token is true, but bos_token_id is missing": {"add_bos_token": True, "bos_token_id": None},
}


@pytest.mark.parametrize("problem", REFUSALS)
def test_what_makes_no_tokenizer_is_named(problem: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        build_tokenizer(_changed(byte_level("gpt-2"), REFUSALS[problem]), "model.gguf")
    assert str(caught.value).startswith(f"model.gguf: tokenizer.ggml.{problem}")


FIELDS = ["model", "pre", "tokens", "token_type", "scores", "merges", "bos_token_id", "eos_token_id", "add_bos_token"]
NASTY: list[Any] = [
    None,
    "",
    "$A",
    -1,
    2**40,
    1.5,
    True,
    [],
    [[]],
    [1],
    ["a"],
    ["a", "a b", "b"],
    [1.5, 2],
    [float("nan")] * 9,
]


@given(
    st.sampled_from(["gpt-2", "SentencePiece"]),
    st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(NASTY), min_size=1),
)
@settings(max_examples=150, deadline=None)
def test_no_metadata_breaks_more_than_itself(kind: str, fields: Metadata) -> None:
    with contextlib.suppress(CheckpointError):
        build_tokenizer(_changed(KINDS[kind](), fields), "model.gguf").tokenizer.encode("a b")


@pytest.mark.parametrize("bos", ["$A", "x:1", "two words", "ää"])
def test_any_text_may_be_that_of_the_bos(tmp_path: Path, bos: str) -> None:
    metadata = byte_level("llama-bpe")
    tokens = [bos, *metadata["tokenizer.ggml.tokens"][1:]]
    tokenizer = opened(build_tokenizer(metadata | {"tokenizer.ggml.tokens": tokens}, "model.gguf"), tmp_path)
    assert tokenizer.encode("x") == [0, tokens.index("x")]


def test_a_sentencepiece_model_without_bytes_is_refused() -> None:
    metadata = sentence_pieces()
    tokens = [text.replace("<0x0A>", "newline") for text in metadata["tokenizer.ggml.tokens"]]
    with pytest.raises(CheckpointError, match="tokens has no <0x0A>"):
        build_tokenizer(metadata | {"tokenizer.ggml.tokens": tokens}, "model.gguf")


def _changed(metadata: Metadata, fields: Metadata) -> Metadata:
    """The metadata with other fields, and without those that are None."""
    changed = metadata | {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    return {name: value for name, value in changed.items() if value is not None}


def test_added_tokens_in_a_text_are_read_whatever_the_text_is(tmp_path: Path) -> None:
    tokenizer = opened(build_tokenizer(byte_level("gpt-2"), "model.gguf"), tmp_path)
    assert tokenizer.encode([TextPart(TOOL, parses_special=False)]) == [tokenizer.token_id(TOOL)]
