"""Model bundles on this machine's disk, and the one that comes with the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flowspec_edge.manifest import Manifest, bundle_digest, load_manifest

DEMO_BUNDLE = Path(__file__).parent / "demo_bundle"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on this node's disk. Where only some layers are there, ``manifest`` names files that are not."""

    directory: Path
    manifest: Manifest
    digest: str

    @classmethod
    def load(cls, directory: Path) -> Bundle:
        """Load the bundle in ``directory``. Raises BundleError where there is none that this version can read."""
        manifest = load_manifest(directory)
        return cls(directory, manifest, bundle_digest(manifest))
