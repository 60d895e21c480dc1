"""The drafter is worth what its makers measured: one tree at a time, on text it was not trained on."""

import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.engine.unsplit import UnsplitModel
from tests.ring.whole_tree import WholeTree

pytestmark = pytest.mark.slow

# docs/demo-model.md, from torch in float32, for trees of depth 6, top-k 10: tokens per verification, bonus included,
# mean of the prompts.
REPORTED = [(80, 0.0, 5.77), (64, 0.6, 4.42)]


@pytest.mark.parametrize(("num_nodes", "temperature", "reported"), REPORTED)
def test_acceptance_length_of_whole_trees(
    num_nodes: int, temperature: float, reported: float, int8_bundle: Bundle, prompts: list[list[int]]
) -> None:
    model = WholeTree(int8_bundle, num_nodes, depth=6)
    unsplit = UnsplitModel(int8_bundle.directory, int8_bundle.manifest)
    lengths = []
    for seed, prompt in enumerate(prompts):
        options = GenerateOptions(max_new_tokens=128, temperature=temperature, seed=seed)
        tokens, num_verifications = model.generate(prompt, options)
        assert tokens == list(unsplit.generate(prompt, options))
        lengths.append((len(tokens) - 1) / num_verifications)  # the first token comes from the prompt's own pass
    assert sum(lengths) / len(lengths) >= 0.95 * reported
