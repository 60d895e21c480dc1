"""``flowspec generate`` and ``flowspec serve``: open a ring over the nodes found, and have it answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from argparse import ArgumentParser
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowspec_edge.cli.access import Access, ApiAccess, api_text, open_api_access
from flowspec_edge.cli.json_report import PartlyDoneError
from flowspec_edge.cli.node_settings import (
    OriginArguments,
    ServingArguments,
    add_serving,
    origin_settings,
    serving_settings,
    settle_process,
)
from flowspec_edge.cli.options import (
    Commands,
    GenerationArguments,
    access_from,
    add_bundle,
    add_generation,
    add_network,
    add_search,
    check_port,
    generate_options_from,
    neighbourhood_from,
    search,
    set_command,
)
from flowspec_edge.cli.plan import RingArguments, add_ring_options, ring_plan_options
from flowspec_edge.cli.service_manager import ServiceManager
from flowspec_edge.errors import FlowspecError, RequestError
from flowspec_edge.node.board import use_board
from flowspec_edge.tasks import interruptible, until_interrupted
from flowspec_edge.version import __version__

if TYPE_CHECKING:
    from flowspec_edge.cli.show_fetches import FetchDisplay
    from flowspec_edge.config import Piece
    from flowspec_edge.node.node import Node
    from flowspec_edge.origin.ring import Ring
    from flowspec_edge.origin.service import GenerationService
    from flowspec_edge.web.turns import TurnLimits

DEFAULT_API_PORT = 8008
MAX_TEXTS = 4096
"""Of any kind that ``flowspec serve`` may take: each waiting one may hold a body of 4 MiB."""
DEFAULT_SCHEDULE = "flowspec"
"""What ``flowspec serve`` plans for; each request may name another schedule."""


@dataclass(frozen=True, kw_only=True)
class GenerateCommand(GenerationArguments, OriginArguments, RingArguments):
    prompt: str
    json: bool


def add_generate(commands: Commands) -> None:
    generate = commands.add_parser("generate", help="stream a continuation of a prompt from the nodes found")
    generate.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads standard input")
    add_generation(generate, temperature=0.0, seed=0)
    add_network(generate)
    add_search(generate)
    add_bundle(generate)
    add_ring_options(generate)
    generate.add_argument("--json", action="store_true", help="print text, tokens and statistics as one JSON object")
    set_command(generate, GenerateCommand, _generate)


async def _generate(options: GenerateCommand) -> int:
    from flowspec_edge.cli.show_fetches import FetchDisplay
    from flowspec_edge.node.node import Node

    prompt = options.prompt
    if prompt == "-":
        with interruptible():
            prompt = sys.stdin.read()
    wanted, access = generate_options_from(options), access_from(options)
    settings = origin_settings(options, access)
    async with contextlib.AsyncExitStack() as closing:
        node = await Node.start(settings)
        closing.push_async_callback(node.close)
        service = await closing.enter_async_context(
            _open_service(options, options.schedule, access, node, FetchDisplay(), is_served=False)
        )
        pieces: list[Piece] = []
        drafts = settings.bundles[0].manifest.drafts
        try:
            async with contextlib.aclosing(service.generate(prompt, wanted)) as answer:
                async for piece in answer:
                    if piece.notice is not None:
                        print(f"flowspec generate: {piece.notice}", file=sys.stderr, flush=True)
                        continue
                    pieces.append(piece)
                    if not options.json:
                        print(piece.text, end="", flush=True)
        except FlowspecError as cause:
            raise PartlyDoneError(_report(prompt, pieces, service.writer, drafts), cause) from cause
        if options.json:
            print(json.dumps(_report(prompt, pieces, service.writer, drafts)))
        else:
            _print_figures(pieces[-1])
    return 0


def _report(prompt: str, pieces: list[Piece], ring: Ring | None, drafts: str) -> dict[str, Any]:
    """A text, or what was written of it, with the ring that wrote it and the figures of a whole one."""
    from flowspec_edge.cli.show_ring import ring_table

    return {
        "prompt": prompt,
        "text": "".join(piece.text for piece in pieces),
        "token_ids": [token for piece in pieces for token in piece.token_ids],
        "finish_reason": pieces[-1].finish_reason if pieces else None,
        **((pieces and pieces[-1].statistics) or {}),
        "ring": ring_table(ring.stages) if ring is not None else [],
        "drafts": drafts,
    }


def _print_figures(last: Piece) -> None:
    from flowspec_edge.cli.show_plan import format_outcome
    from flowspec_edge.cli.show_ring import print_statistics

    assert last.statistics is not None, "the last piece of an answer has the statistics"
    print()
    print_statistics(last.statistics, file=sys.stderr)
    if last.statistics["prediction"] is not None:
        print(format_outcome(last.statistics["prediction"]), file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class ServeCommand(ServingArguments, RingArguments):
    port: int
    api_host: str | None
    plain_http: bool
    no_layers: bool
    max_sessions: int
    max_queue: int
    max_per_address: int
    standby: bool
    strict: bool


def add_serve(commands: Commands) -> None:
    serve = commands.add_parser(
        "serve", help="an HTTP API for clients of OpenAI, Anthropic and Ollama over the nodes found, this one included"
    )
    add_serving(serve)
    add_network(serve)
    add_search(serve)
    serve.add_argument("--port", type=int, default=DEFAULT_API_PORT, help="port of the HTTP API (default: %(default)s)")
    serve.add_argument(
        "--api-host",
        metavar="HOST",
        help="address of the HTTP API (default: --host where it is given, else this machine only); beyond this machine "
        "clients need the API key, which the first such start prints",
    )
    serve.add_argument("--plain-http", action="store_true", help="serve the API beyond this machine without encryption")
    add_ring_options(serve)
    serve.add_argument(
        "--standby",
        action="store_true",
        help="while nobody writes, have boards with free memory fetch and load layers of others, and use them at once "
        "when a board is lost (flowspec plan --standby shows who; default: no)",
    )
    serve.add_argument("--no-layers", action="store_true", help="serve no layers here: answer requests only")
    _add_turn_limits(serve)
    serve.add_argument(
        "--strict", action="store_true", help="refuse requests with fields that are not known (default: pass them over)"
    )
    set_command(serve, ServeCommand, _serve)


def _add_turn_limits(serve: ArgumentParser) -> None:
    serve.add_argument(
        "--max-sessions", type=int, default=16, metavar="N", help="write N texts at a time (default: %(default)s)"
    )
    serve.add_argument(
        "--max-queue",
        type=int,
        default=64,
        metavar="N",
        help="let N more wait for their turn; others are told to come back later (default: %(default)s)",
    )
    serve.add_argument(
        "--max-per-address",
        type=int,
        default=32,
        metavar="N",
        help="of all these, N may be of one address; raise it where a proxy stands before the server "
        "(default: %(default)s)",
    )


async def _serve(options: ServeCommand) -> int:
    from flowspec_edge.cli.show_fetches import FetchDisplay
    from flowspec_edge.net.addresses import LOOPBACK
    from flowspec_edge.node.node import Node

    settle_process()
    port, limits = check_port(options.port), _turn_limits(options)
    access = access_from(options)
    api = open_api_access(
        options.api_host or options.host or LOOPBACK, is_insecure=options.insecure, is_plain=options.plain_http
    )
    profile, _ = use_board(options.board, num_threads=options.threads, memory_mib=options.memory)
    node = await Node.start(serving_settings(options, access, profile, is_announced=not options.no_layers))
    fetches = FetchDisplay()
    node.on_fetch = fetches.show_own
    try:
        async with _open_service(
            options, DEFAULT_SCHEDULE, access, node, fetches, is_served=True, has_standbys=options.standby
        ) as service:
            await _serve_api(service, api, port, node, limits, is_strict=options.strict)
    finally:
        await node.close()
    return 0


def _turn_limits(options: ServeCommand) -> TurnLimits:
    """Raises RequestError where one is out of range."""
    from flowspec_edge.web.turns import TurnLimits

    for name, value, least in (
        ("--max-sessions", options.max_sessions, 1),
        ("--max-queue", options.max_queue, 0),
        ("--max-per-address", options.max_per_address, 1),
    ):
        if not least <= value <= MAX_TEXTS:
            raise RequestError(f"{name} is {value}; it must lie between {least} and {MAX_TEXTS}")
    return TurnLimits(options.max_sessions, options.max_queue, options.max_per_address)


async def _serve_api(
    service: GenerationService, api: ApiAccess, port: int, node: Node, limits: TurnLimits, *, is_strict: bool
) -> None:
    """Answer over HTTP until the user ends it."""
    from flowspec_edge.net.server import serve_app
    from flowspec_edge.web.app import build_app
    from flowspec_edge.web.chat_template import ChatTemplate
    from flowspec_edge.web.model_card import ModelCard

    tls = api.credentials.public if api.credentials else None
    bundle = node.settings.bundles[0]
    chat, card = await asyncio.to_thread(ChatTemplate.of_bundle, bundle), ModelCard.of_bundle(bundle)
    built = build_app(service, api.key, limits, chat=chat, card=card, coder=service.tokenizer, is_strict=is_strict)
    app = await serve_app(built, api.host, port, tls=tls, cancels_on_disconnect=True)
    try:
        if api.is_new:
            print(api_text(api), flush=True)
        print(
            f"model {service.model} at {api.url(app.port)}/v1/completions, "
            f"node {node.settings.name}, cluster {node.settings.cluster}. Ctrl-C ends it.",
            flush=True,
        )
        async with ServiceManager().serving(f"{service.model} on port {app.port}"):
            await until_interrupted()
    finally:
        await app.close()


@contextlib.asynccontextmanager
async def _open_service(
    options: RingArguments,
    schedule: str,
    access: Access,
    node: Node,
    fetches: FetchDisplay,
    *,
    is_served: bool,
    has_standbys: bool = False,
) -> AsyncIterator[GenerationService]:
    """Generations over the nodes found; where they are served to others, the ring follows the nodes that come later."""
    from flowspec_edge.net.directory import Directory
    from flowspec_edge.node.resources import unique_name
    from flowspec_edge.origin.service import GenerationService

    where = neighbourhood_from(options, access)
    async with (
        await Directory.start(where, node=unique_name(), version=__version__) as directory,
        GenerationService(
            node,
            node.settings.bundles[0],
            lambda: search(options, access, directory),
            on_fetch=fetches.show_stage,
            plan_options=ring_plan_options(options, schedule),
            boards=directory,
            moves=is_served or options.rebalance,
            moves_at_once=options.rebalance,
            names_links=not is_served,
            wait_for_boards_s=options.wait_for_boards,
            has_standbys=has_standbys,
        ) as service,
    ):
        yield service
