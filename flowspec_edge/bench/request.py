"""Turns the names and numbers that a user gave ``flowspec bench`` into testbeds, schedules and tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flowspec_edge.bench.compare import YARDSTICK, Plan, Task
from flowspec_edge.bench.known_testbeds import known_testbeds
from flowspec_edge.bench.planned import plan_testbed, replanned
from flowspec_edge.bench.prompts import choose_sets, load_chat_prompts, load_prompts
from flowspec_edge.bench.tensor_parallel import MODELLED
from flowspec_edge.bench.testbed import Testbed, load_testbed
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.limits import MAX_SESSIONS
from flowspec_edge.core.speculation.schedules import SCHEDULES, ablation_names, find_schedule
from flowspec_edge.errors import RequestError


@dataclass(frozen=True)
class Request:
    """Options of ``flowspec bench``.

    Each method raises RequestError where a name is not known or a number is out of range.

    Args:
        testbeds, schedules, prompts, temperatures: as typed, with commas. The help explains ``all`` and ``quick``.
        num_prompts: prompts of each set; None for all of them, or for a few where ``prompts`` is ``quick``.
        max_new_tokens: length of each text; None for the usual length.
        sessions: numbers of clients to compare, as typed; empty where schedules are compared instead.
        is_planned: whether each testbed is also compared with its layers dealt by the planner.
    """

    testbeds: str
    schedules: str
    prompts: str
    temperatures: str
    num_prompts: int | None = None
    max_new_tokens: int | None = None
    sessions: str = ""
    is_planned: bool = False

    def schedule_names(self, is_ablation: bool) -> list[str]:
        """The schedules to show, in the order of the paper's table, the yardstick always among them."""
        if is_ablation:
            return [YARDSTICK, "flowspec", *ablation_names()]
        every = [*MODELLED, *SCHEDULES]
        if self.schedules == "all":
            return every
        wanted = _names("--schedules", self.schedules)
        for name in wanted:
            if name not in MODELLED:
                find_schedule(name)  # raises where there is none
        return [name for name in every if name in {*wanted, YARDSTICK}] + [name for name in wanted if name not in every]

    def session_numbers(self) -> list[int]:
        """The numbers of clients, with which one alone is always compared."""
        names = _names("--sessions", self.sessions)
        if not all(name.isdecimal() and 1 <= int(name) <= MAX_SESSIONS for name in names):
            raise RequestError(f"--sessions is {self.sessions!r}; give numbers from 1 to {MAX_SESSIONS}, as in 1,2,4")
        return sorted({1, *map(int, names)})

    def running_names(self) -> list[str]:
        """The schedules to run on emulated boards, which leaves out those that are only modelled."""
        if self.schedules == "all":
            return list(SCHEDULES)
        names = _names("--schedules", self.schedules)
        for name in names:
            find_schedule(name)  # raises where there is none
        return names

    def plan(self, schedules: Sequence[str], usual_tokens: int, num_blocks: int | None = None) -> Plan:
        """The testbeds and schedules to compare.

        ``num_blocks`` is the number of blocks of the bundle whose layers emulated boards load; None on the virtual
        clock.
        """
        return Plan(
            testbeds=tuple(self._load_testbeds(num_blocks)),
            schedules=tuple(schedules),
            max_new_tokens=usual_tokens if self.max_new_tokens is None else self.max_new_tokens,
        )

    def tasks(self, plan: Plan, num_quick: int, *, is_chat: bool = False) -> list[Task]:
        """The texts to generate, with ``num_quick`` prompts of each set where ``quick`` was asked for.

        All sets are those of messages where the model ``is_chat``, and else those of source text.
        """
        messages = load_chat_prompts()
        every = messages if is_chat else load_prompts()
        names = list(every) if self.prompts in ("quick", "all") else _names("--prompts", self.prompts)
        limit = num_quick if self.prompts == "quick" and self.num_prompts is None else self.num_prompts
        if limit is not None and limit < 1:
            raise RequestError(f"--num-prompts is {limit}; it must be at least 1")
        tasks = [
            Task(prompt_set=name, seed=seed, temperature=temperature, text=text, is_message=name in messages)
            for temperature in _numbers("--temperature", self.temperatures)
            for name, texts in choose_sets(names).items()
            for seed, text in enumerate(texts[:limit])
        ]
        tasks[0].options(plan)  # raises where the number of tokens is out of range
        return tasks

    def _load_testbeds(self, num_blocks: int | None) -> Iterator[Testbed]:
        """Each testbed, followed, where wanted, by the one that the planner makes of its boards.

        With ``num_blocks``, the planner deals the testbed's layers in at most that many parts.
        """
        for name in known_testbeds() if self.testbeds == "all" else _names("--testbed", self.testbeds):
            testbed = load_testbed(name)
            yield testbed
            if self.is_planned:
                block_layers = max(-(-testbed.num_layers // num_blocks), 1) if num_blocks else 1
                yield replanned(testbed, plan_testbed(testbed, "flowspec", block_layers=block_layers))


def _names(option: str, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise RequestError(f"{option} is {text!r}; give names with commas between them, or all")
    return list(dict.fromkeys(names))


def _numbers(option: str, text: str) -> list[float]:
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError as cause:
        raise RequestError(f"{option} is {text!r}; give numbers with commas between them, as in 0,0.6,1") from cause
    for number in numbers:
        GenerateOptions(temperature=number)  # raises where it is out of range
    return sorted(set(numbers))
