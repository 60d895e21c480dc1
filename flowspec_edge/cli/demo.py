"""``flowspec demo`` as it is called; ``run_demo.py``, ``run_boards_demo.py`` and ``run_chat_demo.py`` do it."""

from __future__ import annotations

from dataclasses import dataclass

from flowspec_edge.cli.options import (
    BundleArguments,
    Commands,
    GenerationArguments,
    add_bundle,
    add_generation,
    bundle_from,
    check_port,
    generate_options_from,
    set_command,
)
from flowspec_edge.core.cluster.api_url import API_PORT
from flowspec_edge.errors import RequestError

NUM_NODES = 4


@dataclass(frozen=True, kw_only=True)
class DemoCommand(GenerationArguments, BundleArguments):
    nodes: int | None
    boards: str | None
    prompt: str | None
    chat: bool
    port: int
    json: bool


def add_demo(commands: Commands) -> None:
    demo = commands.add_parser("demo", help="start nodes on this machine, answer a prompt, show each trip, stop them")
    demo.add_argument("--nodes", type=int, help=f"how many nodes to start (default: {NUM_NODES})")
    demo.add_argument(
        "--boards",
        metavar="TESTBED",
        help="have the nodes take the time of described boards, such as pi5x4-3b-int4, and write the text twice, "
        "without drafts and with them (flowspec bench --help lists testbeds)",
    )
    demo.add_argument("--prompt", default=None, help="the text to continue (default: the head of a Python class)")
    demo.add_argument(
        "--chat",
        action="store_true",
        help="serve the nodes instead, with a page to chat at that shows the draft tree, until Ctrl-C; with --prompt "
        "until that is answered",
    )
    demo.add_argument("--port", type=int, default=API_PORT, help="with --chat: the page's port (default: %(default)s)")
    add_generation(demo, temperature=0.6, seed=7)
    add_bundle(demo)
    demo.add_argument("--json", action="store_true", help="print one JSON object instead of the display")
    set_command(demo, DemoCommand, _demo)


async def _demo(options: DemoCommand) -> int:
    bundle, wanted = bundle_from(options), generate_options_from(options)
    if options.boards is not None:
        from flowspec_edge.cli.run_boards_demo import run_boards_demo

        if options.chat or options.nodes is not None:
            raise RequestError("--boards is not for --chat, and has as many nodes as the testbed has boards")
        return await run_boards_demo(
            boards=options.boards, bundle=bundle, prompt=options.prompt, options=wanted, is_json=options.json
        )
    num_nodes = NUM_NODES if options.nodes is None else options.nodes
    if not 1 <= num_nodes <= 64:
        raise RequestError(f"--nodes is {num_nodes}; it must lie between 1 and 64")
    if options.chat:
        from flowspec_edge.cli.run_chat_demo import run_chat_demo

        if options.json:
            raise RequestError("--json is not for --chat; ask its API, or leave out --chat")
        return await run_chat_demo(
            num_nodes=num_nodes,
            bundle=bundle,
            prompt=options.prompt,
            options=wanted,
            port=check_port(options.port),
        )
    from flowspec_edge.cli.run_demo import run_demo

    return await run_demo(
        num_nodes=num_nodes, bundle=bundle, prompt=options.prompt, options=wanted, is_json=options.json
    )
