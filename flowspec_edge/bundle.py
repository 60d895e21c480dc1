"""A model bundle on this machine's disk, and the one that comes with the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flowspec_edge.manifest import Manifest, bundle_digest, load_manifest

DEMO_BUNDLE = Path(__file__).parent / "demo_bundle"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on this node's disk; ``manifest`` may name files that are not there, where only some layers are."""

    directory: Path
    manifest: Manifest
    digest: str

    @classmethod
    def load(cls, directory: Path) -> Bundle:
        """Raises BundleError where there is none that this version can read."""
        manifest = load_manifest(directory)
        return cls(directory, manifest, bundle_digest(manifest))
