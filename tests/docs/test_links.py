"""Every link of the documents leads somewhere: to a file that is there, and to a heading that it has."""

import posixpath
import re
from urllib.parse import urlsplit

import pytest

from docs.house import ROOT
from tests.docs.documents import DOCUMENTS, Document, of_github, of_site, plain


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document: Document) -> None:
    for link in document.links:
        if "://" in link:
            assert_address(link, document)
            continue
        path, _, anchor = link.partition("#")
        assert not path.startswith("/"), f"{document.name}: {link} is the place of one machine"
        target = posixpath.normpath(posixpath.join(posixpath.dirname(document.name), path)) if path else document.name
        assert (ROOT / target).exists(), f"{document.name}: {link} leads to nothing"
        if anchor:
            assert anchor in Document(target).anchors, f"{document.name}: {target} has no heading #{anchor}"


def assert_address(link: str, document: Document) -> None:
    """There is no network in tests, so only its form is looked at."""
    parts = urlsplit(link)
    is_local = parts.hostname == "127.0.0.1"
    assert parts.scheme == ("http" if is_local else "https"), f"{document.name}: {link}"
    assert is_local or re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", parts.hostname or ""), f"{document.name}: {link}"


def test_the_readme_is_a_page() -> None:
    assert len(Document("README.md").text.splitlines()) <= 150


def test_the_site_has_every_document() -> None:
    there = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("examples/*.md"),
        *ROOT.glob("firmware_configs/*.md"),
    ]
    assert {document.path for document in DOCUMENTS} == set(there)


@pytest.mark.parametrize(
    ("heading", "site", "github"),
    [
        ("The same bits in every tree", "the-same-bits-in-every-tree", "the-same-bits-in-every-tree"),
        ("`int4`, and [others](x.md)", "int4-and-others", "int4-and-others"),
        ("A - B", "a-b", "a---b"),
    ],
)
def test_anchors_are_made_as_by_who_shows_them(heading: str, site: str, github: str) -> None:
    assert (of_site(plain(heading)), of_github(plain(heading))) == (site, github)
