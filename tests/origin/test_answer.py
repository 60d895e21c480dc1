"""An answer that another origin began: not a character of it comes twice or is left out, wherever it is cut."""

import io
import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.cli.show_ring import print_statistics
from flowspec_edge.config import GenerateOptions, Logprob, Logprobs, Piece, TokenLogprobs, UnfinishedText
from flowspec_edge.core.device.energy_shares import TextEnergy
from flowspec_edge.core.speculation.generation import TargetLimits
from flowspec_edge.core.speculation.origin import Origin
from flowspec_edge.core.speculation.statistics import GenerationStatistics
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import RequestError
from flowspec_edge.origin import answer as answering
from flowspec_edge.origin.answer import Answer
from tests.narrowing import present
from tests.ring.conftest import tokens_of

BUNDLE = Bundle.load(DEMO_BUNDLE)
TOKENIZER = Tokenizer(DEMO_BUNDLE / BUNDLE.manifest.tokenizer.file)
TEXTS = ["self.items = []\n\n    def push(self):\n", "naïve – ☃ 🐍🐍 \u1f9d\u200d end", "aaaaab aab aaab"]
STOPS = [(), ("def push",), ("🐍 ",), ("aab", "aaab a"), ("nothing of that",)]


def unfinished(prompt: list[int], tokens: list[int]) -> UnfinishedText:
    return UnfinishedText(prompt=tuple(prompt), tokens=tuple(tokens))


def write(answer: Answer, tokens: list[int]) -> list[Piece]:
    """As a ring does, up to a stop string or the end."""
    pieces: list[Piece] = []
    for token in tokens:
        if answer.ending is not None:
            break
        pieces.append(answer.take((token,)))
    return [*pieces, answer.finish(answer.ending or "length")]


@given(st.sampled_from(TEXTS), st.sampled_from(STOPS), st.data())
def test_a_text_is_cut_anywhere_and_goes_on_elsewhere(text: str, stop: tuple[str, ...], data: st.DataObject) -> None:
    prompt, tokens, options = [1, 2, 3], TOKENIZER.encode(text), GenerateOptions(stop=stop, max_new_tokens=500)
    whole = write(Answer(TOKENIZER, prompt, options), tokens)
    cut = data.draw(st.integers(0, len(whole) - 1))
    came = whole[:cut]
    rest = write(Answer.resume(TOKENIZER, unfinished(prompt, tokens_of(came)), options), tokens[len(tokens_of(came)) :])
    assert [piece.text for piece in came + rest] == [piece.text for piece in whole]
    assert tokens_of(came + rest) == tokens_of(whole)
    assert rest[-1].finish_reason == whole[-1].finish_reason


def test_what_is_left_to_write_and_what_is_counted() -> None:
    prompt, tokens = [1, 2, 3], TOKENIZER.encode(TEXTS[0])
    answer = Answer.resume(TOKENIZER, unfinished(prompt, tokens[:4]), GenerateOptions(max_new_tokens=10))
    assert answer.written == (*prompt, *tokens[:4])
    assert answer.options_left.max_new_tokens == 6
    assert answer.num_rings == 1  # the one that began it
    (piece, last) = write(answer, tokens[4:5])
    assert piece.prompt_token_ids is None
    assert last.statistics is not None
    assert (last.statistics["prompt_tokens"], last.statistics["completion_tokens"]) == (3, 5)


def test_the_energy_is_that_of_all_rings_and_of_the_tokens_that_they_wrote() -> None:
    tokens = TOKENIZER.encode(TEXTS[0])
    answer = Answer.resume(TOKENIZER, unfinished([1], tokens[:4]), GenerateOptions(max_new_tokens=10))
    for energy in (TextEnergy({"hall"}, 3.0, {"attic"}), TextEnergy({"cellar"}, 1.5, {"hall"}), TextEnergy({"x"})):
        answer.begin(GenerationStatistics(), [], energy)
    found = present(write(answer, tokens[4:6])[-1].statistics)
    assert (found["joules"], found["joules_per_token"]) == (4.5, 2.25)
    assert (found["metered_nodes"], found["unmetered_nodes"]) == (["attic", "hall"], ["cellar", "x"])
    print_statistics(found, shown := io.StringIO())
    said = "4.5 J, 2.25 J per token: all that attic, hall took meanwhile; without cellar, x, which cannot tell"
    assert shown.getvalue().splitlines()[-1] == said
    blind = Answer(TOKENIZER, [1], GenerateOptions())
    blind.begin(GenerationStatistics(), [], TextEnergy({"hall"}))
    assert "joules" not in present(write(blind, tokens)[-1].statistics), "none is not nothing"


def test_no_stop_string_ends_a_text_that_is_too_short() -> None:
    """None is looked for in the text of the first tokens, where it may have begun."""
    tokens = TOKENIZER.encode("stop it, stop it")
    for min_tokens, text in ((0, ""), (1, "stop it, "), (len(tokens), "stop it, stop it")):
        options = GenerateOptions(stop=("stop",), min_tokens=min_tokens)
        assert "".join(piece.text for piece in write(Answer(TOKENIZER, [1, 2], options), tokens)) == text
        resumed = Answer.resume(TOKENIZER, unfinished([1, 2], tokens[:1]), options)
        assert text.endswith("".join(piece.text for piece in write(resumed, tokens[1:])))


def test_logprobs_are_told_with_the_bytes_of_their_tokens_and_where_these_stand() -> None:
    tokens = TOKENIZER.encode("a ☃!")
    told = [TokenLogprobs(Logprob(token, -float(at)), (Logprob(0, -0.5),)) for at, token in enumerate(tokens)]
    answer = Answer(TOKENIZER, [1, 2], GenerateOptions(num_logprobs=1))
    pieces = [answer.take(tuple(tokens[:2]), told[:2]), answer.take(tuple(tokens[2:]), told[2:])]
    joined = present(Logprobs.joined(piece.logprobs for piece in pieces))
    assert joined.tokens == told
    assert b"".join(joined.texts[token] for token in tokens) == "a ☃!".encode()
    assert joined.texts[0] == TOKENIZER.bytes_of(0) != b""
    before = ["".join(TOKENIZER.decode(tokens[:at])).rstrip("\ufffd") for at in range(len(tokens))]
    assert list(joined.offsets) == [len(text) for text in before]


def test_tokens_per_s_are_those_of_the_origin_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "time", SimpleNamespace(monotonic=itertools.count(1.0).__next__))
    answer = Answer.resume(TOKENIZER, unfinished([1], [40] * 9), GenerateOptions(max_new_tokens=12))
    *_, last = write(answer, [40, 40, 40])
    assert last.statistics is not None
    assert (last.statistics["tokens_per_s"], last.statistics["first_token_s"]) == (1.0, 1.0)


def test_the_first_piece_tells_the_prompts_tokens() -> None:
    pieces = write(Answer(TOKENIZER, [1, 2, 3], GenerateOptions()), [40, 41])
    assert [piece.prompt_token_ids for piece in pieces] == [[1, 2, 3], None, None]


LIMITS = TargetLimits(max_context=10, vocab_size=50, eos_token_ids=frozenset({0}))
ORIGIN = Origin(num_stages=1, limits=LIMITS, has_drafter=False)


@pytest.mark.parametrize(
    ("prompt", "tokens", "ending"),
    [
        ([1, 2], [], None),
        ([1, 2], [3, 4, 5], None),
        ([1, 2], [3, 4, 5, 6], "length"),
        ([1, 2], [3, 4, 0], "stop"),
        ([1, 2], [3, 4, 5, 0], "stop"),
        ([1] * 8, [3], None),
        ([1] * 8, [3, 4], "length"),
    ],
)
def test_a_text_may_have_lacked_nothing_but_its_last_piece(
    prompt: list[int], tokens: list[int], ending: str | None
) -> None:
    assert ORIGIN.ending_of(unfinished(prompt, tokens), GenerateOptions(max_new_tokens=4)) == ending


@pytest.mark.parametrize(
    ("prompt", "tokens", "text"),
    [
        ([], [], "the prompt is empty"),
        ([1], [50], "the text so far has the token id 50"),
        ([1], [-1], "the text so far has the token id -1"),
        ([50], [], "the prompt has the token id 50"),
        ([1] * 10, [], "the prompt has 10 tokens"),
        ([1] * 9, [1, 1], "2 tokens of the text are given"),
        ([1], [1] * 5, "5 tokens of the text are given"),
    ],
)
def test_a_text_that_cannot_have_been_is_refused(prompt: list[int], tokens: list[int], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        ORIGIN.ending_of(unfinished(prompt, tokens), GenerateOptions(max_new_tokens=4))
