"""Every snippet of the documents is one that works: Python runs in tests, and commands and their options exist."""

import argparse
import importlib.util
import itertools
import re
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

from docs.house import ROOT
from exporter.__main__ import build_parser as export_parser
from exporter.train_head import build_parser as train_head_parser
from flowspec_edge.cli.main import EPILOG, build_parser
from tests.docs.documents import DOCUMENTS, Document

PARSERS = {"flowspec": build_parser, "flowspec-export": export_parser, "flowspec-train-head": train_head_parser}
OURS = {*PARSERS, "make", "python", "python3", "pip"}
AROUND = {"docker", "sudo"}
"""Behind whose options another command may stand."""
FOREIGN = {"cd", "certutil", "curl", "git", "head"}
IMAGE = "flowspec-edge"
LANGUAGES = {"", "python", "sh"}
JOINTS = {"&&", "||", "|", ";", "&"}
PLACEHOLDER = re.compile(r"[A-Z][A-Z/_]*|\.\.\.")
EXTRAS = dict(re.findall(r"^(\w+) = (\[.*)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE))


def commands_in(code: str) -> Iterator[list[str]]:
    """The simple commands of some lines of shell, without comments and redirections."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        command: list[str] = []
        tokens = iter(lexer)
        for token in tokens:
            if token in JOINTS:
                yield command
                command = []
            elif set(token) <= set("<>"):
                next(tokens, None)
            else:
                command.append(token)
        if command:
            yield command


def own_part(command: Sequence[str]) -> list[str]:
    """From where a command is ours: behind assignments, sudo and containers. Empty where it is somebody else's."""
    words = list(itertools.dropwhile(lambda word: re.match(r"\w+=", word), command))
    if words[:2] == ["docker", "run"]:
        return ["flowspec", *words[words.index(IMAGE) + 1 :]]
    names = [Path(word).name if "=" not in word else "" for word in words]
    if names[0] in AROUND:
        start = max((place for place, name in enumerate(names) if name in PARSERS), default=len(words))
        return [*names[start : start + 1], *words[start + 1 :]]
    return [names[0], *words[1:]] if names[0] in OURS else []


@cache
def parser_of(program: str) -> argparse.ArgumentParser:
    return PARSERS[program]()


def check(command: Sequence[str], *, is_whole: bool) -> None:
    """Raise AssertionError where a command of ours is none. One that is not whole may lack arguments, and values."""
    program, *arguments = command
    if program == "make":
        check_make(arguments)
    elif program == "pip":
        for extra in re.findall(r"\[(\w+)\]", " ".join(arguments)):
            assert extra in EXTRAS, extra
    elif program in ("python", "python3"):
        if not PLACEHOLDER.fullmatch(arguments[0]):
            check_python(arguments)
    elif is_whole:
        parser_of(program).parse_args(arguments)
    else:
        check_options(parser_of(program), arguments)


def check_make(arguments: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for argument in arguments:
        name, is_variable, value = argument.partition("=")
        if not is_variable:
            assert re.search(rf"^\.PHONY:.* {re.escape(name)}\b", makefile, re.MULTILINE), name
        elif arguments[0] == "demo" and name == "ARGS":
            parser_of("flowspec").parse_args(["demo", *shlex.split(value)])
        else:
            assert f"$({name})" in makefile, name


def check_python(arguments: Sequence[str]) -> None:
    """The module or file is there, and its source has the options."""
    if arguments[0] == "-m":
        found = importlib.util.find_spec(arguments[1])
        assert found is not None and found.origin is not None, arguments[1]
        path = Path(found.origin)
        path = path.with_name("__main__.py") if path.name == "__init__.py" else path
    else:
        path = ROOT / arguments[0]
    source = path.read_text(encoding="utf-8")
    for option in filter(re.compile("--").match, arguments):
        assert f'"{option}"' in source or 'f"--{' in source, option


def check_options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Commands and options in their order; ``show|new`` names several, and ``COMMAND`` any."""
    for place, argument in enumerate(arguments):
        if argument.startswith("--"):
            assert argument in parser._option_string_actions, argument
        elif not PLACEHOLDER.fullmatch(argument) and parser._subparsers is not None:
            (choices,) = (
                action.choices
                for action in parser._subparsers._group_actions
                if isinstance(action, argparse._SubParsersAction)
            )
            for name in argument.split("|"):
                assert name in choices, name
                check_options(choices[name], arguments[place + 1 :])
            return


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_commands_and_their_options_exist(document: Document) -> None:
    for snippet in document.snippets:
        assert snippet.language in LANGUAGES, f"{document.name}: a block of {snippet.language}, which nobody tries"
        for command in commands_in(snippet.code) if snippet.language == "sh" else ():
            if found := own_part(command):
                tried(document, command, found, is_whole=True)
            else:
                assert command[0] in AROUND | FOREIGN, f"{document.name}: {command}"
    for line in document.commands:
        if {Path(token).name for token in line.split()[:3]} & OURS and " " in line:
            for command in commands_in(line):
                if found := own_part(command):
                    tried(document, command, found, is_whole=False)


def tried(document: Document, command: Sequence[str], found: Sequence[str], *, is_whole: bool) -> None:
    try:
        check(found, is_whole=is_whole)
    except (AssertionError, SystemExit, OSError, ModuleNotFoundError) as cause:
        pytest.fail(f"{document.name}: {' '.join(command)} ({cause})")


def test_the_examples_of_help_are_whole() -> None:
    examples = re.findall(r"^  flowspec (.*?)(?:  |$)", EPILOG, re.MULTILINE)
    assert len(examples) > 10
    for example in examples:
        parser_of("flowspec").parse_args(shlex.split(example))


def test_every_python_snippet_is_run_by_a_test() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    run = set(re.findall(r'python_snippet\("([^"]+)", "([^"]+)"\)', tests))
    there = {
        (document.name, snippet.heading)
        for document in DOCUMENTS
        for snippet in document.snippets
        if snippet.language == "python"
    }
    assert run == there and len(there) > 4
