"""Dialogues at a terminal and without one, and what the commands within them do."""

import asyncio
import contextlib
import json
import os
import pty
import re
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from flowspec_edge.cli.dialogue import COMMANDS, Dialogue, perform
from flowspec_edge.cli.parser import nearest
from flowspec_edge.config import Piece
from flowspec_edge.errors import StageFailedError
from tests.narrowing import present
from tests.web.served import serving_dialects
from tests.web.test_completions import PIECES, STATISTICS, ScriptedGenerator

END = Piece(text="", token_ids=[], finish_reason="stop", statistics={**STATISTICS, "tokens_per_s": 8.25})


@contextlib.asynccontextmanager
async def serving(script: Sequence[Piece | Exception | None]) -> AsyncIterator[tuple[ScriptedGenerator, str]]:
    async with asyncio.timeout(90), serving_dialects(script, family=None) as (generator, url):
        yield generator, url.removeprefix("http://")


async def chat(url: str, said: str, *options: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "flowspec_edge", "chat", "--url", url, *options),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate(said.encode())
    return present(process.returncode), out.decode(), err.decode()


def test_commands_do_what_they_say(tmp_path: Path) -> None:
    told: list[str] = []
    dialogue = Dialogue(model="demo")

    def do(line: str) -> str:
        assert perform(dialogue, line, told.append) is line.startswith("/quit")
        return told[-1] if told else ""

    assert do("/system be\x1b brief") == "system: be\\x1b brief"
    dialogue.add("a", "b")
    dialogue.add("c", "d")
    assert [one["role"] for one in dialogue.messages] == ["system", *["user", "assistant"] * 2]
    assert do("/undo") == "1 messages are left"
    assert do(f"/save {tmp_path / 'd.json'}").startswith("saved in")
    assert do(f"/save {tmp_path / 'd.md'}").startswith("saved in")
    assert "**user**\n\na" in (tmp_path / "d.md").read_text()
    assert do("/clear") == "the dialogue begins anew"
    assert [one["role"] for one in dialogue.messages] == ["system"]
    dialogue.system = None
    assert do(f"/load {tmp_path / 'd.json'}").startswith("1 messages from")
    assert dialogue.messages[0]["content"] == "be\x1b brief" and dialogue.turns[1]["content"] == "b"
    assert "holds no dialogue" in do(f"/load {tmp_path / 'd.md'}")
    assert "cannot be read (No such file" in do("/load /nowhere/x")
    assert "cannot be written" in do("/save /nowhere/x")
    assert do("/save") == "/save needs a file: /save FILE"
    assert do("/sytem") == "/sytem is no command; did you mean /system?"
    assert do("/zzz") == "/zzz is no command; see /help"
    assert all(usage in do("/help") for usage, _ in COMMANDS.values())
    do("/quit")


@pytest.mark.parametrize(
    ("text", "close"),
    [("--max-tokens", "--max-new-tokens"), ("--temprature", "--temperature"), ("--model", "--bundle"), ("--zzz", None)],
)
def test_near_misses_are_answered_with_the_right_option(text: str, close: str | None) -> None:
    assert nearest(text, ["--max-new-tokens", "--temperature", "--bundle", "--seed"]) == close


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("generate x --max-tokens 5", "--max-tokens: did you mean --max-new-tokens?"),
        ("chat --sytem=x", "--sytem: did you mean --system?"),
        ("node --verbose", "--verbose: it stands before the command: flowspec --verbose ..."),
        ("serve --allowed-origins x", "--allowed-origins: did you mean --cors-origin?"),
        ("genrate x", "did you mean generate?"),
        ("key api revke x", "did you mean revoke?"),
    ],
)
def test_the_command_line_says_so(line: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    from flowspec_edge.cli.main import build_parser

    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(line.split())
    assert ended.value.code == 2
    assert hint in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
async def test_lines_of_standard_input_are_messages_of_one_dialogue() -> None:
    async with serving([Piece(text="so\x1b[31m\nit is", token_ids=[5]), END]) as (generator, url):
        status, out, err = await chat(url, "one\n/sytem\ntwo\n", "--system", "be brief", "--max-new-tokens", "7")
    assert (status, out) == (0, "so\\x1b[31m\nit is\n" * 2)
    assert err == "/sytem is no command; did you mean /system?\n"
    first, second = (str(prompt) for prompt, _ in generator.asked)
    assert "be brief" in first and "two" not in first
    assert all(text in second for text in ("be brief", "one", "it is", "two"))
    assert {options.max_new_tokens for _, options in generator.asked} == {7}


@pytest.mark.slow
async def test_a_message_of_the_command_line_is_answered_and_a_failure_is_told() -> None:
    async with serving(PIECES) as (generator, url):
        assert await chat(url, "", "hello") == (0, "ab\n\n", "")
        generator.script = [StageFailedError("node pi-hall was lost")]
        status, _, err = await chat(url, "", "hello")
        assert status == 1 and "pi-hall was lost" in err and "Traceback" not in err
        status, _, err = await chat(url, "hello\n")
        assert status == 1 and "pi-hall was lost" in err


class Terminal:
    """A terminal of 80 columns with a dialogue in it."""

    def __init__(self, controlling: int, pid: int) -> None:
        self._controlling, self._pid = controlling, pid
        self.seen = ""
        self._has_read = asyncio.Event()
        asyncio.get_running_loop().add_reader(controlling, self._read)

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            self.seen += os.read(self._controlling, 4096).decode(errors="replace")
        self._has_read.set()

    def type(self, text: str) -> None:
        os.write(self._controlling, text.encode())

    async def until(self, *texts: str) -> None:
        """Until all these texts are on it, one behind the other."""
        wanted = re.compile(".*".join(map(re.escape, texts)), re.DOTALL)
        while not wanted.search(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.seen)):
            self._has_read.clear()
            await self._has_read.wait()

    async def prompted(self, *texts: str) -> None:
        """Until the dialogue sleeps for a line behind these texts. Of a key that means something and comes earlier, the
        terminal drops Ctrl-D, and readline hears Ctrl-C only with the next key.
        """
        await self.until(*texts, "\n> ")
        while not self._sleeps():
            await asyncio.sleep(0.01)

    def _sleeps(self) -> bool:
        return Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


@pytest.mark.slow
async def test_ctrl_c_interrupts_a_reply_and_ctrl_d_ends_the_dialogue(state: Path, tmp_path: Path) -> None:
    controlling, terminal = pty.openpty()
    async with serving([Piece(text="word ", token_ids=[5]), None]) as (generator, url):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "flowspec_edge", "chat", "--url", url),
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            preexec_fn=lambda: _take_terminal(terminal),
        )
        screen = Terminal(controlling, process.pid)
        try:
            await screen.prompted("Ctrl-C interrupts")
            screen.type("\x03")
            await screen.prompted("(Ctrl-D ends)")
            screen.type("well?\r")
            await screen.until("word ")
            screen.type("\x03")
            await screen.prompted("interrupted")
            await generator.is_closed.wait()
            generator.script = [Piece(text="yes", token_ids=[5]), END]
            screen.type("and now?\r")
            await screen.prompted("2 tokens, 8.2 tokens/s")
            screen.type(f"/save {tmp_path / 'd.json'}\r")
            await screen.prompted("saved in")
            screen.type("\x04")
            assert await process.wait() == 0
        finally:
            print(screen.seen)
            asyncio.get_running_loop().remove_reader(controlling)
            os.close(controlling)
            os.close(terminal)
    saved = json.loads((tmp_path / "d.json").read_text())["messages"]
    assert [one["content"] for one in saved] == ["well?", "word ", "and now?", "yes"]
    assert (state / "chat-history").read_text().splitlines()[:2] == ["well?", "and now?"]
    assert (state / "chat-history").stat().st_mode & 0o777 == 0o600


def _take_terminal(terminal: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
