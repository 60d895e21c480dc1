"""llama.cpp's own token ids and texts, to compare ours with.

It runs in a process of its own, since it ends the one it is in where it finds a fault::

    python -m tests.llama_cpp tokenize MODEL.gguf QUESTIONS.json ANSWERS.json
"""

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

_BETWEEN = -1
"""What separates texts of one request; no token has this id."""


def llama_cpp_ids(model: Path, texts: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
    """The ids of each text without a BOS: with special tokens, and with these as plain text.

    Skips the test where llama.cpp is not installed.
    """
    pytest.importorskip("xllamacpp", reason="compares with llama.cpp: pip install '.[dev]'")
    mixed = [item for text in texts for item in (text, _BETWEEN)]
    asked = [{"content": mixed, "add_special": False, "parse_special": parses} for parses in (True, False)]
    parsed, plain = (_parts(ids) for ids in _ask(model, asked))
    assert len(parsed) == len(plain) == len(texts)
    return parsed, plain


def llama_cpp_prompts(model: Path, texts: Sequence[str]) -> list[list[int]]:
    """The ids of prompts, with what llama.cpp puts before them. Skips the test where llama.cpp is not installed."""
    pytest.importorskip("xllamacpp", reason="compares with llama.cpp: pip install '.[dev]'")
    return _ask(model, [{"content": text, "add_special": True, "parse_special": True} for text in texts])


def llama_cpp_texts(model: Path, prompts: Sequence[str], num_tokens: int) -> list[list[int]]:
    """The ids of the likeliest text behind each prompt. Skips the test where llama.cpp is not installed."""
    pytest.importorskip("xllamacpp", reason="compares with llama.cpp: pip install '.[dev]'")
    wanted = {"n_predict": num_tokens, "temperature": 0, "return_tokens": True, "cache_prompt": False}
    return _ask(model, [{"prompt": prompt, **wanted} for prompt in prompts], "completion")


def _parts(ids: Sequence[int]) -> list[list[int]]:
    """The ids of one text after the other, behind each of which stands _BETWEEN."""
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == _BETWEEN:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts[:-1]


def _ask(model: Path, bodies: Sequence[dict[str, Any]], what: str = "tokenize") -> list[list[int]]:
    with tempfile.TemporaryDirectory() as directory:
        questions, answers = Path(directory, "questions.json"), Path(directory, "answers.json")
        questions.write_text(json.dumps(bodies))
        command = [sys.executable, "-m", "tests.llama_cpp", what, str(model), str(questions), str(answers)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        found: list[list[int]] = json.loads(answers.read_text())
        return found


def _serve(what: str, model: str, questions: Path, answers: Path) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 256, 1, False, 1
    server = xllamacpp.Server(params)
    found = []
    for body in json.loads(questions.read_text()):
        request = urllib.request.Request(
            f"{server.listening_address}/{what}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            found.append(json.load(answer)["tokens"])
    answers.write_text(json.dumps(found))


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
