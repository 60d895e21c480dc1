"""A real chat model as people have it, against llama.cpp."""

from pathlib import Path

import numpy as np
import pytest

from exporter.bundle import ExportOptions, export_bundle
from flowspec_edge.core.rows import Floats
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.manifest import load_manifest
from tests.bundles import MadeOnce
from tests.engine.conftest import Session, make_chain
from tests.llama_cpp import llama_cpp_texts
from tests.real_model import smollm2

pytestmark = pytest.mark.slow

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea,",
    "The three primary colours are",
    "def fibonacci(n):\n    ",
    "To make pancakes, you need",
    "Die Hauptstadt von Deutschland ist",
    "1, 2, 3, 4, 5, 6,",
    "The opposite of hot is",
    "In 1969, astronauts first",
    "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\n",
    "import numpy as np\n\nx = np.",
)
NUM_TOKENS = 24


def make_bundle(root: Path) -> None:
    export_bundle(ExportOptions(checkpoint=smollm2(), drafter=None, out=root / "out"))


def test_the_likeliest_texts_are_llama_cpps(made_once: MadeOnce) -> None:
    """Both round activations to 8 bits in blocks of the same size, but llama.cpp the largest inputs and sums of them
    too, so near ties fall otherwise. Of these 285 tokens 272 are float32's own in llama.cpp, 280 here, and 269 are the
    same in both.
    """
    expected = llama_cpp_texts(smollm2(), PROMPTS, NUM_TOKENS)
    directory = made_once("smollm2", make_bundle) / "out"
    manifest = load_manifest(directory)
    assert manifest.precision == "own" and max(manifest.parity.block_errors) < 1e-3
    tokenizer = Tokenizer(directory / manifest.tokenizer.file)
    stage, head = StageRunner(directory, manifest, 0, 30, num_threads=2), Head(directory, manifest, num_threads=2)
    num_equal, num_tokens, gaps = 0, 0, []
    for prompt, text in zip(PROMPTS, expected, strict=True):
        ids = tokenizer.encode(prompt)
        logits: Floats = head.logits(Session(stage).run(make_chain([*ids, *text])))[len(ids) - 1 : -1]
        differs = logits.argmax(-1) != np.array(text)
        num_equal, num_tokens = num_equal + int(not differs.any()), num_tokens + len(text)
        for row, token in zip(logits[differs], np.array(text)[differs], strict=True):
            gaps.append(float(row.max() - row[token]))
    assert tokenizer.decode(expected[0]).startswith(" Paris")
    assert num_equal >= 3, f"{num_equal} of {len(PROMPTS)} texts are the same; {gaps}"
    assert len(gaps) <= 0.08 * num_tokens and max(gaps, default=0) < 0.6, gaps
