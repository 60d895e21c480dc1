"""``flowspec``: the commands. Each builds its parts, runs them, and turns an error into one sentence and an exit status."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any

from flowspec_edge import __version__
from flowspec_edge.access import (
    DEFAULT_CLUSTER,
    NO_KEY_HINT,
    Access,
    add_key,
    api_text,
    neighbourhood,
    open_access,
    open_api_access,
    run_key,
    welcome_text,
)
from flowspec_edge.bench.arguments import EMULATED_SCHEDULES, add_bench, add_trace
from flowspec_edge.board_settings import board_report, describe_board, thermometer_of, use_board
from flowspec_edge.cache_commands import add_cache, add_cache_options, cache_from
from flowspec_edge.core.boards import BoardSettings
from flowspec_edge.core.schedules import SCHEDULES
from flowspec_edge.errors import FlowspecError, NodeUnavailableError, RequestError
from flowspec_edge.net.addresses import NODE_PORT
from flowspec_edge.plan_commands import add_plan, add_plan_options, run_testbed_plan, show_plan, wishes_from

DESCRIPTION = """\
Run one large language model across the boards on your LAN. Every board runs `flowspec node`; they find each other, and
whoever asks streams a tree of draft tokens around the ring, so that one request keeps every board busy.
"""

EPILOG = """\
examples:
  flowspec demo                               four nodes on this machine answer a prompt
  flowspec node                               serve layers of the demo model; the first prints the line for the other boards
  flowspec generate 'def main(argv):'         spread the model over the nodes found and stream the text
  flowspec serve                              the same behind an OpenAI-compatible HTTP API
  flowspec devices                            who is there
  flowspec doctor                             who is not there, why, and what mends it
  flowspec plan                               who would serve what, and how fast that should be
  flowspec cache list                         which weights this machine has fetched and kept
  flowspec bench --virtual                    what to expect of boards, without the boards

exit status: 0 done, 1 failed (the last line says why and what to do), 2 wrong arguments, 130 interrupted.
"""

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
DEFAULT_API_PORT = 8008
SEARCH_S = 5.0
"""How long to look for nodes. All of a LAN answer within 1.5 s of the last start (zeroconf 0.154)."""
DOCTOR_S = 7.0
"""How long doctor listens: a silent address is given up after 5 s, and what peers tell comes before."""
SETTLE_S = 1.5
"""How long to go on looking after the first node, where it is not said how many there are."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowspec", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"flowspec-edge {__version__}")
    parser.add_argument("--verbose", action="store_true", help="log what happens on stderr")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    node = commands.add_parser("node", help="serve layers to whoever finds this node")
    _add_serving(node)
    _add_network(node)
    node.add_argument("--port", type=int, default=0, help="port to listen on (default: any free one)")
    node.add_argument("--json", action="store_true", help="print the node's name and address as one JSON object")
    node.add_argument("--until-stdin-closes", action="store_true", help="end when standard input does; for scripts")
    node.add_argument(
        "--emulate",
        metavar="TESTBED",
        help="compute and send at the pace of a testbed's board, and print as JSON, at the end of each session, the seconds "
        "that its computing should have taken and those that it took longer (see flowspec bench --emulate)",
    )
    node.set_defaults(run=_node)

    generate = commands.add_parser("generate", help="stream a continuation of a prompt from the nodes found")
    generate.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads standard input")
    _add_generation(generate, temperature=0.0, seed=0)
    _add_network(generate)
    _add_search(generate)
    _add_bundle(generate)
    add_plan_options(generate)
    generate.add_argument("--json", action="store_true", help="print text, tokens and statistics as one JSON object")
    generate.set_defaults(run=_generate)

    devices = commands.add_parser("devices", help="list the nodes found, their memory and what they can serve")
    _add_network(devices)
    _add_search(devices)
    devices.add_argument("--json", action="store_true", help="print a JSON list")
    devices.set_defaults(run=_devices)

    doctor = commands.add_parser("doctor", help="why boards do not find each other, and the command that mends it")
    _add_network(doctor)
    _add_bundle(doctor)
    doctor.add_argument(
        "--wait",
        type=float,
        default=DOCTOR_S,
        metavar="S",
        help="listen this long (default: %(default)s; an address that stays silent takes 5)",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=_doctor)

    plan = add_plan(commands)
    _add_network(plan)
    _add_search(plan)
    plan.set_defaults(run=_plan)

    serve = commands.add_parser("serve", help="an OpenAI-compatible HTTP API over the nodes found, this one included")
    _add_serving(serve)
    _add_network(serve)
    _add_search(serve)
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

    demo = commands.add_parser("demo", help="start nodes on this machine, answer a prompt, show each trip, stop them")
    demo.add_argument("--nodes", type=int, default=4, help="how many nodes to start (default: %(default)s)")
    demo.add_argument("--prompt", default=None, help="the text to continue (default: the head of a Python class)")
    _add_generation(demo, temperature=0.6, seed=7)
    _add_bundle(demo)
    demo.add_argument("--json", action="store_true", help="print one JSON object instead of the display")
    demo.set_defaults(run=_demo)

    add_key(commands).set_defaults(run=run_key)
    add_cache(commands)

    bench = add_bench(commands)
    _add_bundle(bench)
    bench.set_defaults(run=_bench)

    trace = add_trace(commands)
    _add_bundle(trace)
    trace.set_defaults(run=_trace)
    return parser


def _add_bundle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="model bundle (default: the demo model)")


def _add_serving(parser: argparse.ArgumentParser) -> None:
    _add_bundle(parser)
    parser.add_argument("--name", help="name that others see (default: host name and six random digits)")
    parser.add_argument("--threads", type=int, default=None, help="threads per stage (default: the board profile's)")
    parser.add_argument("--memory", type=int, metavar="MIB", help="memory to offer (default: the board profile's)")
    parser.add_argument(
        "--board",
        metavar="NAME",
        help="board profile to use, or a TOML file (default: recognised; see firmware_configs)",
    )
    parser.add_argument(
        "--precision",
        metavar="NAME",
        help="run layers in this precision, one of those that the bundle has (default: the one that flowspec bench --calibrate "
        "--use-fastest chose here, else the bundle's own)",
    )
    add_cache_options(parser)


def _add_network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", default=DEFAULT_CLUSTER, help="only nodes of the same label find each other")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help=f"a node to ask for the others, where mDNS does not reach (default port: {NODE_PORT}); repeatable",
    )
    parser.add_argument(
        "--host", help="address to listen on (default: all of this machine's with a cluster key, 127.0.0.1 without)"
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="do without key and encryption: everyone on the network of --host can use the node and read its traffic",
    )


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, metavar="N", help="go on as soon as N nodes are found")
    parser.add_argument(
        "--wait", type=float, default=SEARCH_S, metavar="S", help="look this long (default: %(default)s)"
    )


def _add_generation(parser: argparse.ArgumentParser, *, temperature: float, seed: int) -> None:
    parser.add_argument("--schedule", default="flowspec", help=f"one of {', '.join(SCHEDULES)} (default: flowspec)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=temperature, metavar="T", help="0 is greedy (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest (default: all)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample within this mass (default: 1, all)"
    )
    parser.add_argument(
        "--seed", type=int, default=seed, help="same seed, same text, on any ring (default: %(default)s)"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING, format="flowspec: %(message)s", stream=sys.stderr
    )
    try:
        return _run(options.run(options))
    except FlowspecError as error:
        print(f"flowspec {options.command}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has left, as in `flowspec generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(f"\nflowspec {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(command: Coroutine[Any, Any, int]) -> int:
    """Run with SIGTERM treated as Ctrl-C is: the command is cancelled and cleans up."""

    async def guarded() -> int:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await command

    return asyncio.run(guarded())


# What needs ONNX Runtime is imported where it is used: `flowspec --help` answers at once.


async def _node(options: argparse.Namespace) -> int:
    from flowspec_edge.fetch_display import FetchDisplay
    from flowspec_edge.node import Board, Node
    from flowspec_edge.peer_display import PeerDisplay

    board = Board()
    if options.emulate is not None:
        from flowspec_edge.bench.emulate import tell_lateness
        from flowspec_edge.bench.emulated_board import EmulatedBoard
        from flowspec_edge.bench.testbed import load_testbed

        board = EmulatedBoard(load_testbed(options.emulate), tell_lateness)
    access = _access(options, makes_key=True)
    if access.new_key is not None:
        print(
            welcome_text(access.new_key, options.cluster), file=sys.stderr if options.json else sys.stdout, flush=True
        )
    profile, facts = use_board(options)
    settings = _settings(options, access, is_announced=True, board=profile)
    display = PeerDisplay(settings.neighbourhood, is_quiet=options.json)
    node = await Node.start(settings, board, display.show)
    display.port = node.port
    node.on_fetch = FetchDisplay().show_own
    try:
        if options.json:
            report = {"node": node.settings.name, "host": node.settings.host, "port": node.port}
            print(json.dumps({**report, **board_report(profile)}), flush=True)
        else:
            memory = node.settings.memory_bytes / 2**20
            print(
                f"node {node.settings.name} serves on {node.settings.host}:{node.port}, cluster {options.cluster}, "
                f"{memory:.0f} MiB for layers. Ctrl-C ends it.",
                describe_board(profile, facts),
                sep="\n",
                flush=True,
            )
        if options.until_stdin_closes:
            await asyncio.get_running_loop().connect_read_pipe(_UntilEnd, sys.stdin)
            await _UntilEnd.ended.wait()
        else:
            await _until_interrupted()
    finally:
        await node.close()
    return 0


class _UntilEnd(asyncio.Protocol):
    ended = asyncio.Event()

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set()


async def _until_interrupted() -> None:
    """Serving ends by Ctrl-C or SIGTERM, and that is no failure."""
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.Event().wait()


async def _generate(options: argparse.Namespace) -> int:
    from flowspec_edge.display import print_statistics, ring_table
    from flowspec_edge.fetch_display import FetchDisplay
    from flowspec_edge.node import Node
    from flowspec_edge.plan_display import format_outcome

    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    wanted, access = _generate_options(options), _access(options)
    settings = _settings(options, access, is_announced=False)
    async with contextlib.AsyncExitStack() as closing:
        node = await Node.start(settings)
        closing.push_async_callback(node.close)
        service = await closing.enter_async_context(_service(options, access, node, FetchDisplay(), is_served=False))
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


@contextlib.asynccontextmanager
async def _service(
    options: argparse.Namespace, access: Access, node: Any, fetches: Any, *, is_served: bool
) -> AsyncIterator[Any]:
    """A ring over the nodes found, opened when it is needed; where it ``is_served`` to others, it follows those that come later."""
    from flowspec_edge.net.directory import Directory
    from flowspec_edge.node import unique_name
    from flowspec_edge.service import GenerationService

    where = neighbourhood(options, access)
    async with await Directory.start(where, node=unique_name(), version=__version__) as directory:
        opening = GenerationService.start(
            node,
            node.settings.bundles[0],
            lambda: _search(options, access, directory),
            fetches.show_stage,
            wishes_from(options),
            directory if is_served or options.rebalance else None,
            moves_at_once=options.rebalance,
            names_links=not is_served,
        )
        async with opening as service:
            yield service


async def _devices(options: argparse.Namespace) -> int:
    from flowspec_edge.node import ask_nodes

    access = _access(options)
    devices = await ask_nodes(await _search(options, access), options.cluster, access.credentials)
    if options.json:
        print(json.dumps(devices))
        return 0
    print(f"{'NODE':32} {'ADDRESS':22} {'VERSION':8} {'FREE':>10}  STATE")
    for device in devices:
        free = device["free_memory_bytes"]
        free_text = "-" if free is None else f"{free / 2**20:.0f} MiB"
        print(f"{device['node']:32} {device['address']:22} {device['version']:8} {free_text:>10}  {device['state']}")
    return 0


async def _doctor(options: argparse.Namespace) -> int:
    from flowspec_edge.doctor import run_doctor

    return await run_doctor(options, _access(options), _bundle(options))


async def _plan(options: argparse.Namespace) -> int:
    if options.testbed is not None:
        return run_testbed_plan(options.testbed, options.schedule, is_json=options.json)
    from flowspec_edge.node import Node
    from flowspec_edge.ring import plan_layers

    access = _access(options)
    settings = _settings(options, access, is_announced=False)
    wishes = wishes_from(options)
    found = await _search(options, access)
    node = await Node.start(settings)
    try:
        plan = await plan_layers(node, settings.bundles[0], found, wishes)
    finally:
        await node.close()
    show_plan(plan, options.schedule, settings.bundles[0].manifest.drafts, is_json=options.json)
    return 0


async def _serve(options: argparse.Namespace) -> int:
    from flowspec_edge.fetch_display import FetchDisplay
    from flowspec_edge.net.addresses import LOOPBACK
    from flowspec_edge.net.http_api import build_app
    from flowspec_edge.net.server import serve_app
    from flowspec_edge.node import Node

    api_port, options.port = options.port, 0
    access = _access(options)
    api = open_api_access(
        options.api_host or options.host or LOOPBACK, is_insecure=options.insecure, is_plain=options.plain_http
    )
    profile, _ = use_board(options)
    settings = _settings(options, access, is_announced=not options.no_layers, board=profile)
    node = await Node.start(settings)
    fetches = FetchDisplay()
    node.on_fetch = fetches.show_own
    try:
        async with _service(options, access, node, fetches, is_served=True) as service:
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
                await _until_interrupted()
            finally:
                await app.close()
    finally:
        await node.close()
    return 0


async def _demo(options: argparse.Namespace) -> int:
    from flowspec_edge.demo import run_demo

    if not 1 <= options.nodes <= 64:
        raise RequestError(f"--nodes is {options.nodes}; it must lie between 1 and 64")
    return await run_demo(
        num_nodes=options.nodes,
        bundle=_bundle(options),
        prompt=options.prompt,
        options=_generate_options(options),
        is_json=options.json,
    )


def _chunk_sizes(text: str) -> tuple[int, ...]:
    from flowspec_edge.core.wire import MAX_CHUNK_ROWS

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= MAX_CHUNK_ROWS for part in parts):
        raise RequestError(f"--chunk-sizes is {text!r}; give numbers of rows from 1 to {MAX_CHUNK_ROWS}, as in 1,4,16")
    return tuple(dict.fromkeys(map(int, parts)))


async def _bench(options: argparse.Namespace) -> int:
    from flowspec_edge.bench.commands import run_calibration, run_emulated, run_virtual
    from flowspec_edge.bench.compare import default_processes
    from flowspec_edge.bench.request import Request

    bundle = _bundle(options)
    if options.calibrate:
        if options.threads < 1:
            raise RequestError(f"--threads is {options.threads}; it must be at least 1")
        return await run_calibration(
            bundle,
            num_threads=options.threads,
            sizes_in_use=_chunk_sizes(options.chunk_sizes),
            uses_fastest=options.use_fastest,
            is_json=options.json,
        )
    request = Request(
        testbeds=options.testbed,
        schedules=options.schedules or (EMULATED_SCHEDULES if options.emulate else "all"),
        prompts=options.prompts,
        temperatures=options.temperature,
        num_prompts=options.num_prompts,
        max_new_tokens=options.max_new_tokens,
        is_planned=options.planned,
    )
    if options.emulate:
        if options.ablate or options.plot is not None:
            raise RequestError("--ablate and --plot go with --virtual, not with --emulate")
        return await run_emulated(bundle, request, is_json=options.json)
    return await run_virtual(
        bundle,
        request,
        num_processes=default_processes() if options.processes is None else options.processes,
        is_ablation=options.ablate,
        is_json=options.json,
        plot=options.plot,
    )


async def _trace(options: argparse.Namespace) -> int:
    from flowspec_edge.bench.commands import run_trace

    return await run_trace(
        bundle=_bundle(options),
        testbed=options.testbed,
        schedule=options.schedule,
        prompt_set=options.prompt_set,
        number=options.index,
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
        out=options.out,
    )


def _access(options: argparse.Namespace, *, makes_key: bool = False) -> Access:
    return open_access(options.host, is_insecure=options.insecure, makes_key=makes_key)


async def _search(options: argparse.Namespace, access: Access, directory: Any = None) -> list[Any]:
    """The nodes of the cluster, from a directory that is open, or one of its own.

    Raises:
        NodeUnavailableError: there is none, or fewer than asked for.
    """
    from flowspec_edge.net.directory import find_peers, search_peers
    from flowspec_edge.node import unique_name

    limits = {"num_nodes": options.nodes, "timeout_s": options.wait, "settle_s": SETTLE_S}
    try:
        if directory is not None:
            return await search_peers(directory, **limits)
        where = neighbourhood(options, access)
        return await find_peers(where, node=unique_name(), version=__version__, **limits)
    except NodeUnavailableError as cause:
        if options.host is None and access.is_loopback:
            raise NodeUnavailableError(f"{cause}; {NO_KEY_HINT}") from cause
        raise


def _bundle(options: argparse.Namespace) -> Any:
    from flowspec_edge.node import DEMO_BUNDLE, Bundle

    return Bundle.load(options.bundle or DEMO_BUNDLE)


def _settings(
    options: argparse.Namespace, access: Access, *, is_announced: bool, board: BoardSettings | None = None
) -> Any:
    from flowspec_edge.node import NodeSettings, available_memory_bytes, unique_name

    where = neighbourhood(options, access)
    return NodeSettings(
        name=getattr(options, "name", None) or unique_name(),
        cluster=options.cluster,
        host=access.host,
        credentials=access.credentials,
        is_insecure=access.is_insecure,
        port=getattr(options, "port", 0),
        preferred_port=0 if access.is_loopback or not is_announced else NODE_PORT,
        peers=where.peers,
        remembers=where.remembers,
        bundles=(_bundle(options),),
        memory_bytes=available_memory_bytes() if board is None else board.memory_bytes,
        num_threads=len(os.sched_getaffinity(0)) if board is None else board.num_threads,
        is_announced=is_announced,
        cache=cache_from(options) if is_announced else None,
        precision=getattr(options, "precision", None),
        thermometer=None if board is None else thermometer_of(board),
    )


def _generate_options(options: argparse.Namespace) -> Any:
    from flowspec_edge.config import GenerateOptions

    return GenerateOptions(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        schedule=options.schedule,
        stop=tuple(options.stop),
    )


if __name__ == "__main__":
    sys.exit(main())
