"""``flowspec generate``: opens a ring over the nodes found, and has it answer; and how every command opens one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowspec_edge.cli.access import Access
from flowspec_edge.cli.json_report import PartlyDoneError
from flowspec_edge.cli.node_settings import (
    OriginArguments,
    origin_settings,
)
from flowspec_edge.cli.options import (
    SEARCH_S,
    Commands,
    GenerationArguments,
    access_from,
    add_bundle,
    add_generation,
    add_network,
    add_search,
    generate_options_from,
    neighbourhood_from,
    search,
    set_command,
)
from flowspec_edge.cli.plan import RingArguments, add_ring_options, ring_plan_options
from flowspec_edge.cli.show_search import SearchDisplay
from flowspec_edge.errors import FlowspecError, NodeUnavailableError
from flowspec_edge.tasks import interruptible
from flowspec_edge.version import __version__

if TYPE_CHECKING:
    from flowspec_edge.cli.show_fetches import FetchDisplay
    from flowspec_edge.config import Piece
    from flowspec_edge.net.directory import Directory
    from flowspec_edge.net.discovery import Announcement
    from flowspec_edge.node.node import Node
    from flowspec_edge.origin.ring import Ring
    from flowspec_edge.origin.service import GenerationService


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
    prompt = options.prompt
    if prompt == "-":
        with interruptible():
            prompt = sys.stdin.read()
    async with contextlib.AsyncExitStack() as closing:
        display = closing.enter_context(SearchDisplay(options.cluster, is_quiet=options.json))
        from flowspec_edge.cli.show_fetches import FetchDisplay
        from flowspec_edge.node.node import Node

        wanted, access = generate_options_from(options), access_from(options)
        settings = dataclasses.replace(origin_settings(options, access), row_kind=options.hidden_rows)
        node = await Node.start(settings)
        closing.push_async_callback(node.close)
        service, _ = await closing.enter_async_context(
            open_service(options, options.schedule, access, node, FetchDisplay(), is_served=False, display=display)
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
    from flowspec_edge.cli.layout import fitted, terminal_width
    from flowspec_edge.cli.show_plan import format_outcome
    from flowspec_edge.cli.show_ring import print_statistics

    assert last.statistics is not None, "the last piece of an answer has the statistics"
    print()
    print_statistics(last.statistics, file=sys.stderr)
    if last.statistics["prediction"] is not None:
        print(fitted(format_outcome(last.statistics["prediction"]), terminal_width()), file=sys.stderr)


@contextlib.asynccontextmanager
async def open_service(
    options: RingArguments,
    schedule: str,
    access: Access,
    node: Node,
    fetches: FetchDisplay,
    *,
    is_served: bool,
    display: SearchDisplay | None = None,
    has_standbys: bool = False,
    kept_bytes: int | None = 0,
) -> AsyncIterator[tuple[GenerationService, Directory]]:
    """Generations over the nodes found, and the directory of these; where they are served to others, the ring follows
    the nodes that come later. Where none is found, and no number of them was asked for, ``node`` serves all layers.
    """
    from flowspec_edge.net.directory import Directory
    from flowspec_edge.node.resources import unique_name
    from flowspec_edge.origin.service import GenerationService

    where = neighbourhood_from(options, access)
    async with (
        await Directory.start(where, node=unique_name(), version=__version__) as directory,
        GenerationService(
            node,
            node.settings.bundles[0],
            lambda: _nodes_for(options, access, directory, display, None if is_served else node),
            on_fetch=fetches.show_stage,
            plan_options=ring_plan_options(options, schedule),
            boards=directory,
            moves=is_served or options.rebalance,
            moves_at_once=options.rebalance,
            names_links=not is_served,
            wait_for_boards_s=options.wait_for_boards,
            has_standbys=has_standbys,
            kept_bytes=kept_bytes,
        ) as service,
    ):
        if node.settings.is_announced:
            directory.hear_of(_reachable(node))  # where there is no mDNS, it would not be found
        yield service, directory


async def _nodes_for(
    options: RingArguments, access: Access, directory: Directory, display: SearchDisplay | None, spare: Node | None
) -> Sequence[Announcement]:
    """The nodes found to open a ring with. Where there is none, it is ``spare``, a node of this process that is not
    announced.

    Raises:
        NodeUnavailableError: there is none, or fewer than asked for.
    """
    try:
        return await search(options, access, directory, display)
    except NodeUnavailableError as cause:
        if spare is None or options.nodes is not None:
            raise
        print(f"flowspec: this process serves all layers itself: {cause}", file=sys.stderr, flush=True)
    name = spare.settings.name
    directory.hear_of(_reachable(spare))
    return await directory.wait_for(lambda found: name in {board.node for board in found}, SEARCH_S)


def _reachable(node: Node) -> Announcement:
    """The node of this process with an address that leads to it from other boards, too."""
    from flowspec_edge.net.addresses import addresses_to_announce

    return dataclasses.replace(node.announcement, host=addresses_to_announce(node.settings.host)[0])
