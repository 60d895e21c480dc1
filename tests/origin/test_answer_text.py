"""An answer's text goes on where its prompt ended."""

from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="small tokenizers are made as GGUF files have them: pip install '.[export]'")
pytest.importorskip("sentencepiece", reason="small tokenizers are trained: pip install '.[export]'")

from flowspec_edge.config import GenerateOptions
from flowspec_edge.origin.answer import Answer
from tests.tokenizer_kinds import KINDS, open_changed


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_answer_are_one_text(tmp_path: Path, kind: str) -> None:
    tokenizer = open_changed(tmp_path, kind)
    ids = tokenizer.encode("One day the cat, the 猫 and the 🫠 went out.")
    for at in range(len(tokenizer.prefix) + 1, len(ids)):
        prompt, rest = ids[:at], ids[at:]
        answer = Answer(tokenizer, prompt, GenerateOptions())
        written = "".join(answer.take((token,)).text for token in rest) + answer.finish("stop").text
        assert tokenizer.decode(prompt).rstrip("\ufffd") + written == tokenizer.decode(ids)
