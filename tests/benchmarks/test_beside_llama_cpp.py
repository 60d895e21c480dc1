"""What is told beside llama.cpp, and the files of random weights that both engines read."""

from pathlib import Path

import pytest

from benchmarks.beside_llama_cpp import HEADER, Times, compared, in_turns
from benchmarks.random_gguf import SPREAD, ModelShape, write_random_gguf
from exporter.gguf.model import open_gguf

SMALL = ModelShape("small", 64, 128, 2, 2, num_heads=2, num_kv_heads=1, head_dim=32, vocab_size=300)


def test_a_ratio_compares_the_turns_with_the_faster_attention() -> None:
    turns = [
        {"own": 2.0, "products own": 1.0, "with flash": 3.0, "without flash": 4.0},
        {"own": 4.0, "products own": 2.0, "with flash": 6.0, "without flash": 5.0},
        {"own": 9.0, "products own": 3.0, "with flash": 1.0, "without flash": 6.0},
    ]
    where = {"model": "small", "threads": 1, "case": "4 rows"}
    (row,) = compared(turns, where, aim=1.3)
    assert (row.ours_ms, row.llama_cpp_ms, row.has_flash) == (4000, 3000, True)
    assert row.ratio == 1.5 and row.kernels == 3.0
    assert len(row.cells) == len(HEADER) and "missed" not in row.cells[HEADER.index("aim")]
    (slow,) = compared(turns, where, aim=1.6)
    assert slow.cells[HEADER.index("aim")] == "1.60 missed"
    assert [row.precision for row in compared([{**turn, "w8a8": 1.0} for turn in turns], where, 1.0)] == ["own", "w8a8"]


def test_engines_take_turns_of_the_same_length() -> None:
    asked = list[tuple[str, int]]()

    def engine(name: str, seconds: float) -> Times:
        def times(case: dict[str, int]) -> list[float]:
            asked.append((name, case["times"]))
            return [seconds] * case["times"]

        return times

    turns = in_turns({"fast": engine("fast", 0.05), "slow": engine("slow", 9.0)}, {"rows": 1}, case_s=0.0)
    assert turns == [{"fast": 0.05, "slow": 9.0}] * 3
    assert asked[:3] == [("fast", 1), ("fast", 1), ("slow", 1)], "to warm up, and to count by"
    assert asked[3:] == [("fast", 5), ("slow", 1)] * 3


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_a_file_of_random_weights_is_a_model_of_its_shape(tmp_path: Path, kind: str) -> None:
    model = open_gguf(write_random_gguf(SMALL, kind, tmp_path / "small.gguf"))
    assert (model.num_layers, model.vocab_size, model.is_tied) == (2, 300, True)
    assert model.layers(1, 2).keys() == model.layers(0, 1).keys()
    assert model.lm_head().unpacked().std() == pytest.approx(SPREAD, rel=0.1)
    tokenizer = model.tokenizer.tokenizer
    assert tokenizer.decode(tokenizer.encode("the law of a row").ids) == "the law of a row"
