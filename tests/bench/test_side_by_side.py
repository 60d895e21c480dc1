"""Several clients on one ring, on the virtual clock: what they get together, what each gets, and how long it waits."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from flowspec_edge.bench.side_by_side import AskedText, SharedTime, SideBySide
from flowspec_edge.bench.tape import Tape
from flowspec_edge.bench.testbed import Testbed, load_testbed
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.events import DraftFinished, RunDraft
from flowspec_edge.core.speculation.generation import TargetLimits
from flowspec_edge.core.speculation.pipeline import PIECE_CHUNKS
from tests.bench.conftest import VOCAB, make_tape

LIMITS = TargetLimits(max_context=4096, vocab_size=VOCAB, eos_token_ids=frozenset())
NUM_PROMPT, NUM_TOKENS = 100, 96


def make_text(seed: int, num_prompt: int = NUM_PROMPT, num_tokens: int = NUM_TOKENS, after_s: float = 0.0) -> AskedText:
    tokens = np.random.default_rng(seed).integers(0, VOCAB, num_prompt + num_tokens)
    tape = make_tape(num_prompt, tokens.tolist())
    return AskedText(tape, GenerateOptions(max_new_tokens=num_tokens), after_s)


class SkilledDrafter:
    """Knows the next token in 7 places of 10, has it for the second likeliest in 2, and misses it in one."""

    def __init__(self, texts: Sequence[AskedText]) -> None:
        self._tapes: list[Tape] = [text.tape for text in texts]  # in the order in which they are asked for
        self._by_session: dict[int, Tape] = {}
        self._on_text: dict[tuple[int, int], bool] = {}

    def open(self, session: int, capacity: int) -> None:
        self._by_session[session] = self._tapes[session - 1]

    def close(self, session: int) -> None: ...

    def run(self, job: RunDraft) -> DraftFinished:
        tokens = self._by_session[job.session].tokens
        proposals: list[list[int]] = []
        for row, position in zip(job.rows, job.positions.tolist(), strict=True):
            is_verified = len(proposals) < len(job.hidden)
            is_on_text = is_verified or self._on_text.get((job.session, row.parent), False)
            is_on_text = is_on_text and position + 1 < len(tokens) and tokens[position + 1] == row.token
            self._on_text[job.session, row.id] = is_on_text
            proposals.append(self._after(tokens, position + 2) if is_on_text else [0, 1, 2])
        wanted = proposals[max(len(job.hidden) - 1, 0) :]
        log_probs = np.log(np.array([[0.7, 0.2, 0.05]] * len(wanted), np.float32))
        return DraftFinished(np.array(wanted, np.int64), log_probs)

    def _after(self, tokens: Sequence[int], place: int) -> list[int]:
        if place >= len(tokens):
            return [0, 1, 2]
        token, luck = tokens[place], place * 7919 % 10
        others = [other for other in (0, 1, 2, 3) if other != token]
        return [token, *others[:2]] if luck < 7 else [others[0], token, others[1]] if luck < 9 else others[:3]


def run(testbed: Testbed, *clients: AskedText) -> SharedTime:
    """One text for each client, checked against the target's."""
    shared = SideBySide(testbed, [[text] for text in clients], SkilledDrafter(clients), LIMITS).run()
    for text, (written, *_) in zip(clients, shared.texts, strict=True):
        assert tuple(written.tokens) == text.tape.continuation[: len(written.tokens)]
    return shared


def test_clients_together_get_more_than_one_and_each_its_share() -> None:
    """The ring is the same every time, and so are the figures: 1.71 and 2.97 times as much as one."""
    testbed, rates = load_testbed("jetson4-7b-fp16-1gbit"), {}
    for num_clients in (1, 2, 4):
        shared = run(testbed, *(make_text(seed) for seed in range(num_clients)))
        rates[num_clients] = shared.tokens_per_s
        share = shared.tokens_per_s * shared.seconds / num_clients
        assert min(shared.num_tokens(client) for client in range(num_clients)) >= 0.8 * share
    assert rates[2] >= 1.65 * rates[1]
    assert rates[4] >= 2.6 * rates[1]


@pytest.mark.parametrize(
    ("name", "num_clients", "gain"), [("jetson4-7b-fp16-1gbit", 8, 3.3), ("pi5x4-3b-int4", 4, 0.94)]
)
def test_a_crowd_is_better_off_with_drafts_where_rows_cost_little_and_no_worse_where_they_cost_much(
    name: str, num_clients: int, gain: float
) -> None:
    """Twice as many clients as boards, who keep these busy with single rows, get 3.5 times as much with drafts. Four
    Raspberry Pis, whose rows cost a fifth of a chunk's time, bring 0.95 as much, since drafts are tried.
    """
    testbed, rates = load_testbed(name), {}
    for schedule in ("autoregressive", "flowspec"):
        texts = (make_text(seed) for seed in range(num_clients))
        asked = [replace(text, options=replace(text.options, schedule=schedule)) for text in texts]
        rates[schedule] = run(testbed, *asked).tokens_per_s
    assert rates["flowspec"] >= gain * rates["autoregressive"]


@pytest.mark.parametrize(("name", "pace"), [("jetson4-7b-fp16-1gbit", 0.65), ("pi5x4-3b-int4", 0.6)])
def test_a_stream_keeps_its_pace_beside_a_long_prompt(name: str, pace: float) -> None:
    """Six tenths of the pace that it had alone, also where every row costs; and at each stage it waits for one piece of
    the prompt at most.
    """
    testbed = load_testbed(name)
    stream, prompt = make_text(1, num_tokens=200), make_text(2, num_prompt=2000, num_tokens=1, after_s=8.0)
    (beside,), (reading,) = run(testbed, stream, prompt).texts
    times = np.array(beside.token_times_s)
    alone = times[times < reading.asked_s]
    during = times[(times >= reading.asked_s) & (times < reading.asked_s + 4)]
    piece_s = max(testbed.forward_ms(stage, 1) for stage in range(4)) * PIECE_CHUNKS / 1000
    assert len(during) / 4 >= pace * len(alone) / (alone[-1] - alone[0])
    assert np.diff(during).max() <= np.diff(alone).max() + 4 * piece_s


@pytest.mark.parametrize(("name", "most"), [("jetson4-7b-fp16-1gbit", 0.24), ("pi5x4-3b-int4", 0.05)])
def test_the_next_turn_waits_for_little_more_than_one_trip(name: str, most: float) -> None:
    """Where four boards read their weights in 0.06 s each, a trip is 0.23 of the time for 1,500 tokens."""
    testbed, num_said = load_testbed(name), 16
    tokens = np.random.default_rng(5).integers(0, VOCAB, 1500 + 3 * num_said).tolist()
    options = GenerateOptions(max_new_tokens=num_said)
    turns = [
        AskedText(make_tape(num_prompt, tokens[: num_prompt + num_said]), options)
        for num_prompt in (1500, 1500 + 2 * num_said)
    ]
    (texts,) = SideBySide(testbed, [turns], SkilledDrafter(turns), LIMITS, max_kept_slots=4096).run().texts
    for turn, text in zip(turns, texts, strict=True):
        assert tuple(text.tokens) == turn.tape.continuation
    first_s, next_s = (text.first_token_s for text in texts)
    assert next_s <= most * first_s
    trip_ms = sum(testbed.forward_ms(stage, num_said + 2) + testbed.hop_ms for stage in range(4)) + testbed.head_ms
    assert 1000 * next_s <= 1.1 * trip_ms
