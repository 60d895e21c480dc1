"""Bundles made from the demo model that compute the same but consist of other files, which no node has."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flowspec_edge.bundle import Bundle
from flowspec_edge.manifest import describe_file, load_manifest

MadeOnce = Callable[[str, Callable[[Path], None]], Path]
"""See the fixture ``made_once``."""
UNKNOWN_FIELD = b"\xc0\x3e\x01"
"""Field 1000 of a protobuf message, which readers skip: another file, the same graph."""


def other_bundle(bundle: Bundle, directory: Path, num_changed: int = 8) -> Bundle:
    """A bundle that computes the same, ``num_changed`` of whose blocks are other files."""
    shutil.copytree(bundle.directory, directory)
    blocks = list(bundle.manifest.blocks)
    for index in range(num_changed):
        _extend(directory / blocks[index].file)
        blocks[index] = dataclasses.replace(blocks[index], **describe_file(directory, blocks[index].file))
    dataclasses.replace(load_manifest(bundle.directory), blocks=blocks).write(directory)
    return Bundle.load(directory)


def unknown_bundle(bundle: Bundle, directory: Path) -> Bundle:
    """A bundle that computes the same, in which every file that a stage needs is another one."""
    manifest = other_bundle(bundle, directory).manifest
    _extend(directory / manifest.final_norm.file)
    embedding = np.load(directory / manifest.embedding.file)
    embedding[-1, -1] += np.finfo(embedding.dtype).resolution  # of the vocabulary's last token
    np.save(directory / manifest.embedding.file, embedding)
    final_norm, embedding_entry = (
        dataclasses.replace(entry, **describe_file(directory, entry.file))
        for entry in (manifest.final_norm, manifest.embedding)
    )
    dataclasses.replace(manifest, final_norm=final_norm, embedding=embedding_entry).write(directory)
    return Bundle.load(directory)


def _extend(path: Path) -> None:
    with path.open("ab") as file:
        file.write(UNKNOWN_FIELD)
