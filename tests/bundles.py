"""Bundles made of the demo model that compute the same and are other files: what nodes with the package do not have."""

import dataclasses
import shutil

import numpy as np

from flowspec_edge.bundle import Bundle
from flowspec_edge.manifest import describe_file, load_manifest

UNKNOWN_FIELD = b"\xc0\x3e\x01"
"""Field 1000 of a protobuf message, which readers skip: another file, the same graph."""


def other_bundle(bundle, directory, num_changed=8):
    """A bundle that computes the same, of which so many blocks are other files."""
    shutil.copytree(bundle.directory, directory)
    blocks = list(bundle.manifest.blocks)
    for index in range(num_changed):
        _extend(directory / blocks[index].file)
        blocks[index] = dataclasses.replace(blocks[index], **describe_file(directory, blocks[index].file))
    dataclasses.replace(load_manifest(bundle.directory), blocks=blocks).write(directory)
    return Bundle.load(directory)


def unknown_bundle(bundle, directory):
    """One of which every file that a stage needs is another one."""
    manifest = other_bundle(bundle, directory).manifest
    _extend(directory / manifest.final_norm.file)
    embedding = np.load(directory / manifest.embedding.file)
    embedding[-1, -1] += np.finfo(embedding.dtype).resolution  # of the vocabulary's last token
    np.save(directory / manifest.embedding.file, embedding)
    changed = {
        name: dataclasses.replace(entry, **describe_file(directory, entry.file))
        for name, entry in (("final_norm", manifest.final_norm), ("embedding", manifest.embedding))
    }
    dataclasses.replace(manifest, **changed).write(directory)
    return Bundle.load(directory)


def _extend(path):
    with path.open("ab") as file:
        file.write(UNKNOWN_FIELD)
