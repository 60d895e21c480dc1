"""``flowspec``: runs one of the commands, and turns an error into one sentence and an exit status."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from typing import Any

from flowspec_edge.cli.bench import add_bench, add_trace
from flowspec_edge.cli.cache import add_cache
from flowspec_edge.cli.chat import add_chat
from flowspec_edge.cli.demo import add_demo
from flowspec_edge.cli.devices import add_devices
from flowspec_edge.cli.doctor import add_doctor
from flowspec_edge.cli.json_report import print_failure
from flowspec_edge.cli.key import add_key
from flowspec_edge.cli.node import add_node
from flowspec_edge.cli.options import Running
from flowspec_edge.cli.parser import Parser
from flowspec_edge.cli.plan import add_plan
from flowspec_edge.cli.ring import add_generate
from flowspec_edge.cli.serve import add_serve
from flowspec_edge.cli.support import add_support
from flowspec_edge.cli.top import add_top
from flowspec_edge.errors import FlowspecError, plain_text
from flowspec_edge.version import __version__

DESCRIPTION = """\
Run one large language model across the boards on your LAN. Every board runs `flowspec node`; they find each other, and
whoever asks streams a tree of draft tokens around the ring, so that one request keeps every board busy.
"""

EPILOG = """\
examples:
  flowspec demo                               four nodes on this machine answer a prompt
  flowspec demo --boards pi5x4-3b-int4        the same at the pace of boards, without drafts and with them
  flowspec node                               serve layers of the demo model; the first prints the line for the \
other boards
  flowspec generate 'def main(argv):'         spread the model over the nodes found and stream the text
  flowspec serve                              the same behind an OpenAI-compatible HTTP API
  flowspec chat                               talk with its model
  flowspec top                                what it does now: stages, boards, texts
  flowspec devices                            who is there
  flowspec doctor                             who is not there, why, and what mends it
  flowspec support                            an archive for whoever is to help with that
  flowspec plan                               who would serve what, and how fast that should be
  flowspec cache list                         which weights this machine has fetched and kept
  flowspec bench --virtual                    what to expect of boards, without the boards

exit status: 0 done, 1 failed (the last line says why and what to do), 2 wrong arguments, 130 interrupted.
With --json, what failed prints one JSON object as well, whose "error" has type and message.
"""

COMMANDS = (
    add_node,
    add_generate,
    add_devices,
    add_doctor,
    add_plan,
    add_serve,
    add_chat,
    add_top,
    add_demo,
    add_key,
    add_cache,
    add_support,
    add_bench,
    add_trace,
)
STOP_S = 10.0
"""How long a command may take to end in order; systemd waits for 15 s (firmware_configs/systemd)."""
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class _PlainFormatter(logging.Formatter):
    """One line per message, whatever it quotes. A traceback follows, indented: what an error quotes there may have
    several lines, and none of them is to look like a message.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        return plain_text(super().formatMessage(record))

    def formatException(self, raised: Any) -> str:
        return textwrap.indent(plain_text(super().formatException(raised), keeps_breaks=True), "  ")


class _Parsed(argparse.Namespace):
    """What every command line comes to, beside the options of its command."""

    command: str
    verbose: bool
    json: bool
    run: Callable[[argparse.Namespace], Running]


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; see :class:`_Parsed`."""
    parser: argparse.ArgumentParser = Parser(
        prog="flowspec", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"flowspec-edge {__version__}")
    parser.add_argument("--verbose", action="store_true", help="log what happens on stderr")
    parser.set_defaults(json=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of these arguments, or of the command line. Returns an exit status."""
    options = build_parser().parse_args(arguments, _Parsed())
    log = logging.StreamHandler(sys.stderr)
    log.setFormatter(_PlainFormatter("flowspec: %(message)s"))
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, handlers=[log])
    try:
        return _run(options.run(options))
    except FlowspecError as error:
        if options.json:
            print_failure(error)
        print(f"flowspec {options.command}: {plain_text(str(error), keeps_breaks=True)}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has left, as in `flowspec generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(f"\nflowspec {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(command: Running) -> int:
    """Run until it is done, or until Ctrl-C or SIGTERM cancel it: then it cleans up, for STOP_S at most.

    Whoever asks a second time does not want to wait: the process ends at once.
    """

    async def guarded() -> int:
        task = asyncio.current_task()
        assert task is not None

        def stop() -> None:
            if timer.is_alive():
                _end_at_once()
            timer.start()
            task.cancel()

        timer = threading.Timer(STOP_S, _end_at_once)
        timer.daemon = True
        heeded = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell
            heeded.remove(signal.SIGINT)
        for number in heeded:
            asyncio.get_running_loop().add_signal_handler(number, stop)
        return await command

    return asyncio.run(guarded())


def _end_at_once() -> None:
    """Threads may be in the middle of a forward, or of reading gigabytes; nothing that is kept depends on their end."""
    print("\nflowspec: ended at once", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)
