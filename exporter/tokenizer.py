"""Writes a checkpoint's tokenizer as every device reads it: its ``tokenizer.json``, or one converted from
SentencePiece.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers import Tokenizer

from flowspec_edge.errors import CheckpointError

FAST, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"


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
        CheckpointError: ``source`` is not readable as a tokenizer.
        OSError: ``path`` cannot be written.
    """
    if source.name == FAST:
        shutil.copyfile(source, path)
    else:
        path.write_text(_convert(source), encoding="utf-8")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as cause:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"{source}: not readable as a tokenizer ({cause})") from cause


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
