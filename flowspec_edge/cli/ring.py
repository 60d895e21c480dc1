"""``flowspec generate`` and ``flowspec serve``: open a ring over the nodes found, and have it answer."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

from flowspec_edge.cli.access import Access, api_text, neighbourhood, open_api_access
from flowspec_edge.cli.options import (
    access_from,
    add_bundle,
    add_generation,
    add_network,
    add_search,
    add_serving,
    generate_options_from,
    search,
    settings_from,
)
from flowspec_edge.cli.plan import add_plan_options, plan_options_from
from flowspec_edge.node.board import use_board
from flowspec_edge.tasks import until_interrupted
from flowspec_edge.version import __version__

DEFAULT_API_PORT = 8008


def add_generate(commands: Any) -> None:
    generate: argparse.ArgumentParser = commands.add_parser(
        "generate", help="stream a continuation of a prompt from the nodes found"
    )
    generate.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads standard input")
    add_generation(generate, temperature=0.0, seed=0)
    add_network(generate)
    add_search(generate)
    add_bundle(generate)
    add_plan_options(generate)
    generate.add_argument("--json", action="store_true", help="print text, tokens and statistics as one JSON object")
    generate.set_defaults(run=_generate)


async def _generate(options: argparse.Namespace) -> int:
    from flowspec_edge.cli.show_fetches import FetchDisplay
    from flowspec_edge.cli.show_plan import format_outcome
    from flowspec_edge.cli.show_ring import print_statistics, ring_table
    from flowspec_edge.node.node import Node

    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    wanted, access = generate_options_from(options), access_from(options)
    settings = settings_from(options, access, is_announced=False)
    async with contextlib.AsyncExitStack() as closing:
        node = await Node.start(settings)
        closing.push_async_callback(node.close)
        service = await closing.enter_async_context(
            _open_service(options, access, node, FetchDisplay(), is_served=False)
        )
        pieces = []
        async with contextlib.aclosing(service.generate(prompt, wanted)) as answer:
            async for piece in answer:
                pieces.append(piece)
                if not options.json:
                    print(piece.text, end="", flush=True)
        last, ring = pieces[-1], service.writer
        assert last.statistics is not None and ring is not None
        if options.json:
            report = {
                "prompt": prompt,
                "text": "".join(piece.text for piece in pieces),
                "token_ids": [token for piece in pieces for token in piece.token_ids],
                "finish_reason": last.finish_reason,
                **last.statistics,
                "ring": ring_table(ring.stages),
                "drafts": settings.bundles[0].manifest.drafts,
            }
            print(json.dumps(report))
        else:
            print()
            print_statistics(last.statistics, file=sys.stderr)
            if last.statistics["prediction"] is not None:
                print(format_outcome(last.statistics["prediction"]), file=sys.stderr)
    return 0


def add_serve(commands: Any) -> None:
    serve: argparse.ArgumentParser = commands.add_parser(
        "serve", help="an OpenAI-compatible HTTP API over the nodes found, this one included"
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
    add_plan_options(serve)
    serve.add_argument("--no-layers", action="store_true", help="serve no layers here: answer requests only")
    serve.set_defaults(run=_serve)


async def _serve(options: argparse.Namespace) -> int:
    from flowspec_edge.cli.show_fetches import FetchDisplay
    from flowspec_edge.net.addresses import LOOPBACK
    from flowspec_edge.net.server import serve_app
    from flowspec_edge.node.node import Node
    from flowspec_edge.web.completions import build_app

    api_port, options.port = options.port, 0
    access = access_from(options)
    api = open_api_access(
        options.api_host or options.host or LOOPBACK, is_insecure=options.insecure, is_plain=options.plain_http
    )
    profile, _ = use_board(options.board, num_threads=options.threads, memory_mib=options.memory)
    settings = settings_from(options, access, is_announced=not options.no_layers, board=profile)
    node = await Node.start(settings)
    fetches = FetchDisplay()
    node.on_fetch = fetches.show_own
    try:
        async with _open_service(options, access, node, fetches, is_served=True) as service:
            tls = api.credentials.public if api.credentials else None
            app = await serve_app(build_app(service, api.key), api.host, api_port, tls=tls, cancels_on_disconnect=True)
            try:
                if api.is_new:
                    print(api_text(api), flush=True)
                print(
                    f"model {service.model} at {api.scheme}://{api.host}:{app.port}/v1/completions, "
                    f"node {settings.name}, cluster {options.cluster}. Ctrl-C ends it.",
                    flush=True,
                )
                await until_interrupted()
            finally:
                await app.close()
    finally:
        await node.close()
    return 0


@contextlib.asynccontextmanager
async def _open_service(
    options: argparse.Namespace, access: Access, node: Any, fetches: Any, *, is_served: bool
) -> AsyncIterator[Any]:
    """A ring over the nodes found, opened when it is needed; where it ``is_served`` to others, it follows those that come later."""
    from flowspec_edge.net.directory import Directory
    from flowspec_edge.node.node import unique_name
    from flowspec_edge.origin.service import GenerationService

    where = neighbourhood(options, access)
    async with (
        await Directory.start(where, node=unique_name(), version=__version__) as directory,
        GenerationService(
            node,
            node.settings.bundles[0],
            lambda: search(options, access, directory),
            on_fetch=fetches.show_stage,
            plan_options=plan_options_from(options),
            boards=directory if is_served or options.rebalance else None,
            moves_at_once=options.rebalance,
            names_links=not is_served,
        ) as service,
    ):
        yield service
