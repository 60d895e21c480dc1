"""Each option reaches its command with the type that the command's dataclass says."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.cli import node_settings, options
from flowspec_edge.cli.bench import BenchCommand, TraceCommand
from flowspec_edge.cli.cache import ListCommand, PruneCommand
from flowspec_edge.cli.chat import ChatCommand
from flowspec_edge.cli.demo import DemoCommand
from flowspec_edge.cli.devices import DevicesCommand
from flowspec_edge.cli.doctor import DoctorCommand
from flowspec_edge.cli.key import AddApiKeyCommand, KeyCommand, RevokeApiKeyCommand, SetKeyCommand, ShowKeyCommand
from flowspec_edge.cli.main import build_parser
from flowspec_edge.cli.node import NodeCommand
from flowspec_edge.cli.plan import PlanCommand
from flowspec_edge.cli.ring import GenerateCommand
from flowspec_edge.cli.serve import ServeCommand
from flowspec_edge.cli.support import SupportCommand
from flowspec_edge.cli.top import TopCommand
from flowspec_edge.core.device.boards import BoardSettings
from flowspec_edge.core.device.caps import Caps
from flowspec_edge.errors import RequestError
from flowspec_edge.node.board import find_profile, read_facts
from tests.narrowing import present

COMMON = {"command", "verbose", "run", "json"}

BUNDLE = "--bundle b"
NETWORK = "--cluster c --peer h --host 127.0.0.1 --insecure"
SEARCH = "--nodes 2 --wait 1.5"
SERVING = f"{BUNDLE} --name n --threads 2 --memory 64 --board b --precision int8 --kv-cache float16"
SERVING += " --max-watts 9.5 --max-temperature 70 --cache d --cache-limit 2.5 --no-cache"
TEXT = "--schedule chunked --max-new-tokens 4 --temperature 1 --top-k 3 --top-p 0.5 --seed 9 --stop x --stop y"
SERVER = "--url u --api-key k --allow-plain-http"
RING = "--any-precision --context 99 --hidden-rows float16 --equal-split --rebalance --wait-for-boards 5"

# Of each command: its type, what it cannot do without, and everything else that it takes.
COMMANDS = [
    (NodeCommand, "node", f"{SERVING} {NETWORK} --port 1 --json --until-stdin-closes --emulate t"),
    (GenerateCommand, "generate p", f"{TEXT} {NETWORK} {SEARCH} {BUNDLE} {RING} --json"),
    (
        ServeCommand,
        "serve",
        f"{SERVING} {NETWORK} {SEARCH} --port 1 --api-host h --plain-http {RING} --no-layers --standby --strict "
        "--keep-sessions 64 --max-sessions 3 --max-queue 5 --max-per-address 2 --max-per-key 2 --log-requests "
        "--api-name n --cors-origin http://o",
    ),
    (ChatCommand, "chat", f"m --system s --max-new-tokens 3 --temperature 1 --top-p 1 --seed 1 --no-history {SERVER}"),
    (TopCommand, "top", f"--every 3 --json {SERVER}"),
    (DevicesCommand, "devices", f"{NETWORK} {SEARCH} --json"),
    (SupportCommand, "support", f"{NETWORK} --out f"),
    (DoctorCommand, "doctor", f"{NETWORK} {BUNDLE} --wait 3 --json"),
    (
        PlanCommand,
        "plan",
        f"b --testbed t --schedule s --any-precision --context 9 --hidden-rows bfloat16 --standby --json {NETWORK} "
        f"{SEARCH}",
    ),
    (DemoCommand, "demo", f"--nodes 3 --boards t --prompt p --chat --port 8009 {TEXT} {BUNDLE} --json"),
    (ShowKeyCommand, "key show", "--qr --json"),
    (SetKeyCommand, "key set", "k --json"),
    (AddApiKeyCommand, "key api add n", "k --qr --json"),
    (RevokeApiKeyCommand, "key api revoke n", "--json"),
    (KeyCommand, "key api list", "--json"),
    (ListCommand, "cache list", "--cache d --json"),
    (PruneCommand, "cache prune", "--limit 2 --dry-run --cache d --json"),
    (
        BenchCommand,
        "bench --virtual",
        "--slow-origin 3 --chunk-sizes 1 --use-fastest --testbed t --sessions 1,2 --schedules s --prompts p "
        "--temperature 1 --max-new-tokens 9 --num-prompts 2 --processes 2 --planned --threads 2 --ablate --plot d "
        f"--json {BUNDLE}",
    ),
    (
        TraceCommand,
        "trace --out o.svg",
        f"--testbed t --schedule s --prompt-set s --index 2 --temperature 1 --max-new-tokens 3 {BUNDLE}",
    ),
]


Parse = Callable[[str], tuple[argparse.Namespace, Any]]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """What argparse found, and what the command was given of it; the command itself does not run."""
    given: list[Any] = []
    real = options.arguments_of

    def arguments_of(kind: type[Any], parsed: argparse.Namespace) -> Any:
        given.append(real(kind, parsed))
        return given[-1]

    monkeypatch.setattr(options, "arguments_of", arguments_of)

    def parse(line: str) -> tuple[argparse.Namespace, Any]:
        parsed = build_parser().parse_args(line.split())
        parsed.run(parsed).close()
        return parsed, given.pop()

    return parse


def is_of(value: object, hint: Any) -> bool:
    """Whether a value is of an annotation's type; whole numbers are no floats here."""
    if isinstance(hint, types.UnionType):
        return any(is_of(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(is_of(item, typing.get_args(hint)[0]) for item in value)
    return type(value) is hint or (hint is Path and isinstance(value, Path))


@pytest.mark.parametrize(
    ("kind", "least", "most"), COMMANDS, ids=[least.partition(" --")[0] for _, least, _ in COMMANDS]
)
def test_every_option_reaches_its_command_with_its_type(parse: Parse, kind: type[Any], least: str, most: str) -> None:
    hints, set_values = typing.get_type_hints(kind), {}
    for line in (least, f"{least} {most}"):
        parsed, found = parse(line)
        assert type(found) is kind
        assert {field.name for field in dataclasses.fields(kind)} | COMMON >= set(vars(parsed)) - {
            "action",
            "api_action",
        }
        for name, hint in hints.items():
            assert is_of(getattr(found, name), hint), f"{line}: {name} is {getattr(found, name)!r}, not {hint}"
        set_values[line] = dataclasses.asdict(found)
    unset, everything = set_values.values()
    least_has = {"name", "prompt", "virtual", "out"} | {"emulate", "calibrate"}  # the latter exclude --virtual
    assert not {name for name in hints if everything[name] == unset[name]} - least_has, "an option was not given"


def test_every_command_is_among_them() -> None:
    (choices,) = (action.choices for action in build_parser()._actions if isinstance(action.choices, dict))
    assert set(choices) == {least.split()[0] for _, least, _ in COMMANDS}


def test_repeated_options_do_not_gather_over_commands(parse: Parse) -> None:
    """argparse appends to one list of defaults, unless it copies it."""
    assert parse("devices --peer a --peer b")[1].peer == ["a", "b"]
    assert parse("devices")[1].peer == []


@pytest.fixture
def demo_bundle(monkeypatch: pytest.MonkeyPatch) -> object:
    bundle = object()
    monkeypatch.setattr(Bundle, "load", lambda directory: bundle)
    return bundle


def test_a_node_that_serves_is_announced_and_one_that_asks_is_not(parse: Parse, demo_bundle: object) -> None:
    board = BoardSettings(profile=None, cores=(0,), num_threads=3, memory_bytes=7)
    serve = parse("serve --name attic --precision int4 --kv-cache float16 --cache-limit 1")[1]
    access = options.access_from(serve)
    settings = node_settings.serving_settings(serve, access, board, port=5)
    assert (settings.name, settings.port, settings.is_announced, settings.precision) == ("attic", 5, True, "int4")
    assert settings.has_half_cache
    assert (settings.memory_bytes, settings.num_threads, settings.bundles) == (7, 3, (demo_bundle,))
    assert settings.cache is not None and settings.cache.limit_bytes == 2**30
    quiet = node_settings.serving_settings(serve, access, board, is_announced=False)
    assert (quiet.name, quiet.is_announced, quiet.cache, quiet.preferred_port) == ("attic", False, None, 0)
    asking = node_settings.origin_settings(parse("generate p --cluster home")[1], access)
    assert (asking.cluster, asking.is_announced, asking.cache, asking.port) == ("home", False, None, 0)
    assert asking.name != "attic"


def test_a_cap_that_is_typed_comes_before_the_profiles(parse: Parse) -> None:
    warm = replace(present(find_profile("rk3588", read_facts())), caps=Caps(9.0, 80.0))
    board = BoardSettings(profile=warm, cores=(0,), num_threads=1, memory_bytes=7)
    assert node_settings.caps_from(parse("node")[1], board) == Caps(9.0, 80.0)
    assert node_settings.caps_from(parse("node --max-temperature 70")[1], board) == Caps(9.0, 70.0)
    assert not node_settings.caps_from(parse("serve")[1], board, serves_layers=False)


def test_what_is_out_of_range_is_refused(parse: Parse) -> None:
    with pytest.raises(RequestError, match="--cache-limit is -1.0"):
        options.cache_from(parse("node --cache-limit -1")[1])
    assert options.cache_from(parse("node --no-cache --cache-limit -1")[1]) is None
    board = BoardSettings(profile=None, cores=(0,), num_threads=1, memory_bytes=7)
    for typed, text in (
        ("--max-watts 0", "--max-watts is 0; it must be a number of watts from 0.5 to 1000"),
        ("--max-watts nan", "--max-watts is nan"),
        ("--max-temperature 700", "--max-temperature is 700; it must be a number of degrees Celsius from 30 to 110"),
    ):
        with pytest.raises(RequestError, match=text):
            node_settings.caps_from(parse(f"node {typed}")[1], board)
    with pytest.raises(RequestError, match="--max-watts has layers rest, and --no-layers serves none"):
        node_settings.caps_from(parse("serve --max-watts 9")[1], board, serves_layers=False)
    with pytest.raises(RequestError, match="top_p is 2.0"):
        options.generate_options_from(parse("generate p --top-p 2")[1])
