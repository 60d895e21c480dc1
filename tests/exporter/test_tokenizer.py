"""What a checkpoint's tokenizer says against the rest of the checkpoint, and ids that its model does not have."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="small tokenizers are made as GGUF files have them: pip install '.[export]'")
pytest.importorskip("sentencepiece", reason="small tokenizers are trained: pip install '.[export]'")

from exporter.tokenizer import check_vocabulary, contradictions, write_tokenizer
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import CheckpointError
from tests.exporter.gguf.vocabularies import BOS, END, UNKNOWN
from tests.tokenizer_kinds import KINDS, Json, open_changed

TRAINED = [kind for kind in KINDS if "demo" not in kind]


def note(tokenizer: Tokenizer, config: Json, bos: str = BOS, *eos: str) -> list[str]:
    """What is said where ``config.json`` has these tokens for BOS and EOS."""
    ids = [tokenizer.token_id(text) for text in (eos or (END,))]
    return list(contradictions(tokenizer, config, tokenizer.token_id(bos), [id for id in ids if id is not None]))


@pytest.fixture(params=TRAINED)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return open_changed(tmp_path, request.param)


def test_files_that_agree_say_nothing(tokenizer: Tokenizer) -> None:
    has_bos = bool(tokenizer.prefix)
    named = {"bos_token": BOS, "eos_token": {"content": END, "lstrip": False}, "add_bos_token": has_bos}
    assert note(tokenizer, named) == []
    assert note(tokenizer, {}) == []
    assert note(tokenizer, named, BOS, UNKNOWN, END) == []


def test_another_bos_is_said(tokenizer: Tokenizer) -> None:
    bos, unknown = tokenizer.token_id(BOS), tokenizer.token_id(UNKNOWN)
    (said,) = note(tokenizer, {"bos_token": UNKNOWN})
    assert said == f"BOS is {bos} in config.json and {UNKNOWN} ({unknown}) in tokenizer_config.json"


def test_another_eos_is_said(tokenizer: Tokenizer) -> None:
    end, unknown = tokenizer.token_id(END), tokenizer.token_id(UNKNOWN)
    (said,) = note(tokenizer, {"eos_token": END}, BOS, UNKNOWN)
    assert said.startswith(
        f"EOS is {unknown} in config.json and {END} ({end}) in tokenizer_config.json; texts end where"
    )


def test_a_prefix_that_is_another_bos_is_said(tokenizer: Tokenizer) -> None:
    said = note(tokenizer, {}, UNKNOWN)
    assert [text.partition(",")[0] for text in said] == (
        [f"the tokenizer puts {tokenizer.prefix} before each text"] if tokenizer.prefix else []
    )


def test_a_prefix_that_is_unwanted_or_missing_is_said(tokenizer: Tokenizer) -> None:
    adds = not tokenizer.prefix
    (said,) = note(tokenizer, {"add_bos_token": adds})
    assert said.startswith(f"add_bos_token is {str(adds).lower()} in tokenizer_config.json, and the tokenizer puts")


def test_what_a_training_left_is_said(tmp_path: Path) -> None:
    def change(content: Json) -> None:
        content["model"]["dropout"] = 0.1
        content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}

    assert note(open_changed(tmp_path, TRAINED[0], change), {}) == [
        "the tokenizer has a limit of length and dropout of a training, which no prompt gets"
    ]


def test_tokens_and_special_ids_beyond_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    source, num_ids = Path("checkpoint/tokenizer.json"), tokenizer.texts.num_ids
    check_vocabulary(tokenizer, [0, num_ids - 1], num_ids, source)
    check_vocabulary(tokenizer, [num_ids + 1], num_ids + 2, source)  # vocabularies are padded
    with pytest.raises(
        CheckpointError, match=rf"tokenizer\.json: token {num_ids - 1} is outside the .* {num_ids - 1};"
    ):
        check_vocabulary(tokenizer, [], num_ids - 1, source)
    for token in (num_ids, -1):
        with pytest.raises(CheckpointError, match=rf"^checkpoint: BOS or EOS is {token}, outside .* {num_ids};"):
            check_vocabulary(tokenizer, [0, token], num_ids, source)


def test_an_added_token_counts_even_if_no_text_has_it(tmp_path: Path) -> None:
    """A token for padding that was added to the tokenizer alone."""

    def change(content: Json) -> None:
        token: dict[str, Any] = content["added_tokens"][-1]
        content["added_tokens"].append(token | {"id": 9999, "content": "[PAD]", "special": True})

    tokenizer = open_changed(tmp_path, "bytes, as Qwen", change)
    with pytest.raises(CheckpointError, match="token 9999 is outside the model's vocabulary of 2000"):
        check_vocabulary(tokenizer, [], 2000, tmp_path / "tokenizer.json")


def test_a_kind_that_is_not_supported_is_refused_by_its_name(tmp_path: Path) -> None:
    content = KINDS["bytes, as Qwen"]() | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="its decoder WordPiece is not supported"):
        write_tokenizer(tmp_path / "tokenizer.json", tmp_path / "out.json")
