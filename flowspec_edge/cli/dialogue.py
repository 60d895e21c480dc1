"""A dialogue as it grows, and the commands within it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flowspec_edge.cli.parser import nearest
from flowspec_edge.errors import RequestError, plain_text, system_words

Message = dict[str, str]

COMMANDS = {
    "/system": ("/system TEXT", "tell the model something before the first message; without TEXT, show it"),
    "/clear": ("/clear", "begin anew, with the same system text"),
    "/undo": ("/undo", "take back the last message and its reply"),
    "/save": ("/save FILE", "write the dialogue to a file, JSON or, with .md, text"),
    "/load": ("/load FILE", "go on with a dialogue that was saved as JSON"),
    "/help": ("/help", "these commands"),
    "/quit": ("/quit", "end, as Ctrl-D does"),
}


@dataclass(slots=True)
class Dialogue:
    system: str | None = None
    model: str = ""
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """As OpenAI's API has them."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def add(self, message: str, reply: str) -> None:
        self.turns += [{"role": "user", "content": message}, {"role": "assistant", "content": reply}]

    def save(self, path: Path) -> None:
        """Raises RequestError where the file cannot be written."""
        if path.suffix == ".md":
            text = "\n\n".join(f"**{message['role']}**\n\n{message['content']}" for message in self.messages)
        else:
            text = json.dumps({"model": self.model, "messages": self.messages}, indent=1, ensure_ascii=False)
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as cause:
            raise RequestError(f"{path} cannot be written ({system_words(cause)})") from cause

    def load(self, path: Path) -> None:
        """Raises RequestError where the file holds no dialogue."""
        try:
            messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
            messages = [{"role": str(one["role"]), "content": str(one["content"])} for one in messages]
        except OSError as cause:
            raise RequestError(f"{path} cannot be read ({system_words(cause)})") from cause
        except (ValueError, LookupError, TypeError) as cause:
            raise RequestError(f"{path} holds no dialogue that /save wrote") from cause
        self.system = next((one["content"] for one in messages if one["role"] == "system"), None)
        self.turns = [one for one in messages if one["role"] != "system"]


def perform(dialogue: Dialogue, line: str, tell: Callable[[str], None]) -> bool:
    """Perform a command. Returns True where it ends the dialogue."""
    name, _, argument = line.strip().partition(" ")
    argument = argument.strip()
    try:
        match name:
            case "/quit" | "/exit" | "/bye":
                return True
            case "/help":
                tell("\n".join(f"{usage:14} {what}" for usage, what in COMMANDS.values()))
            case "/system":
                dialogue.system = argument or dialogue.system
                tell(f"system: {plain_text(dialogue.system)}" if dialogue.system else "there is no system text")
            case "/clear":
                dialogue.turns.clear()
                tell("the dialogue begins anew")
            case "/undo":
                del dialogue.turns[-2:]
                tell(f"{len(dialogue.turns) // 2} messages are left")
            case "/save" | "/load" if not argument:
                tell(f"{name} needs a file: {COMMANDS[name][0]}")
            case "/save":
                dialogue.save(Path(argument).expanduser())
                tell(f"saved in {argument}")
            case "/load":
                dialogue.load(Path(argument).expanduser())
                tell(f"{len(dialogue.turns) // 2} messages from {argument}")
            case _:
                close = nearest(name, COMMANDS)
                tell(f"{plain_text(name)} is no command; " + (f"did you mean {close}?" if close else "see /help"))
    except RequestError as error:
        tell(plain_text(str(error)))
    return False
