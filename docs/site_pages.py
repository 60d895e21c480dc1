"""What the documentation site is made of: files of the repository, each at its own place.

A link from ``README.md`` to ``docs/design.md`` is thus the same on the site as in the repository. A link to a source
file leads to a page that shows it, which is made here. Loaded by mkdocs (see mkdocs.yml).
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/*.md",
    "examples/README.md",
    "firmware_configs/README.md",
)
ASSETS = ("docs/*.svg", "docs/*.png", "docs/plots/*.svg", "docs/*.css")
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
"""A link to a file, not to elsewhere or within the page."""
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml", ".service": "ini", ".sh": "bash", "": "yaml"}
ROLE = re.compile(r":(?:class|func|meth|mod):(?=<code>|<span)")
"""Of a cross-reference in a docstring, whose name is left to be read."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of the repository that the site consists of, and pages for the sources that they link to."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    chosen = [path.relative_to(ROOT).as_posix() for pattern in (*PAGES, *ASSETS) for path in sorted(ROOT.glob(pattern))]
    kept = [File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in chosen]
    pages = [page for page in chosen if page.endswith(".md")]
    for source in sorted({source for page in pages for source in _linked_sources(page)} - set(chosen)):
        kept.append(File.generated(config, f"{source}.md", content=_source_page(source)))
    return Files([*theme, *kept])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to sources lead to their pages."""

    def link(found: re.Match[str]) -> str:
        target = _target(page.file.src_uri, found[1])
        is_source = not target.endswith(".md") and files.get_file_from_path(f"{target}.md") is not None
        return f"]({found[1]}.md{found[2] or ''})" if is_source else found[0]

    return LINK.sub(link, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Docstrings say ``:meth:`` and the like, which means nothing to Markdown."""
    return ROLE.sub("", html)


def _linked_sources(page: str) -> set[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = {_target(page, found[1]) for found in LINK.finditer(text)}
    return {target for target in targets if not target.endswith(".md") and (ROOT / target).is_file()}


def _target(page: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _source_page(source: str) -> str:
    path = ROOT / source
    text = path.read_text(encoding="utf-8")
    fence = "~" * 6
    return f"# {path.name}\n\n`{source}`\n\n{fence}{LANGUAGES.get(path.suffix, 'text')}\n{text}{fence}\n"
