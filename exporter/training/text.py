"""Gathers the training text: Python sources and manuals on this machine, cleaned, without copies and without held-out
text.

Held out are the files of ``exporter/demo_model/val_files.json`` and the benchmark's prompts. Neither they nor copies of
their parts (any run of ``NGRAM`` words) are trained on, with one exception: the running Python's own library is taken
as it is, without the held-out files, though it repeats parts of them (``held_out_repeats``). The projects that the
prompts come from are left out altogether, and so is every project without a permissive licence.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from exporter.training.kept_files import write_array
from flowspec_edge.errors import TrainingError

PACKAGE = Path(__file__).parents[2]
DEMO_MODEL = PACKAGE / "exporter/demo_model"
VAL_FILES = DEMO_MODEL / "val_files.json"
PROMPTS = PACKAGE / "flowspec_edge/bench/prompts.json"
END_OF_TEXT = 0

# Where the benchmark's prompts come from (flowspec_edge/bench/PROMPTS.md), and ourselves.
LEFT_OUT_PROJECTS = frozenset({"aiohttp", "jinja2", "networkx", "sympy", "numpy", "flowspec-edge", "flowspec_edge"})
PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|0BSD|Zlib|CC0)\b", re.IGNORECASE)
RESTRICTED = re.compile(r"\b(L?GPL|AGPL|MPL|Mozilla|Proprietary)", re.IGNORECASE)
FOREIGN = re.compile(r"^\.\.|(^|/)_?(vendor|vendored|extern|third_party)/")  # copies of other projects
WORD = re.compile(r"\w+|[^\w\s]")
RST_ROLE = re.compile(r":[\w:+-]+:`[~!]?([^`<]+?)(?:\s*<[^`]*>)?`")
RST_LITERAL = re.compile(r"``([^`\n]+)``")
OWN_LIBRARY = "stdlib"  # of the Python that runs the trainer
NGRAM = 13  # words that two texts must share in a row to count as copies, as in the GPT-3 paper's appendix C
PLACE_FACTORS = np.uint64(0x9E3779B97F4A7C15) ** np.arange(1, NGRAM + 1, dtype=np.uint64)  # odd: no word is lost
MAX_FILE_BYTES = 200_000  # larger sources are mostly generated
MIN_FILE_BYTES = 200
TOPIC_COPIES = 3  # how often pydoc's topics are repeated: they are a small part, and would be forgotten
MIN_BLOCK_CHARS = 60  # shorter paragraphs repeat by chance
MAX_LINE_CHARS = 400  # a longer line is data, not source
MAX_COPIED = 0.8  # of a file's characters; beyond it the file is a copy of something already taken
MAX_HELD_OUT = 0.2  # of a file's word runs; beyond it the file is another version of a held-out one


@dataclass(frozen=True)
class TakenFile:
    source: str
    path: str
    sha256: str
    num_tokens: int


@dataclass(frozen=True)
class Candidate:
    source: str
    path: str
    text: str
    is_project: bool = False  # an installed project, of which a limited share is taken

    @property
    def num_copies(self) -> int:
        return TOPIC_COPIES if self.path.startswith("topics/") else 1

    @property
    def is_test(self) -> bool:
        return bool(re.search(r"(^|/)(tests?|idlelib/idle_test)/", self.path))


@dataclass(frozen=True)
class Limits:
    """How many tokens are taken at most, so that no project and no kind of file dominates."""

    per_project: int = 80_000
    tests: int = 800_000

    def of(self, candidate: Candidate) -> tuple[str, int]:
        """What ``candidate`` counts as, and how many tokens of that are taken."""
        if candidate.is_test:
            return "tests", self.tests
        return candidate.source, self.per_project if candidate.is_project else sys.maxsize


def held_out_texts() -> dict[str, str]:
    """The held-out files and topics by name, from the standard library of the running Python.

    Raises:
        TrainingError: this Python lacks one of them, so that a loss on the rest could not be compared.
    """
    texts = {}
    stdlib = Path(sysconfig.get_path("stdlib"))
    topics = {topic.path: topic.text for topic in pydoc_topics(OWN_LIBRARY, stdlib)}
    for name in json.loads(VAL_FILES.read_text()):
        path = stdlib / name
        text = path.read_text(encoding="utf-8") if path.is_file() else topics.get(name)
        if text is None:
            raise TrainingError(
                f"{VAL_FILES}: Python {sys.version.split()[0]} has no {name}, which is held out; "
                "train and evaluate with Python 3.11"
            )
        texts[name] = text
    return texts


def prompt_texts() -> list[str]:
    return [prompt["text"] for prompts in json.loads(PROMPTS.read_text()).values() for prompt in prompts]


def ngrams(text: str) -> list[int]:
    """A hash per run of ``NGRAM`` words."""
    words = np.array([hash(word) for word in WORD.findall(text)], np.int64).view(np.uint64)
    if len(words) < NGRAM:
        return []
    runs = np.lib.stride_tricks.sliding_window_view(words, NGRAM)
    found: list[int] = (runs * PLACE_FACTORS).sum(axis=1, dtype=np.uint64).tolist()  # modulo 2**64
    return found


class Cleaner:
    """Takes texts one by one and returns what of each is new and not held out. Cleaners may share ``seen``."""

    def __init__(self, held_out: Iterable[str], seen: set[bytes] | None = None) -> None:
        self._held_out = {ngram for text in held_out for ngram in ngrams(text)}
        self.seen = set() if seen is None else seen

    def clean(self, text: str) -> str | None:
        """``text`` without copied paragraphs; ``None`` where it is data, a copy, or has copies of held-out text."""
        text = text.replace("\r\n", "\n").replace("\t", "    ").strip("\n") + "\n"
        if max(map(len, text.split("\n"))) > MAX_LINE_CHARS or not is_prose_or_code(text):
            return None
        runs = ngrams(text)
        if sum(run in self._held_out for run in runs) > MAX_HELD_OUT * len(runs):
            return None
        kept, copied, tail = [], 0, ""
        for block in re.split(r"\n{2,}", text):
            digest = hashlib.blake2b(" ".join(block.split()).encode(), digest_size=12).digest()
            is_long = len(block) >= MIN_BLOCK_CHARS
            if (is_long and digest in self.seen) or self.overlaps(tail + " " + block):
                copied += len(block)
                continue
            if is_long:
                self.seen.add(digest)
            kept.append(block)
            tail = " ".join(WORD.findall(tail + " " + block)[1 - NGRAM :])
        return None if copied > MAX_COPIED * len(text) else "\n\n".join(kept)

    def overlaps(self, text: str) -> bool:
        """Whether ``text`` shares a run of ``NGRAM`` words with held-out text."""
        return any(ngram in self._held_out for ngram in ngrams(text))


def is_prose_or_code(text: str) -> bool:
    """Whether ``text`` is mostly ASCII letters and white space, not a table of numbers nor text in another script."""
    letters = sum(c.isascii() and (c.isalpha() or c.isspace()) for c in text)
    return letters > 0.6 * len(text)


def candidates(extra: Iterable[Path]) -> Iterator[Candidate]:
    """Every text that could be trained on: standard library, pydoc topics, directories in ``extra``, installed
    projects.
    """
    yield from library_texts(OWN_LIBRARY, Path(sysconfig.get_path("stdlib")))
    for directory in extra:
        if not directory.is_dir():
            raise TrainingError(f"--text {directory}: no such directory")
        source = f"{directory.parent.name}/{directory.name}"
        yield from library_texts(source, directory)
        yield from manual_pages(source, directory)
    for project, root, files in installed_projects():
        for file in files:
            text = read_source(root / file)
            if text is not None:
                yield Candidate(project, file, text, is_project=True)


def library_texts(source: str, root: Path) -> Iterator[Candidate]:
    """Python files and pydoc topics of a standard library or of any other directory, without those that
    are held out.
    """
    held_out = set(json.loads(VAL_FILES.read_text()))
    yield from (c for c in python_files(source, root) if c.path not in held_out)
    yield from (c for c in pydoc_topics(source, root) if c.path not in held_out)


def python_files(source: str, root: Path) -> Iterator[Candidate]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        if not re.search(r"(^|/)(site-packages|dist-packages|lib2to3/tests/data|pydoc_data|bad[^/]*)/", relative):
            text = read_source(path)
            if text is not None:
                yield Candidate(source, relative, text)


def pydoc_topics(source: str, stdlib: Path) -> Iterator[Candidate]:
    """The pydoc topics of ``stdlib``; none where it is no standard library."""
    path = stdlib / "pydoc_data/topics.py"
    if path.is_file():
        _, _, literal = path.read_text(encoding="utf-8").partition("topics = ")
        for name, text in sorted(ast.literal_eval(literal).items()):
            yield Candidate(source, f"topics/{name}", text)


def manual_pages(source: str, root: Path) -> Iterator[Candidate]:
    """The reStructuredText files under ``root``, with roles and literals in double quotes, as pydoc's topics print
    them.
    """
    for path in sorted([*root.rglob("*.rst"), *root.rglob("*.rst.txt")]):
        text = read_source(path)
        if text is not None:
            plain = RST_LITERAL.sub(r'"\1"', RST_ROLE.sub(r'"\1"', text))
            yield Candidate(source, path.relative_to(root).as_posix(), plain)


def installed_projects() -> Iterator[tuple[str, Path, list[str]]]:
    """Name, root and Python files of each installed project with a permissive licence, by name."""
    by_name = {d.metadata["Name"].lower(): d for d in metadata.distributions() if d.metadata["Name"]}
    for name in sorted(by_name):
        distribution = by_name[name]
        if name not in LEFT_OUT_PROJECTS and is_permissive(distribution.metadata):
            files = sorted(
                str(f) for f in distribution.files or () if str(f).endswith(".py") and not FOREIGN.search(str(f))
            )
            yield name, Path(str(distribution.locate_file(""))), files


def is_permissive(fields: metadata.PackageMetadata) -> bool:
    """Whether the licence expression, the classifiers and the first line of the licence field say so."""
    expression, licence = ((fields.get_all(name) or [""])[0] for name in ("License-Expression", "License"))
    stated = [expression, licence.split("\n")[0]]
    stated += [c for c in fields.get_all("Classifier") or () if c.startswith("License ::")]
    text = " ".join(stated)
    return bool(PERMISSIVE.search(text)) and not RESTRICTED.search(text)


def read_source(path: Path) -> str | None:
    try:
        if not MIN_FILE_BYTES <= path.stat().st_size <= MAX_FILE_BYTES:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def gather(
    directory: Path, tokenizer: Tokenizer, found: list[Candidate], limits: Limits, report: Callable[[str], None]
) -> None:
    """Write ``files.json`` and ``tokens.npy`` (uint16, one stream, with a mark before each text) into ``directory``.

    Raises:
        TrainingError: no text in ``found`` is fit to train on.
    """
    strict = Cleaner([*held_out_texts().values(), *prompt_texts()])
    lenient = Cleaner(prompt_texts(), strict.seen)
    room: dict[str, int] = {}
    streams: list[list[int]] = []
    taken: list[TakenFile] = []
    rng = np.random.default_rng(0)
    report(f"text: {len(found)} files found; cleaning")
    for number in rng.permutation(len(found)):  # the limits then take a fair part of each project
        candidate = found[int(number)]
        kind, most = limits.of(candidate)
        if room.setdefault(kind, most) <= 0:
            continue
        cleaned = (lenient if candidate.source == OWN_LIBRARY else strict).clean(candidate.text)
        if cleaned is None:
            continue
        ids = tokenizer.encode(cleaned).ids
        room[kind] -= len(ids)
        streams.extend([[END_OF_TEXT, *ids]] * candidate.num_copies)
        digest = hashlib.sha256(candidate.text.encode()).hexdigest()
        taken.append(TakenFile(candidate.source, candidate.path, digest, len(ids)))
        if len(taken) % 1000 == 0:
            report(f"text: {len(taken)} files, {sum(map(len, streams)) / 1e6:.1f} M tokens")
    if not streams:
        raise TrainingError(f"{directory}: no text found to train on; name directories of Python sources with --text")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "files.json").write_text(json.dumps([asdict(file) for file in taken], indent=0))
    shuffled = [np.array(streams[i], np.uint16) for i in rng.permutation(len(streams))]
    write_array(directory / "tokens.npy", np.concatenate(shuffled))
    report(f"text: {len(taken)} files, {sum(map(len, streams)) / 1e6:.2f} M tokens")


def held_out_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """The held-out texts as one stream, an end-of-text token before each."""
    ids = [i for text in held_out_texts().values() for i in (END_OF_TEXT, *tokenizer.encode(text).ids)]
    return np.array(ids, np.int64)


def held_out_repeats(tokenizer: Tokenizer) -> np.ndarray:
    """Which of ``held_out_tokens`` are in a run of ``NGRAM`` words that the running Python's library
    has elsewhere too.
    """
    library = library_texts(OWN_LIBRARY, Path(sysconfig.get_path("stdlib")))
    held_out = {ngram for text in held_out_texts().values() for ngram in ngrams(text)}
    known = {ngram for candidate in library for ngram in held_out.intersection(ngrams(candidate.text))}
    repeats: list[bool] = []
    for text in held_out_texts().values():
        spans = [match.span() for match in WORD.finditer(text)]
        is_known = np.zeros(len(text), bool)
        for i, ngram in enumerate(ngrams(text)):
            if ngram in known:
                is_known[spans[i][0] : spans[i + NGRAM - 1][1]] = True
        repeats += [False, *(bool(is_known[start:end].any()) for start, end in tokenizer.encode(text).offsets)]
    return np.array(repeats)
