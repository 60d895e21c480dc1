"""Draws one generation like the paper's figure: what each stage ran when, and which of its rows became text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from flowspec_edge.bench.simulated_ring import Watcher
from flowspec_edge.bench.svg import FAINT, GRID, Drawing, nice_step
from flowspec_edge.bench.tape import Tape
from flowspec_edge.bench.testbed import Testbed
from flowspec_edge.bench.virtual_clock import VirtualAnswer
from flowspec_edge.core import events as ev
from flowspec_edge.core.rows import NO_PARENT, Row

ACCEPTED, WASTED, CANCELLED, PROMPT = "#2a9d6f", "#f4b9a7", "#fbe6df", "#cbd2d9"
HEAD, DRAFT, ADVANCE = "#3e6fb0", "#b9cfe8", "#7b4fb3"
LEFT, RIGHT, TOP = 150, 30, 104
LANE, LANE_GAP, STRIP_GAP = 44, 8, 72
STRIP_WIDTH = 1380
CHUNK_WIDTH = 40
"""Pixels of a forward of mean length, which is wide enough for its label."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A forward, a run of the head or a draft pass, with its begin and end in simulated milliseconds."""

    began_ms: float
    ended_ms: float
    rows: tuple[Row, ...] = ()
    name: str = ""
    is_cancelled: bool = False


@dataclass(slots=True)
class Timeline(Watcher):
    """Records what a simulated ring does."""

    stages: dict[int, list[Bar]] = field(default_factory=dict)
    origin: list[Bar] = field(default_factory=list)
    advances_ms: list[float] = field(default_factory=list)

    def see_forward(
        self, stage: int, began_s: float, ended_s: float, rows: tuple[Row, ...], is_cancelled: bool
    ) -> None:
        bar = Bar(began_s * 1000, ended_s * 1000, rows, is_cancelled=is_cancelled)
        self.stages.setdefault(stage, []).append(bar)

    def see_compute(self, job: ev.RunHead | ev.RunDraft, began_s: float, ended_s: float) -> None:
        name = "head" if isinstance(job, ev.RunHead) else "draft"
        self.origin.append(Bar(began_s * 1000, ended_s * 1000, name=name))

    def see_action(self, action: ev.OriginAction, now_s: float) -> None:
        if isinstance(action, ev.BroadcastAdvance):
            self.advances_ms.append(now_s * 1000)


def draw_timeline(timeline: Timeline, testbed: Testbed, tape: Tape, answer: VirtualAnswer, heading: str) -> str:
    """An SVG file of the time from the first token on, in as many strips below each other as it takes."""
    return _Picture(timeline, testbed, tape, answer, heading).draw()


class _Picture:
    def __init__(self, timeline: Timeline, testbed: Testbed, tape: Tape, answer: VirtualAnswer, heading: str) -> None:
        self._timeline, self._testbed, self._answer = timeline, testbed, answer
        self._heading = heading
        self._num_prompt = tape.num_prompt
        self._text_rows = _text_rows(timeline, tape)
        self._from_ms, self._to_ms = answer.token_times_s[0] * 1000, answer.token_times_s[-1] * 1000
        forwards = [bar.ended_ms - bar.began_ms for bars in timeline.stages.values() for bar in bars] or [1.0]
        self._scale = CHUNK_WIDTH / (sum(forwards) / len(forwards))  # pixels per ms
        span = self._to_ms - self._from_ms
        self._num_strips = max(-(-int(span * self._scale) // STRIP_WIDTH), 1)
        self._strip_ms = max(span, 1.0) / self._num_strips
        self._scale = STRIP_WIDTH / self._strip_ms
        self._num_lanes = len(testbed.stages) + 1
        self._strip_height = self._num_lanes * (LANE + LANE_GAP)

    def draw(self) -> str:
        height = TOP + self._num_strips * (self._strip_height + STRIP_GAP)
        self._drawing = Drawing(LEFT + STRIP_WIDTH + RIGHT, height, self._heading)
        self._draw_heading()
        for strip in range(self._num_strips):
            self._draw_strip(strip, TOP + 22 + strip * (self._strip_height + STRIP_GAP))
        return self._drawing.to_text()

    def _draw_heading(self) -> None:
        drawing, answer = self._drawing, self._answer
        drawing.text(20, 30, self._heading, size=19, is_bold=True)
        statistics = answer.statistics
        facts = (
            f"{answer.tokens_per_s:.2f} tokens/s  ·  "
            f"{answer.num_decoded} tokens in {answer.decode_s * 1000:.0f} ms  ·  "
            f"{statistics.num_rows_useful} of {statistics.num_rows_sent} draft rows became text  ·  "
            f"time from the first token on"
        )
        drawing.text(20, 51, facts, fill=FAINT)
        x = 20.0
        for color, label in (
            (ACCEPTED, "rows that became text"),
            (WASTED, "rows that did not"),
            (CANCELLED, "given up: all rows dead"),
            ("#ffffff", "idle"),
            (HEAD, "head: verify"),
            (DRAFT, "draft pass"),
        ):
            drawing.rect(x, 64, 14, 14, color, stroke=GRID if color == "#ffffff" else "none")
            drawing.text(x + 20, 75.5, label)
            x += 20 + 6.6 * len(label) + 20
        drawing.line(x, 71, x + 14, 71, ADVANCE, width=2)
        drawing.text(x + 20, 75.5, "Advance from origin to all stages; +n: tokens it brought")

    def _draw_strip(self, strip: int, top: float) -> None:
        drawing = self._drawing
        begins_ms = self._from_ms + strip * self._strip_ms
        for lane in range(self._num_lanes):
            y = self._lane_y(top, lane)
            drawing.rect(LEFT, y, STRIP_WIDTH, LANE, "#ffffff", stroke=GRID)
            self._draw_label(lane, y)
        self._draw_axis(begins_ms, top + self._strip_height)
        for bar in self._clip(self._timeline.origin, begins_ms):
            x, width = self._place(bar, begins_ms)
            color = HEAD if bar.name == "head" else DRAFT
            drawing.rect(
                x, top + 5, width, LANE - 10, color, stroke="#ffffff", tip=f"{bar.name} {_span(bar, self._from_ms)}"
            )
        for stage, bars in self._timeline.stages.items():
            for bar in self._clip(bars, begins_ms):
                self._draw_chunk(bar, begins_ms, self._lane_y(top, stage + 1))
        self._draw_advances(begins_ms, top)

    def _draw_label(self, lane: int, y: float) -> None:
        if lane == 0:
            name, detail = "origin", "head, draft passes"
        else:
            stages = self._testbed.stages
            start = sum(stage.num_layers for stage in stages[: lane - 1])
            name, detail = f"stage {lane - 1}", f"layers [{start}, {start + stages[lane - 1].num_layers})"
        self._drawing.text(LEFT - 12, y + LANE / 2 - 3, name, anchor="end", is_bold=True)
        self._drawing.text(LEFT - 12, y + LANE / 2 + 12, detail, anchor="end", size=10.5, fill=FAINT)

    def _draw_axis(self, begins_ms: float, y: float) -> None:
        drawing = self._drawing
        step = nice_step(self._strip_ms, 14)
        first = int((begins_ms - self._from_ms) / step + 0.999)
        tick = first
        while tick * step <= begins_ms - self._from_ms + self._strip_ms + 1e-6:
            x = LEFT + (self._from_ms + tick * step - begins_ms) * self._scale
            drawing.line(x, y - 4, x, y + 2, FAINT)
            drawing.text(x, y + 15, f"{tick * step:g}", anchor="middle", size=11, fill=FAINT)
            tick += 1
        drawing.text(LEFT - 12, y + 15, "ms", anchor="end", size=11, fill=FAINT)

    def _draw_chunk(self, bar: Bar, begins_ms: float, y: float) -> None:
        drawing = self._drawing
        x, width = self._place(bar, begins_ms)
        num_rows, inner = len(bar.rows), LANE - 6
        if bar.rows[-1].id < self._num_prompt:
            drawing.rect(x, y + 3, width, inner, PROMPT, stroke="#ffffff", tip=f"{num_rows} rows of the prompt")
            return
        num_useful = sum(row.id in self._text_rows for row in bar.rows)
        useful = inner * num_useful / num_rows
        if num_useful:
            useful = max(useful, 7)  # a thinner slice would not be seen
        tip = f"{num_useful} of {num_rows} rows became text, {_span(bar, self._from_ms)}"
        if bar.is_cancelled:
            drawing.rect(x, y + 3, width, inner, CANCELLED, stroke=WASTED, tip=f"given up, {_span(bar, self._from_ms)}")
            return
        drawing.rect(x, y + 3, width, inner, WASTED, stroke="#ffffff", tip=tip)
        drawing.rect(x + 0.5, y + 3 + inner - useful, width - 1, useful, ACCEPTED, tip=tip)
        label = f"{num_useful}/{num_rows}"
        if width > 6.2 * len(label):
            drawing.text(x + width / 2, y + LANE / 2 - 1, label, anchor="middle", size=10.5)

    def _draw_advances(self, begins_ms: float, top: float) -> None:
        drawing = self._drawing
        hop = self._testbed.hop_ms * self._scale
        bottom = top + self._strip_height - LANE_GAP
        for at_ms in self._timeline.advances_ms:
            if begins_ms <= at_ms < begins_ms + self._strip_ms:
                x = LEFT + (at_ms - begins_ms) * self._scale
                drawing.line(x, top, x + hop, bottom, ADVANCE, width=1.2)
        for at_s, tokens in groupby(self._answer.token_times_s):
            if begins_ms <= at_s * 1000 < begins_ms + self._strip_ms + 1e-6:
                x = LEFT + (at_s * 1000 - begins_ms) * self._scale
                drawing.text(
                    x, top - 5, f"+{len(list(tokens))}", anchor="middle", size=10.5, fill=ADVANCE, is_bold=True
                )

    def _clip(self, bars: Sequence[Bar], begins_ms: float) -> list[Bar]:
        ends_ms = min(begins_ms + self._strip_ms, self._to_ms)
        return [bar for bar in bars if bar.began_ms < ends_ms and bar.ended_ms > begins_ms]

    def _place(self, bar: Bar, begins_ms: float) -> tuple[float, float]:
        """The bar's left edge and width within the strip."""
        first, last = max(bar.began_ms, begins_ms), min(bar.ended_ms, begins_ms + self._strip_ms)
        return LEFT + (first - begins_ms) * self._scale, (last - first) * self._scale

    @staticmethod
    def _lane_y(top: float, lane: int) -> float:
        return top + lane * (LANE + LANE_GAP)


def _span(bar: Bar, from_ms: float) -> str:
    return f"{bar.began_ms - from_ms:.1f} to {bar.ended_ms - from_ms:.1f} ms"


def _text_rows(timeline: Timeline, tape: Tape) -> set[int]:
    """The draft ids of the rows that became text."""
    place: dict[int, int] = {}  # position in the text, by draft id
    for bar in sorted((bar for bars in timeline.stages.values() for bar in bars), key=lambda bar: bar.began_ms):
        for row in bar.rows:
            above = -1 if row.parent == NO_PARENT else place.get(row.parent)
            if above is not None and above + 1 < len(tape.tokens) and tape.tokens[above + 1] == row.token:
                place[row.id] = above + 1
    return set(place)
