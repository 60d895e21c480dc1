"""The documents that people read, and what stands in them: links, headings, snippets."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from docs.house import ROOT

FENCE = re.compile(r"^( *)```(\S*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]*)\)")
LISTED = re.compile(r"^  - [^:]+: (\S+\.md)$", re.MULTILINE)
AUTOLINK = re.compile(r"<(https?:[^>\s]*)>")


class Snippet(NamedTuple):
    """A block of code, and the heading below which it stands."""

    language: str
    code: str
    heading: str


class Document(NamedTuple):
    """One of them, by its path from the root."""

    name: str

    @property
    def path(self) -> Path:
        return ROOT / self.name

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def prose(self) -> str:
        """What is no block of code."""
        return FENCE.sub("", self.text)

    @property
    def snippets(self) -> Iterator[Snippet]:
        text = self.text
        for found in FENCE.finditer(text):
            above = HEADING.findall(FENCE.sub("", text[: found.start()]))
            yield Snippet(found[2], found[3], above[-1] if above else "")

    @property
    def commands(self) -> Iterator[str]:
        """What stands in a line as code."""
        return (" ".join(code.split()) for code in INLINE.findall(self.prose))

    @property
    def links(self) -> list[str]:
        prose = INLINE.sub("", self.prose)
        return LINK.findall(self.prose) + AUTOLINK.findall(prose)

    @property
    def anchors(self) -> set[str]:
        """Of its headings, as both the site and GitHub make them."""
        headings = [plain(heading) for heading in HEADING.findall(self.prose)]
        return {of_site(heading) for heading in headings} & {of_github(heading) for heading in headings}


def plain(heading: str) -> str:
    """A heading without its marks."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "").replace("\\", "")


def of_site(heading: str) -> str:
    """As Python-Markdown's table of contents has it."""
    letters = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", letters).strip().lower())


def of_github(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


DOCUMENTS = [Document(name) for name in LISTED.findall((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))]
"""The pages of the site."""


def python_snippet(name: str, heading: str) -> str:
    """The one Python snippet below that heading."""
    (code,) = (
        snippet.code
        for snippet in Document(name).snippets
        if snippet.language == "python" and snippet.heading == heading
    )
    return code
