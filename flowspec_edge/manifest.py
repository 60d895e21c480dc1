"""The bundle, which the exporter writes and every device reads.

A bundle is a directory::

    manifest.json       this module
    manifest.sha256     the manifest's own sum, as sha256sum writes it; bundles made by hand may do without
    tokenizer.json      Hugging Face tokenizers format
    embedding.npy       [vocab_size, hidden_size] float16 or float32, read row by row
    blocks/*.onnx       consecutive layer blocks, one file each
    final_norm.onnx     hidden -> normed, run by the last stage
    head.onnx           normed -> logits and the k likeliest tokens with their log-probabilities
    drafter.onnx        optional: the draft head; of EAGLE-3 also fuse.onnx (tapped rows -> feature)
    draft_top.onnx      optional: feature -> tokens, where the head drafts a part of the vocabulary

Graph inputs and outputs are named by the constants below, so that exporter and engine agree by import.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from flowspec_edge.errors import BundleError, is_plain, plain_text

FORMAT = "flowspec-bundle"
FORMAT_VERSION = 4
MANIFEST_NAME = "manifest.json"
SEAL_NAME = "manifest.sha256"
MAX_NAME = 200
"""The most characters of a file's name in a bundle, directories included."""
MAX_MANIFEST_BYTES = 2**20
"""A model of 128 layers in five precisions has a manifest of some 200 KB."""
MAX_FILES = 8192
"""Files of one bundle: 1024 layers in eight precisions."""
MAX_FILE_BYTES = 2**40
MAX_SIZES = {
    "num_layers": 1024,
    "hidden_size": 2**16,
    "intermediate_size": 2**20,
    "num_heads": 1024,
    "num_kv_heads": 1024,
    "head_dim": 4096,
    "vocab_size": 2**22,
    "max_context": 2**24,
}
"""The largest geometry that is read, by field: several times what any published model has, so that a manifest from
elsewhere cannot ask for more memory than there is.
"""
_SHA256 = re.compile(r"[0-9a-f]{64}")

# Inputs and outputs of a layer block and of the drafter.
HIDDEN = "hidden"  # float32 [1, rows, hidden_size]
HIDDEN_OUT = "hidden_out"  # float32 [1, rows, hidden_size]
# Attention may get rows of zeros behind those of the chunk. Together they are called attention_rows here.
ATTENTION_PADDING = "attention_padding"  # int64 [2] = 0, attention_rows - rows
# Cosines and sines by position, float32 [positions, head_dim / 2]. The drafter needs a row for each cache slot in use.
ROTARY_COS, ROTARY_SIN = "rotary_cos", "rotary_sin"
# The cache of layer i: past_key.i, past_value.i -> present_key.i, present_value.i, float32, updated in place.
# Layer block: [num_kv_heads, 1, slots, head_dim], values with a 1 behind them: [num_kv_heads, 1, slots, head_dim + 1].
# Drafter: [1, num_kv_heads, capacity, head_dim].
PAST_KEY, PAST_VALUE, PRESENT_KEY, PRESENT_VALUE = "past_key", "past_value", "present_key", "present_value"

# Inputs of a layer block alone. A row attends to its older ancestors, which are in the slots of their positions, and to
# its recent ones, wherever they are; docs/design.md, "The same bits in every tree", tells why. Attention takes its rows
# in groups: attention_rows = groups * group_rows.
POSITION_IDS = "position_ids"  # int64 [1, rows]; of the drafter [1, attention_rows]
CACHE_SLOTS = "cache_slots"  # int64 [num_kv_heads, rows, 3]: key-value head, 0 and slot that a row is written to
# float32 [groups, 1, 1, group_rows, 1, slots]: 0 for a row's older ancestors, a large negative value elsewhere
OLDER_BIAS = "older_bias"
OLDER_MASK = "older_mask"  # the same shape: 1 for a row's older ancestors, 0 elsewhere
RECENT_SLOTS = "recent_slots"  # int64 [groups, group_rows, recent]: slots of the recent ancestors, the row's own last
# float32 [groups, 1, 1, group_rows, 1, recent]: 0, or a large negative value where a row has fewer ancestors
RECENT_BIAS = "recent_bias"


def of_sliding_layers(name: str) -> str:
    """The input that layers with a window have in the place of ROTARY_COS, ROTARY_SIN, OLDER_BIAS, OLDER_MASK or
    RECENT_BIAS. All blocks of a model that has such layers have it.
    """
    return f"sliding_{name}"


# A constant of a layer block, bool []: whether new rows are rounded to float16 before they are written to the cache. It
# is false in the file; a session that is loaded may set it.
ROUNDS_CACHE = "rounds_cache"

# Inputs of the drafter alone.
TOKEN_EMBEDDING = "token_embedding"  # float32 [1, rows, hidden_size]
FEATURE = "feature"  # float32 [1, rows, hidden_size]
# float32 [1, 1, attention_rows, total]: 0 for slots that a row sees, a large negative value elsewhere
ATTENTION_BIAS = "attention_bias"
SEQLENS_K = "seqlens_k"  # int32 [1] = total - 1
TOTAL_LENGTH = "total_sequence_length"  # int32 [] = slots in use after this step

UNPACK_ONCE = ("session.disable_quant_qdq", "1")
"""The setting with which ONNX Runtime unpacks 8-bit weights when it loads them, instead of at every run."""
EXACT_SUMS = ("session.x64quantprecision", "1")
"""The setting with which ONNX Runtime multiplies 8-bit weights exactly on x86 processors with AVX2 but without VNNI.

There the product of signed bytes cuts sums off at 16 bits; with this setting weights are multiplied as unsigned bytes,
and int32 sums are the same as on every other processor. Elsewhere it changes nothing.
"""
WEIGHTS_AS_STORED = ("mlas.disable_kleidiai", "1")
"""The setting with which ONNX Runtime multiplies 4-bit blocks on Arm as it does elsewhere.

Arm's KleidiAI would round their scales to bfloat16, and activations to 8 bits per row instead of per block. On
processors without it, the setting changes nothing.
"""
SESSION_SETTINGS = (UNPACK_ONCE, EXACT_SUMS, WEIGHTS_AS_STORED)

# Inputs and outputs of the head; the final norm maps HIDDEN [1, rows, hidden_size] to HIDDEN_OUT of the same shape.
TOP_K = "k"  # int64 [1]
LOGITS = "logits"  # float32 [rows, vocab_size], from HIDDEN [rows, hidden_size]
TOP_LOG_PROBS = "top_log_probs"  # float32 [rows, k], descending
TOP_TOKENS = "top_tokens"  # int64 [rows, k]


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of the bundle: path relative to the bundle, size in bytes, sha256 in hex."""

    file: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class BlockEntry(FileEntry):
    """The layers ``[start, stop)`` in one ONNX file.

    Once they are loaded, their matrices take ``memory_bytes``, with what the operators of their products take beyond
    those of plain ones.
    """

    start: int
    stop: int
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class OriginEntry(FileEntry):
    """What the origin loads. All its files take ``memory_bytes`` then; bundles that were made earlier say 0."""

    memory_bytes: int = 0

    def files(self) -> list[FileEntry]:
        return [self]


@dataclass(frozen=True, kw_only=True)
class DrafterEntry(OriginEntry):
    """The draft head.

    ``eagle1`` is fc(concat(embedding, feature)), one decoder layer, and the target's head, or the rows of it for the
    tokens that are drafted (``top``), which returns the target's token ids. ``eagle3`` is one decoder layer over
    embedding and feature, and a ``top`` of its own. Its features of verified rows are fused (``fuse``) from the hidden
    rows that enter the layers ``taps``.
    """

    kind: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_frequencies: list[float]
    taps: list[int] = dataclasses.field(default_factory=list)
    fuse: FileEntry | None = None
    top: FileEntry | None = None

    def files(self) -> list[FileEntry]:
        return [self, *(entry for entry in (self.fuse, self.top) if entry is not None)]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The shapes of the target model. ``max_context`` counts the tokens of prompt and output together.

    ``rope_frequencies`` are radians per position of each pair of a head's values, [head_dim / 2], scaling included.
    Where some layers attend to no more than the last ``window`` rows, their own included, ``sliding_rope_frequencies``
    are those of these layers, or empty where they are the same.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    rms_norm_eps: float
    rope_frequencies: list[float]
    window: int | None = None
    sliding_rope_frequencies: list[float] = dataclasses.field(default_factory=list)

    @property
    def ropes(self) -> list[list[float]]:
        """The frequencies of layers that see all rows, and of those with a window where there are any."""
        if self.window is None:
            return [self.rope_frequencies]
        return [self.rope_frequencies, self.sliding_rope_frequencies or self.rope_frequencies]


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far the exported graphs were from what they must compute: the largest absolute difference of rows, relative
    to their RMS.

    ``reference`` says what that was: float32 with the weights that the graphs stand for, or the same arithmetic.
    """

    tolerance: float
    chain_error: float
    block_errors: list[float]
    head_error: float
    drafter_error: float | None
    reference: str
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How a precision compares, on ``text``, with float32 and the model's own weights.

    ``max_error`` is the largest difference of the rows after the last layer, relative to their RMS.
    ``greedy_agreement`` is the share of positions at which the likeliest next token is the same. A perplexity is
    exp(mean -log p) over the text.
    """

    precision: str
    text: str
    num_tokens: int
    max_error: float
    greedy_agreement: float
    perplexity: float
    reference_perplexity: float

    @property
    def loss(self) -> float:
        """What rounding adds to the perplexity, as a share of it."""
        return self.perplexity / self.reference_perplexity - 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of ``manifest.json``.

    ``blocks``, head and drafter have the bundle's own ``precision``. ``alternatives`` has the blocks of further ones.
    """

    name: str
    architecture: str
    precision: str
    geometry: Geometry
    bos_token_id: int | None
    eos_token_ids: list[int]
    chat_template: str | None
    tokenizer: FileEntry
    embedding: FileEntry
    blocks: list[BlockEntry]
    final_norm: FileEntry
    head: OriginEntry
    drafter: DrafterEntry | None
    parity: Parity
    made_with: dict[str, str]
    alternatives: dict[str, list[BlockEntry]] = dataclasses.field(default_factory=dict)
    quality: list[Quality] = dataclasses.field(default_factory=list)
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def files(self) -> list[FileEntry]:
        """Every file of the bundle but the manifest itself."""
        parts: list[FileEntry] = [self.tokenizer, self.embedding, *self.blocks, self.final_norm, self.head]
        parts += [block for blocks in self.alternatives.values() for block in blocks]
        return [*parts, *self.drafter.files()] if self.drafter else parts

    @property
    def origin_entries(self) -> list[OriginEntry]:
        """The head, and the draft head where there is one."""
        return [self.head] if self.drafter is None else [self.head, self.drafter]

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions in which a stage may run, the bundle's own first."""
        return (self.precision, *self.alternatives)

    def blocks_of(self, start: int, stop: int, precision: str | None = None) -> list[BlockEntry]:
        """The blocks within layers ``[start, stop)``, in ``precision`` or in the bundle's own.

        Raises:
            BundleError: the bundle does not have that precision.
        """
        if precision not in (None, *self.precisions):
            raise BundleError(
                f"bundle {self.name} has no precision {precision!r}, only {', '.join(self.precisions)}; choose one of "
                "them, or export it again with --also"
            )
        blocks = self.blocks if precision in (None, self.precision) else self.alternatives[str(precision)]
        return [block for block in blocks if start <= block.start and block.stop <= stop]

    def stage_files(self, start: int, stop: int, precision: str | None = None) -> list[FileEntry]:
        """The files that a device needs for layers ``[start, stop)``.

        The first and the last stage need one more than blocks.
        """
        files: list[FileEntry] = [*self.blocks_of(start, stop, precision)]
        if start == 0:
            files.append(self.embedding)
        if stop == self.geometry.num_layers:
            files.append(self.final_norm)
        return files

    @property
    def drafts(self) -> str:
        """Where drafts come from, as users read it."""
        if self.drafter is None:
            return "repetitions of the text alone (this bundle has no draft head)"
        return f"{self.drafter.kind} head, repetitions of the text"

    def to_json(self) -> str:
        """Without what is said of windows where a model has none, and of memory where it is not known."""
        data = dataclasses.asdict(self)
        for entry in (data["head"], data["drafter"] or {}):
            if not entry.get("memory_bytes"):
                entry.pop("memory_bytes", None)
        if self.geometry.window is None:
            del data["geometry"]["window"], data["geometry"]["sliding_rope_frequencies"]
        return json.dumps(data, indent=1) + "\n"

    def write(self, directory: Path) -> None:
        """Write the manifest, and beside it its sum."""
        (directory / MANIFEST_NAME).write_text(self.to_json(), encoding="utf-8")
        (directory / SEAL_NAME).write_text(f"{bundle_digest(self)}  {MANIFEST_NAME}\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_file(directory: Path, name: str) -> dict[str, Any]:
    """The fields of a :class:`FileEntry` for a file that exists in ``directory``."""
    path = directory / name
    return {"file": name, "num_bytes": path.stat().st_size, "sha256": sha256_of(path)}


def load_manifest(directory: Path) -> Manifest:
    """Read and check ``manifest.json``: format, version and fields, that the blocks cover every layer, and file sizes.

    Raises:
        BundleError: the bundle is missing, broken, incomplete or newer than this version reads.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise BundleError(
            f"{directory}: no model bundle here ({MANIFEST_NAME} is missing); make one with flowspec-export"
        )
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes, which no manifest is")
        data = path.read_bytes()
        text = data.decode()
    except (OSError, ValueError) as cause:
        raise BundleError(f"{path}: not readable as JSON ({cause}); export the bundle again") from cause
    manifest = parse_manifest(text, path)
    _check_seal(directory, data)
    for entry in manifest.files():
        _check_size(directory, entry)
    return manifest


def _check_seal(directory: Path, data: bytes) -> None:
    """Compare the manifest's bytes with the sum beside it, where there is one."""
    seal = directory / SEAL_NAME
    try:
        wanted = seal.read_bytes()[:64].decode("ascii", "replace")
    except FileNotFoundError:
        return
    except OSError as cause:
        raise BundleError(f"{seal}: not readable ({cause.strerror}); copy or export the bundle again") from cause
    found = hashlib.sha256(data).hexdigest()
    if found != wanted:
        raise BundleError(
            f"{directory / MANIFEST_NAME}: sha256 is {found[:12]}, {SEAL_NAME} says {plain_text(wanted[:12])}; the "
            f"manifest is damaged: copy or export the bundle again (who changed it on purpose removes {SEAL_NAME})"
        )


def parse_manifest(text: str, path: Path) -> Manifest:
    """Check the text of a manifest: format, version, fields and their types and sizes, file names, and that the blocks
    cover every layer. Nothing in it can make a reader allocate more than the limits at the head of this module.

    Errors name ``path``. The files themselves need not be there.

    Raises:
        BundleError: the manifest is broken, incomplete, or of a version that this one does not read.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise BundleError(f"{path}: not readable as JSON ({cause}); export the bundle again") from cause
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BundleError(f"{path}: not a {FORMAT} manifest; make one with flowspec-export")
    version = data.get("format_version")
    if isinstance(version, int) and version < FORMAT_VERSION:
        raise BundleError(
            f"{path}: format version {version!r:.40} is older than {FORMAT_VERSION}, the only one this flowspec-edge "
            f"reads; make it anew: flowspec-export CHECKPOINT --out {path.parent} --force"
        )
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{path}: format version {version!r:.40} is newer than {FORMAT_VERSION}, the newest this flowspec-edge "
            "reads; upgrade with pip install --upgrade flowspec-edge"
        )
    manifest = _from_dict(path, data)
    files = manifest.files()
    if len(files) > MAX_FILES:
        raise BundleError(f"{path}: names {len(files)} files, at most {MAX_FILES} are read (MAX_FILES)")
    for entry in files:
        _check_entry(path, entry)
    _check_sizes(path, manifest)
    _check_texts(path, manifest)
    _check_layers(path, manifest)
    return manifest


_verified: dict[Path, tuple[tuple[int, ...], str]] = {}
"""The sums of files that this process has read, with what the system said of each file then (``_state_of``)."""
MAX_VERIFIED = 16384


def verify_digests(directory: Path, entries: Sequence[FileEntry]) -> None:
    """Raise :class:`BundleError` where a file's sha256 is not what the manifest says.

    Reads the files, so it belongs on a thread. A file that this process has read before is not read again unless the
    system says that it has changed since.
    """
    for entry in entries:
        _check_size(directory, entry)
        path = directory / entry.file
        try:
            found = _known_sha256(path)
        except OSError as cause:
            raise BundleError(
                f"{path}: not readable ({cause.strerror or cause}); mend that, or copy the bundle again"
            ) from cause
        if found != entry.sha256:
            raise BundleError(
                f"{path}: sha256 is {found[:12]}, the manifest says {entry.sha256[:12]}; the file is damaged, or was "
                "changed since the bundle was read: copy or export the bundle again, and start anew"
            )


def _known_sha256(path: Path) -> str:
    path = path.resolve()
    before = _state_of(path)
    known = _verified.get(path)
    if known is not None and known[0] == before:
        return known[1]
    found = sha256_of(path)
    if _state_of(path) == before:  # else it was changed while it was read
        if len(_verified) >= MAX_VERIFIED:
            _verified.clear()
        _verified[path] = before, found
    return found


def _state_of(path: Path) -> tuple[int, ...]:
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def bundle_digest(manifest: Manifest) -> str:
    """A name for the exact content of a bundle: sha256 over its manifest, in hex."""
    return hashlib.sha256(manifest.to_json().encode()).hexdigest()


def _from_dict(path: Path, data: dict[str, Any]) -> Manifest:
    try:
        fields = dict(data)
        fields["geometry"] = Geometry(**data["geometry"])
        fields["parity"] = Parity(**data["parity"])
        for name in ("tokenizer", "embedding", "final_norm"):
            fields[name] = FileEntry(**data[name])
        fields["head"] = OriginEntry(**data["head"])
        fields["blocks"] = [BlockEntry(**block) for block in data["blocks"]]
        fields["alternatives"] = {
            precision: [BlockEntry(**block) for block in blocks]
            for precision, blocks in data.get("alternatives", {}).items()
        }
        fields["quality"] = [Quality(**quality) for quality in data.get("quality", [])]
        fields["drafter"] = None if data["drafter"] is None else _drafter_from_dict(data["drafter"])
        return Manifest(**fields)
    except (KeyError, TypeError, AttributeError, ValueError) as cause:
        raise BundleError(
            f"{path}: field missing or unknown ({plain_text(str(cause)):.200}); export the bundle again"
        ) from cause


def _drafter_from_dict(data: dict[str, Any]) -> DrafterEntry:
    parts = {name: FileEntry(**data[name]) for name in ("fuse", "top") if data.get(name) is not None}
    return DrafterEntry(**{**data, **parts})


def _check_sizes(path: Path, manifest: Manifest) -> None:
    """The type of every field, and the range of those that something is made of."""
    try:
        msgspec.convert(dataclasses.asdict(manifest), Manifest)
    except (msgspec.ValidationError, RecursionError) as cause:
        raise BundleError(f"{path}: {plain_text(str(cause)):.200}; export the bundle again") from cause
    geometry = manifest.geometry
    heads = [(geometry.head_dim, frequencies) for frequencies in geometry.ropes]
    numbers = [(name, getattr(geometry, name), limit) for name, limit in MAX_SIZES.items()]
    if manifest.drafter is not None:
        heads.append((manifest.drafter.head_dim, manifest.drafter.rope_frequencies))
        names = ("num_heads", "num_kv_heads", "head_dim")
        numbers += [(f"drafter.{name}", getattr(manifest.drafter, name), MAX_SIZES[name]) for name in names]
    if geometry.window is not None:
        numbers.append(("window", geometry.window, MAX_SIZES["max_context"]))
    blocks = [block for blocks in (manifest.blocks, *manifest.alternatives.values()) for block in blocks]
    taken = [block.memory_bytes for block in blocks]
    taken += [entry.memory_bytes for entry in manifest.origin_entries if entry.memory_bytes]
    numbers += [("memory_bytes", num_bytes, MAX_FILE_BYTES) for num_bytes in taken]
    for name, value, limit in numbers:
        if not 0 < value <= limit:
            raise BundleError(f"{path}: {name} is {value!r:.40}; it must lie between 1 and {limit}")
    for head_dim, frequencies in heads:
        if head_dim % 2 or len(frequencies) != head_dim // 2 or not all(map(math.isfinite, frequencies)):
            raise BundleError(
                f"{path}: {len(frequencies)} rope frequencies for heads of {head_dim} values; half as many, and finite "
                "ones, are needed: export the bundle again"
            )


def _check_texts(path: Path, manifest: Manifest) -> None:
    """What is shown to users or goes into names has no character that a terminal obeys."""
    for text in _shown_texts(manifest):
        if not is_plain(text) or len(text) > MAX_NAME:
            raise BundleError(
                f"{path}: {text!r:.80} is no name: it has control characters or more than {MAX_NAME} characters"
            )


def _shown_texts(manifest: Manifest) -> Iterator[str]:
    yield from (manifest.name, manifest.architecture, *manifest.precisions, *(entry.file for entry in manifest.files()))
    yield from (text for pair in manifest.made_with.items() for text in pair)
    yield from (text for quality in manifest.quality for text in (quality.precision, quality.text))
    if manifest.drafter is not None:
        yield manifest.drafter.kind


def _check_layers(path: Path, manifest: Manifest) -> None:
    for blocks in (manifest.blocks, *manifest.alternatives.values()):
        layer = 0
        for block in blocks:
            if block.start != layer or block.stop <= block.start:
                raise BundleError(
                    f"{path}: block {block.file} covers layers [{block.start}, {block.stop}), expected to start at "
                    f"{layer}"
                )
            layer = block.stop
        if layer != manifest.geometry.num_layers:
            raise BundleError(f"{path}: blocks cover {layer} layers, the model has {manifest.geometry.num_layers}")
        if [block.start for block in blocks] != [block.start for block in manifest.blocks]:
            raise BundleError(f"{path}: the precisions are cut at different layers; export the bundle again")
    for tap in manifest.drafter.taps if manifest.drafter else ():
        if tap not in {block.start for block in manifest.blocks}:
            raise BundleError(f"{path}: the drafter taps layer {tap}, where no block begins; export the bundle again")


def _check_entry(path: Path, entry: FileEntry) -> None:
    """Check what a manifest says of a file.

    It may come from a peer, and file names lead to directories on this machine.
    """
    name = PurePosixPath(entry.file) if isinstance(entry.file, str) else PurePosixPath()
    if (
        not name.parts
        or name.is_absolute()
        or ".." in name.parts
        or len(str(name)) > MAX_NAME
        or not is_plain(str(name))
    ):
        raise BundleError(
            f"{path}: names the file {entry.file!r:.80}, which lies outside the bundle or is no file name"
        )
    if not isinstance(entry.sha256, str) or not _SHA256.fullmatch(entry.sha256):
        raise BundleError(f"{path}: {entry.file} has the sha256 {entry.sha256!r:.80}, expected 64 hex digits")
    if type(entry.num_bytes) is not int or not 1 <= entry.num_bytes <= MAX_FILE_BYTES:
        raise BundleError(
            f"{path}: {entry.file} has {entry.num_bytes!r:.80} bytes, expected 1 to {MAX_FILE_BYTES} (MAX_FILE_BYTES)"
        )


def _check_size(directory: Path, entry: FileEntry) -> None:
    path = (directory / entry.file).resolve()
    if not path.is_relative_to(directory.resolve()):
        raise BundleError(f"{directory}: manifest names {entry.file}, which lies outside the bundle")
    if not path.is_file():
        raise BundleError(f"{path}: missing from the bundle; copy or export the bundle again")
    if path.stat().st_size != entry.num_bytes:
        raise BundleError(
            f"{path}: {path.stat().st_size} bytes, the manifest says {entry.num_bytes}; copy or export the bundle again"
        )
