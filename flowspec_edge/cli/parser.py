"""Arguments that are nearly right are answered with the right ones."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

KNOWN_ELSEWHERE = {
    **dict.fromkeys(("--max-tokens", "--max-completion-tokens", "--n-predict", "--num-predict"), "--max-new-tokens"),
    **dict.fromkeys(("--max-length", "--length", "--num-tokens"), "--max-new-tokens"),
    **dict.fromkeys(("--model", "--model-path", "--checkpoint"), "--bundle"),
    **dict.fromkeys(("--system-prompt", "--instruction"), "--system"),
    **dict.fromkeys(("--base-url", "--server", "--endpoint"), "--url"),
    **dict.fromkeys(("--key", "--token", "--apikey"), "--api-key"),
    **dict.fromkeys(("--ctx-size", "--max-model-len", "--n-ctx"), "--context"),
    **dict.fromkeys(("--allowed-origins", "--origins", "--allow-origin"), "--cors-origin"),
    **dict.fromkeys(("--max-num-seqs", "--parallel", "--num-parallel"), "--max-sessions"),
    **dict.fromkeys(("--bind", "--listen", "--address"), "--host"),
}
"""What other programs call an option of ours."""
LIKENESS = 0.6


class Parser(argparse.ArgumentParser):
    """As argparse has it, with a better last line."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = super().parse_known_args(args, namespace)
        options = [text.partition("=")[0] for text in unknown if text.startswith("--") and text != "--"]
        hints = [f"{option}: {hint}" for option in options if (hint := self._hint(option))]
        if hints:
            self.error(f"unrecognized arguments: {' '.join(unknown)}\n{self.prog}: {'; '.join(hints)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if found is not None:
            close = nearest(found[1], re.findall(r"[\w-]+", found[2]))
            message += f"; did you mean {close}?" if close else ""
        super().error(message)

    def _hint(self, option: str) -> str:
        """What to write for an option that this command does not have; empty where nothing is near."""
        if option in self._option_string_actions:
            return f"it stands before the command: {self.prog} {option} ..."
        close = nearest(option, self._option_string_actions)
        return f"did you mean {close}?" if close else ""


def nearest(text: str, known: Iterable[str]) -> str | None:
    """The known word that a text most likely stands for."""
    words: Sequence[str] = list(known)
    if KNOWN_ELSEWHERE.get(text) in words:
        return KNOWN_ELSEWHERE[text]
    return next(iter(difflib.get_close_matches(text, words, 1, LIKENESS)), None)
