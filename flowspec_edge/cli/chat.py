"""``flowspec chat``: a dialogue with the model of a ``flowspec serve``."""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowspec_edge.cli.dialogue import COMMANDS, Dialogue, perform
from flowspec_edge.cli.options import Commands, set_command
from flowspec_edge.cli.server_options import ServerArguments, add_server, client_from
from flowspec_edge.cli.show_chat import ChatDisplay, LineReader
from flowspec_edge.errors import FlowspecError, plain_text

if TYPE_CHECKING:
    from flowspec_edge.client import Client

DESCRIPTION = """\
A dialogue with the model that a `flowspec serve` has, on this machine or on the network. Ctrl-C interrupts a reply,
Ctrl-D ends the dialogue. Without a terminal each line of standard input is a message, and replies are plain text.
"""


FORGET_S = 0.01
"""The event loop hears of a Ctrl-C at the prompt too, and is to forget it before a reply begins."""


@dataclass(frozen=True, kw_only=True)
class ChatCommand(ServerArguments):
    message: str | None
    system: str | None
    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    no_history: bool


def add_chat(commands: Commands) -> None:
    chat = commands.add_parser(
        "chat",
        help="talk with the model of a flowspec serve",
        description=DESCRIPTION,
        epilog="in the dialogue:\n" + "\n".join(f"  {usage:16} {what}" for usage, what in COMMANDS.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chat.add_argument("message", nargs="?", metavar="MESSAGE", help="say this, print the reply, and end")
    add_server(chat)
    chat.add_argument("--system", metavar="TEXT", help="what the model is told before the first message")
    chat.add_argument("--max-new-tokens", type=int, metavar="N", help="of each reply (default: what the context holds)")
    chat.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default: 1)")
    chat.add_argument("--top-p", type=float, metavar="P", help="sample within this mass (default: 1, all)")
    chat.add_argument("--seed", type=int, help="same seed, same reply (default: drawn)")
    chat.add_argument("--no-history", action="store_true", help="do not keep what is typed for the next time")
    set_command(chat, ChatCommand, _chat)


async def _chat(options: ChatCommand) -> int:
    dialogue = Dialogue(system=options.system)
    async with await client_from(options) as client:
        display = ChatDisplay(is_plain=options.message is not None)
        if options.message is not None:
            await _reply(client, options, dialogue, options.message, display)
            return 0
        (dialogue.model,) = (await client.models())[:1]
        display.greet(dialogue.model, client.url)
        interrupts = Interrupts()
        with LineReader(keeps_history=not options.no_history) as lines:
            while (line := lines.read(display)) is not None:
                if not line.strip():
                    await asyncio.sleep(FORGET_S)
                    continue
                if line.startswith("/"):
                    if perform(dialogue, line, display.tell):
                        break
                    continue
                try:
                    if not await interrupts.run(_reply(client, options, dialogue, line, display)):
                        display.tell("interrupted")
                except FlowspecError as error:
                    display.fail(plain_text(str(error)))
                    if not display.is_terminal:
                        return 1
    return 0


async def _reply(client: Client, options: ChatCommand, dialogue: Dialogue, message: str, display: ChatDisplay) -> None:
    """Say a message and show the reply. What came of one that is interrupted stays in the dialogue; one that fails
    leaves it as it was.
    """
    answer = client.chat(
        [*dialogue.messages, {"role": "user", "content": message}],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    try:
        async for piece in answer:
            display.show(piece)
    finally:
        await answer.aclose()
        display.end_reply(answer)
        if answer.text or answer.finish_reason:
            dialogue.add(message, answer.text)


class Interrupts:
    """Ctrl-C ends the reply that is written, and nothing else."""

    def __init__(self) -> None:
        self._reply: asyncio.Task[None] | None = None
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._interrupt)

    async def run(self, reply: Coroutine[Any, Any, None]) -> bool:
        """Whether it came to its end."""
        self._reply = asyncio.create_task(reply, name="reply")
        try:
            await asyncio.wait({self._reply})
        finally:
            task, self._reply = self._reply, None
            task.cancel()  # where the command itself is ended
        if task.cancelled():
            return False
        task.result()
        return True

    def _interrupt(self) -> None:
        if self._reply is not None:
            self._reply.cancel()
