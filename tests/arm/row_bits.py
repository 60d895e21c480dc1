"""Checks that a row has the same bits in every chunk on this processor: all layers of a bundle and its head, in each of
its precisions. It runs on a board where only flowspec-edge is installed.

    python row_bits.py BUNDLE

Prints as JSON, by precision, the chunk sizes whose rows differ from those of one large chunk. There should be none.
"""

import json
import sys
from pathlib import Path

import numpy as np

from flowspec_edge.core.events import RunForward
from flowspec_edge.core.rows import NO_PARENT, Row
from flowspec_edge.core.speculation.kv_slots import KvSlots
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.manifest import load_manifest

NUM_ROWS = 24
SIZES = (1, 2, 3, 4, 5, 8, 16)


def main() -> None:
    directory = Path(sys.argv[1])
    manifest = load_manifest(directory)
    head = Head(directory, manifest)
    print(json.dumps({precision: sizes_that_differ(directory, precision, head) for precision in manifest.precisions}))


def sizes_that_differ(directory: Path, precision: str, head: Head) -> list[int]:
    manifest = load_manifest(directory)
    stage = StageRunner(directory, manifest, 0, manifest.geometry.num_layers, precision=precision)
    tokens = np.random.default_rng(5).integers(2, manifest.geometry.vocab_size, NUM_ROWS)
    rows = [Row(place, place - 1 if place else NO_PARENT, int(token)) for place, token in enumerate(tokens)]

    def logits(num_rows: int) -> np.ndarray:
        stage.open_cache(1, NUM_ROWS + 1)
        slots, found = KvSlots(NUM_ROWS + 1), []
        for start in range(0, NUM_ROWS, num_rows):
            chunk = tuple(rows[start : start + num_rows])
            first = slots.append(chunk)
            positions = np.arange(start, start + len(chunk))
            forward = RunForward(1, chunk, None, (), first, positions, slots.ancestor_mask(first))
            found.append(head.logits(stage.run(forward).hidden))
        return np.concatenate(found)

    expected = logits(NUM_ROWS)
    return [size for size in SIZES if not np.array_equal(logits(size), expected)]


if __name__ == "__main__":
    main()
