"""``flowspec serve``: an OpenAI-compatible HTTP API over a ring of the nodes found."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from argparse import ArgumentParser
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flowspec_edge.cli.api_access import ApiAccess, api_url, open_api_access, print_welcome
from flowspec_edge.cli.node_settings import ServingArguments, add_serving, serving_settings, settle_process
from flowspec_edge.cli.options import Commands, access_from, add_network, add_search, check_port, set_command
from flowspec_edge.cli.plan import RingArguments, add_ring_options
from flowspec_edge.cli.ring import open_service
from flowspec_edge.cli.service_manager import ServiceManager
from flowspec_edge.cli.text_limits import TextLimitArguments, add_text_limits, kept_bytes, turn_limits
from flowspec_edge.core.cluster.api_url import API_PORT
from flowspec_edge.errors import BundleError, plain_text
from flowspec_edge.net.addresses import LOOPBACK
from flowspec_edge.node.board import use_board
from flowspec_edge.tasks import until_interrupted

if TYPE_CHECKING:
    from aiohttp.web import Application

    from flowspec_edge.bundle import Bundle
    from flowspec_edge.net.api_discovery import ApiRecord
    from flowspec_edge.net.discovery import Announcer
    from flowspec_edge.node.node import Node
    from flowspec_edge.origin.service import GenerationService
    from flowspec_edge.web.chat_template import ChatTemplate
    from flowspec_edge.web.turns import TurnLimits
    from flowspec_edge.web.viewing import Advise

RENEW_S = 60.0
"""How often to look whether this machine has other names or addresses."""
DEFAULT_SCHEDULE = "flowspec"
"""What ``flowspec serve`` plans for; each request may name another schedule."""


@dataclass(frozen=True, kw_only=True)
class ServeCommand(ServingArguments, RingArguments, TextLimitArguments):
    port: int
    api_host: str | None
    plain_http: bool
    no_layers: bool
    api_name: list[str]
    cors_origin: list[str]
    standby: bool
    strict: bool
    log_requests: bool


def add_serve(commands: Commands) -> None:
    serve = commands.add_parser(
        "serve", help="an HTTP API for clients of OpenAI, Anthropic and Ollama over the nodes found, this one included"
    )
    add_serving(serve)
    add_network(serve)
    add_search(serve)
    _add_api(serve)
    add_ring_options(serve)
    serve.add_argument(
        "--standby",
        action="store_true",
        help="while nobody writes, have boards with free memory fetch and load layers of others, and use them at once "
        "when a board is lost (flowspec plan --standby shows who; default: no)",
    )
    serve.add_argument("--no-layers", action="store_true", help="serve no layers here: answer requests only")
    add_text_limits(serve)
    set_command(serve, ServeCommand, _serve)


def _add_api(serve: ArgumentParser) -> None:
    serve.add_argument("--port", type=int, default=API_PORT, help="port of the HTTP API (default: %(default)s)")
    serve.add_argument(
        "--api-host",
        metavar="HOST",
        help="address of the HTTP API (default: --host where it is given, else this machine only); beyond this machine "
        "clients need the API key, which the first such start prints",
    )
    serve.add_argument(
        "--api-name",
        action="append",
        default=[],
        metavar="NAME",
        help="a name of this machine by which clients reach the API, beside its host name and NAME.local; repeatable",
    )
    serve.add_argument("--plain-http", action="store_true", help="serve the API beyond this machine without encryption")
    serve.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin use the API, as http://localhost:3000; others are refused; repeatable",
    )
    serve.add_argument(
        "--strict", action="store_true", help="refuse requests with fields that are not known (default: pass them over)"
    )
    serve.add_argument("--log-requests", action="store_true", help="one line of JSON on stderr for each request")


async def _serve(options: ServeCommand) -> int:
    from flowspec_edge.cli.advice import advice_of
    from flowspec_edge.cli.show_fetches import FetchDisplay
    from flowspec_edge.node.node import Node

    settle_process()
    port, limits, kept = check_port(options.port), turn_limits(options), kept_bytes(options)
    access = access_from(options)
    api = open_api_access(
        options.api_host or options.host or LOOPBACK,
        is_insecure=options.insecure,
        is_plain=options.plain_http,
        names=options.api_name,
        origins=options.cors_origin,
    )
    profile, _ = use_board(options.board, num_threads=options.threads, memory_mib=options.memory)
    settings = serving_settings(options, access, profile, is_announced=not options.no_layers)
    node = await Node.start(replace(settings, row_kind=options.hidden_rows))
    fetches = FetchDisplay()
    node.on_fetch = fetches.show_own
    try:
        async with open_service(
            options,
            DEFAULT_SCHEDULE,
            access,
            node,
            fetches,
            is_served=True,
            has_standbys=options.standby,
            kept_bytes=kept,
        ) as (service, directory):

            def advise() -> dict[str, Any]:
                return advice_of(directory, node.settings.bundles[0], access, options.cluster)

            await _serve_api(service, api, port, node, limits, options, advise)
    finally:
        await node.close()
    return 0


async def _serve_api(
    service: GenerationService,
    api: ApiAccess,
    port: int,
    node: Node,
    limits: TurnLimits,
    options: ServeCommand,
    advise: Advise,
) -> None:
    """Answer over HTTP until the user ends it."""
    from flowspec_edge.net.api_discovery import announced
    from flowspec_edge.net.server import serve_app
    from flowspec_edge.web import request_log
    from flowspec_edge.web.chat_template import ChatTemplate

    tls = None if api.certificate is None else api.certificate.context
    if options.log_requests:
        logging.getLogger(request_log.__name__).setLevel(logging.INFO)
    chat = await asyncio.to_thread(ChatTemplate.of_bundle, node.settings.bundles[0])
    built = _build(service, api, node.settings.bundles[0], chat, limits, advise, is_strict=options.strict)
    app = await serve_app(built, api.host, port, tls=tls, cancels_on_disconnect=True, explains_tls=True)
    try:
        with contextlib.suppress(asyncio.CancelledError):  # it serves, and Ctrl-C is how that ends
            url = api_url(api, app.port)
            name, cluster = node.settings.name, node.settings.cluster
            print(f"model {service.model} at {url}, node {name}, cluster {cluster}. Ctrl-C ends it.", flush=True)
            await _print_tools(chat)
            print(f"chat with it, and watch its boards: {url.removesuffix('v1')}", flush=True)
            print_welcome(api, url)
            async with (
                announced(_record(service, api, name, app.port)) as announcer,
                _kept_true(api, announcer),
                ServiceManager().serving(f"{service.model} on port {app.port}"),
            ):
                await until_interrupted()
    finally:
        await app.close()


def _record(service: GenerationService, api: ApiAccess, name: str, port: int) -> ApiRecord:
    """By which clients of the network find the API."""
    from flowspec_edge.net.api_discovery import ApiRecord

    needs_key = api.guard.keys is not None
    return ApiRecord(name=name, host=api.host, port=port, scheme=api.scheme, model=service.model, needs_key=needs_key)


async def _print_tools(chat: ChatTemplate) -> None:
    """How the model calls tools. A template that cannot be read is told of where it is asked for."""
    with contextlib.suppress(BundleError):
        form = await chat.call_form()
        how = "in a plain form, for its chat template has none" if form.is_plain else "as its chat template has it"
        print(f"tools are called {how}: {plain_text(' '.join(str(form).split()))}", flush=True)


def _build(
    service: GenerationService,
    api: ApiAccess,
    bundle: Bundle,
    chat: ChatTemplate,
    limits: TurnLimits,
    advise: Advise,
    *,
    is_strict: bool,
) -> Application:
    """The API of a service, in every dialect."""
    from flowspec_edge.web.app import build_app
    from flowspec_edge.web.model_card import ModelCard
    from flowspec_edge.web.viewing import Viewed

    return build_app(
        service,
        api.guard,
        limits,
        chat=chat,
        card=ModelCard.of_bundle(bundle),
        coder=service.tokenizer,
        is_strict=is_strict,
        status=service.status,
        viewed=Viewed(service, advise),
    )


@contextlib.asynccontextmanager
async def _kept_true(api: ApiAccess, announcer: Announcer | None) -> AsyncIterator[None]:
    """Certificate and record tell of the names and addresses that this machine has, meanwhile."""
    from flowspec_edge.net.addresses import addresses_to_announce

    async def renew() -> None:
        known = addresses_to_announce(api.host)
        while True:
            await asyncio.sleep(RENEW_S)
            if api.certificate is not None:
                api.certificate.renew()
            if (now := addresses_to_announce(api.host)) != known and announcer is not None:
                known = now
                await announcer.renew()

    renewing = asyncio.create_task(renew(), name="names and addresses")
    try:
        yield
    finally:
        renewing.cancel()
        await asyncio.wait({renewing})
