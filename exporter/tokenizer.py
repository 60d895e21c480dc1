"""Writes a checkpoint's tokenizer as every device reads it: its ``tokenizer.json``, or one converted from
SentencePiece; and tells what in it contradicts the rest of the checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import BundleError, CheckpointError

FAST, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
CONFIG = "tokenizer_config.json"


def find_tokenizer(directory: Path) -> Path:
    """The file that a checkpoint's tokenizer is in.

    Vicuna and other models made from Llama 1 and 2 may have only a SentencePiece model, ``tokenizer.model``.

    Raises:
        CheckpointError: there is no tokenizer file.
    """
    for name in (FAST, SENTENCEPIECE):
        if (directory / name).is_file():
            return directory / name
    raise CheckpointError(f"{directory}: {FAST} is missing, and so is {SENTENCEPIECE}; download the checkpoint again")


def write_tokenizer(source: Path, path: Path) -> Tokenizer:
    """Write the tokenizer in ``source`` to ``path`` as ``tokenizer.json``, and open it.

    Raises:
        CheckpointError: ``source`` is not readable as a tokenizer, or is one of a kind that is not supported.
        OSError: ``path`` cannot be written.
    """
    if source.name == FAST:
        shutil.copyfile(source, path)
    else:
        path.write_text(_convert(source), encoding="utf-8")
    try:
        return Tokenizer(path)
    except BundleError as cause:
        raise CheckpointError(f"{source}: not readable as a tokenizer ({cause.__cause__})") from cause


def check_vocabulary(tokenizer: Tokenizer, special_ids: Sequence[int], vocab_size: int, source: Path) -> None:
    """Check that every token, and every id that begins or ends texts, is one of the model's ``vocab_size`` ids.

    Raises:
        CheckpointError: one lies beyond; ``source`` is named.
    """
    last = tokenizer.texts.num_ids - 1
    if last >= vocab_size:
        raise CheckpointError(
            f"{source}: token {last} is outside the model's vocabulary of {vocab_size}; the tokenizer belongs to "
            "another model, or has tokens that the model was not trained with: take those out"
        )
    for token in special_ids:
        if not 0 <= token < vocab_size:
            raise CheckpointError(
                f"{source.parent}: BOS or EOS is {token}, outside the model's vocabulary of {vocab_size}; correct "
                "config.json or generation_config.json"
            )


def contradictions(
    tokenizer: Tokenizer, config: Mapping[str, Any], bos: int | None, eos: Sequence[int]
) -> Iterator[str]:
    """What the tokenizer's files say against each other and against the model's BOS and EOS, and what is done.

    ``config`` is ``tokenizer_config.json``; ``bos`` and ``eos`` are what ``config.json`` and ``generation_config.json``
    say.
    """
    names = {name: _token_text(config.get(f"{name}_token")) for name in ("bos", "eos")}
    ids = {name: None if text is None else tokenizer.token_id(text) for name, text in names.items()}
    if names["bos"] is not None and bos is not None and ids["bos"] != bos:
        yield f"BOS is {bos} in config.json and {names['bos']} ({ids['bos']}) in {CONFIG}"
    if names["eos"] is not None and eos and ids["eos"] not in eos:
        yield (
            f"EOS is {', '.join(map(str, eos))} in config.json and {names['eos']} ({ids['eos']}) in {CONFIG}; texts "
            "end where config.json says: add the other to eos_token_id in generation_config.json where it should too"
        )
    prefix = tokenizer.prefix
    if prefix and bos is not None and prefix != [bos]:
        yield f"the tokenizer puts {prefix} before each text, though BOS is {bos}; texts begin as it says"
    if (adds := config.get("add_bos_token")) is not None and bool(adds) != bool(prefix):
        yield (
            f"add_bos_token is {str(adds).lower()} in {CONFIG}, and the tokenizer puts {prefix or 'nothing'} before "
            "each text; texts begin as it says"
        )
    if tokenizer.unused:
        yield f"the tokenizer has {' and '.join(tokenizer.unused)} of a training, which no prompt gets"


def _token_text(token: Any) -> str | None:
    """The text of a special token as ``tokenizer_config.json`` names it, by itself or with attributes."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _convert(source: Path) -> str:
    """The text of a ``tokenizer.json`` as transformers makes it from ``source`` and ``tokenizer_config.json`` beside
    it.
    """
    from transformers import AutoTokenizer  # takes seconds to import, and most checkpoints do not need it

    try:
        text: str = AutoTokenizer.from_pretrained(
            source.parent, use_fast=True, local_files_only=True
        )._tokenizer.to_str()
    except Exception as cause:  # whatever the libraries below raise for a damaged file
        problem = " ".join(str(cause).split())[:300]
        raise CheckpointError(f"{source}: not readable as a SentencePiece model ({problem})") from cause
    return text
