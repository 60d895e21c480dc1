"""Each form of a matrix: its graph computes what the form says of itself, whatever the numbers of rows and inputs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("onnx", reason="exporting needs onnx: pip install '.[gguf]'")

from exporter import calibration, error_feedback
from exporter.blocks import Blocks, UnpackedBlocks
from exporter.calibration import Activations
from exporter.error_feedback import rounded_with_feedback
from exporter.joining import joined
from exporter.layer_graph import write_head
from exporter.matrices import FloatMatrix, HalfMatrix, Matrix, PerTokenMatrix, SplitMatrix, float_product
from exporter.parity import open_session
from exporter.precisions import PRECISIONS
from exporter.reference import relative_error
from exporter.rounding import leave, round_activations, round_by_block, round_by_scale
from flowspec_edge.errors import CheckpointError
from flowspec_edge.manifest import HIDDEN, LOGITS, TOP_K, TOP_LOG_PROBS, TOP_TOKENS
from tests.narrowing import present

NUM_OUT, NUM_IN = 48, 80  # two blocks and a half
RANDOM = np.random.default_rng(0)
WEIGHTS = RANDOM.normal(0, 0.1, (NUM_OUT, NUM_IN)).astype(np.float32)
WEIGHTS[5] = 0.0
COLUMNS = np.array([3, 41])
OWN = PRECISIONS["own"]
ROWS = RANDOM.standard_normal((200, 10), np.float32) @ RANDOM.standard_normal((10, NUM_IN), np.float32)
"""Rows whose values depend on each other, as those of a model do; one value is much larger than the others."""
ROWS[:, 41] *= 100


def seen(rows: np.ndarray) -> Activations:
    found = Activations(rows.shape[1], has_squares=True)
    for part in np.array_split(rows, 3):
        found.add(part)
    return found


FORMS: dict[str, Callable[[np.ndarray], Matrix]] = {
    "float32": FloatMatrix,
    "float32 of bfloat16": lambda weights: FloatMatrix((weights.view(np.uint32) & 0xFFFF0000).view(np.float32)),
    "float32 of float16": lambda weights: FloatMatrix(weights.astype(np.float16)),
    "float16": HalfMatrix.rounded,
    "8 bits unpacked": lambda weights: UnpackedBlocks(Blocks.rounded(weights, 8)),
    "8 bits": lambda weights: Blocks.rounded(weights, 8),
    "4 bits": lambda weights: Blocks.rounded(weights, 4),
    "bytes": PerTokenMatrix.rounded,
    "bytes beside columns": lambda weights: SplitMatrix.of(weights, COLUMNS, PerTokenMatrix.rounded),
    "8 bits beside columns": lambda weights: SplitMatrix.of(weights, COLUMNS, lambda rest: Blocks.rounded(rest, 8)),
    "4 bits as they are, beside columns": lambda weights: OWN.form(Blocks.rounded(weights, 4), seen(ROWS)),
    "4 bits, fed back": lambda weights: rounded_with_feedback(weights, 4, COLUMNS, seen(ROWS)),
}


@pytest.mark.parametrize("num_rows", [1, 2, 17])
@pytest.mark.parametrize("form", FORMS)
def test_a_graph_computes_what_its_form_says(form: str, num_rows: int, tmp_path: Path) -> None:
    matrix, path = FORMS[form](WEIGHTS), tmp_path / "head.onnx"
    assert matrix.shape == (NUM_OUT, NUM_IN)
    write_head(matrix, path)
    rows = RANDOM.standard_normal((num_rows, NUM_IN), np.float32)
    rows[0] = 0.0
    outputs = [LOGITS, TOP_LOG_PROBS, TOP_TOKENS]
    logits, log_probs, tokens = open_session(path).run(outputs, {HIDDEN: rows, TOP_K: np.array([3])})
    expected = matrix.times(rows)
    scale = float(np.sqrt(np.square(WEIGHTS).mean() * NUM_IN))  # of a product that is not all zeros
    np.testing.assert_allclose(logits, expected, rtol=0, atol=(1e-2 if form == "float16" else 2e-5) * scale)
    np.testing.assert_allclose(expected, float_product(matrix, rows), rtol=0, atol=0.1 * scale)
    np.testing.assert_array_equal(tokens[-1], np.argsort(-logits[-1], kind="stable")[:3])
    assert (np.diff(log_probs[-1]) <= 0).all()


PARTS = ((0, 32), (32, 37), (37, NUM_OUT))


@pytest.mark.parametrize("form", ["bytes", "bytes beside columns"])
def test_joined_matrices_give_each_row_the_bits_that_it_has_from_each(form: str, tmp_path: Path) -> None:
    path, rows = tmp_path / "head.onnx", RANDOM.standard_normal((17, NUM_IN), np.float32)

    def logits_of(matrix: Matrix, num_rows: int) -> np.ndarray:
        write_head(matrix, path)
        (logits,) = open_session(path).run([LOGITS], {HIDDEN: rows[:num_rows], TOP_K: np.array([1])})
        return np.asarray(logits)

    matrices = [FORMS[form](WEIGHTS[start:stop]) for start, stop in PARTS]
    whole = present(joined(matrices))
    for num_rows in (1, 2, 17):
        apart = [logits_of(matrix, num_rows) for matrix in matrices]
        np.testing.assert_array_equal(logits_of(whole, num_rows), np.concatenate(apart, axis=1))


def test_other_matrices_stay_apart() -> None:
    byte, blocks, split = (FORMS[form](WEIGHTS) for form in ("bytes", "8 bits", "bytes beside columns"))
    other_columns = SplitMatrix.of(WEIGHTS, COLUMNS[:1], PerTokenMatrix.rounded)
    of_blocks = SplitMatrix.of(WEIGHTS, COLUMNS, lambda rest: Blocks.rounded(rest, 8))
    for pair in ([byte, blocks], [byte, split], [blocks, blocks], [split, other_columns], [of_blocks, of_blocks]):
        assert joined(pair) is None


LOSES = {
    "float32": 0.0,
    "float32 of bfloat16": 0.04,
    "float32 of float16": 2e-3,
    "float16": 2e-3,
    "4 bits": 0.4,
    "4 bits as they are, beside columns": 0.4,
    "4 bits, fed back": 2.0,
}
"""The largest error of a weight, relative to their RMS; 0.02 where there are 8 bits."""


@pytest.mark.parametrize("form", FORMS)
def test_a_form_stands_for_the_weights_that_it_was_made_of(form: str) -> None:
    matrix = FORMS[form](WEIGHTS)
    assert relative_error([matrix.unpacked()], [WEIGHTS]) <= LOSES.get(form, 0.02)
    np.testing.assert_array_equal(matrix.unpacked(3, 7), matrix.unpacked()[3:7])
    assert matrix.memory_bytes <= 4 * WEIGHTS.size


def test_16_bits_are_stored_where_they_lose_nothing(tmp_path: Path) -> None:
    kinds = {}
    for form in ("float32", "float32 of bfloat16", "float32 of float16"):
        write_head(FORMS[form](WEIGHTS), tmp_path / "head.onnx")
        model = onnx.load(tmp_path / "head.onnx")
        onnx.checker.check_model(model)
        (weights,) = (tensor for tensor in model.graph.initializer if list(tensor.dims) == [NUM_IN, NUM_OUT])
        kinds[form] = onnx.TensorProto.DataType.Name(weights.data_type)
    assert list(kinds.values()) == ["FLOAT", "BFLOAT16", "FLOAT16"]


def test_weights_beyond_float16_are_refused() -> None:
    with pytest.raises(CheckpointError, match="has weights beyond float16"):
        HalfMatrix.rounded(1e6 * WEIGHTS)


def test_activations_are_rounded_as_far_as_8_bits_go() -> None:
    rows = RANDOM.standard_normal((4, 64), np.float32) * np.repeat([1.0, 100.0], 32).astype(np.float32)
    rows[3] = 0.0
    largest = np.abs(rows.reshape(4, 2, 32)).max(axis=2, keepdims=True)
    for rounded in (round_by_block(rows, 32), round_by_scale(rows, 32)):
        error = np.abs(rounded - rows).reshape(4, 2, 32)
        assert (error <= largest / 127 * 0.501).all() and error[:3].any()
    assert not round_activations(rows, 8, 32)[3].any()


def test_only_on_borders_do_processors_round_differently() -> None:
    rows = np.array([[127.0, 2.5, -2.5, 3.5, 2.4, 0.0]], np.float32)
    assert round_by_block(rows, 6).tolist() == [[127, 2, -2, 4, 2, 0]]
    assert round_by_scale(rows, 6).tolist() == [[127, 3, -3, 4, 2, 0]]
    assert leave(rows, 6) is rows


def product_error(matrix: Matrix, rows: np.ndarray) -> float:
    return float(np.abs(matrix.times(rows) - rows @ WEIGHTS.T).max())


def test_large_inputs_do_not_spoil_the_others_where_their_columns_are_kept() -> None:
    activations = seen(ROWS)
    assert activations.largest_inputs(0.001).tolist() == [41], "one at least"
    assert activations.largest_inputs(0.05).tolist() == sorted(np.argsort(-np.abs(ROWS).max(axis=0))[:4])
    split = SplitMatrix.of(WEIGHTS, np.array([41]), PerTokenMatrix.rounded)
    assert product_error(split, ROWS) < 0.1 * product_error(PerTokenMatrix.rounded(WEIGHTS), ROWS)


def test_a_quantised_matrix_keeps_its_weights_where_its_columns_are_kept() -> None:
    matrix, activations = Blocks.rounded(WEIGHTS, 4), seen(ROWS)
    split = OWN.form(matrix, activations)
    np.testing.assert_array_equal(split.unpacked(), matrix.unpacked())
    exact = float_product(matrix, ROWS)
    assert np.abs(split.times(ROWS) - exact).max() < 0.1 * np.abs(matrix.times(ROWS) - exact).max()
    floats = FloatMatrix(WEIGHTS)
    assert OWN.form(floats, activations) is floats, "nothing is rounded there"
    assert OWN.form(matrix) is matrix


@pytest.mark.parametrize("window", [32, NUM_IN])
def test_columns_take_up_the_errors_of_those_before_them(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (calibration, error_feedback):
        monkeypatch.setattr(module, "WINDOW", window)
    plain = SplitMatrix.of(WEIGHTS, COLUMNS, lambda rest: Blocks.rounded(rest, 4))
    fed_back = rounded_with_feedback(WEIGHTS, 4, COLUMNS, seen(ROWS))
    errors = [np.abs(ROWS @ (matrix.unpacked() - WEIGHTS).T).mean() for matrix in (plain, fed_back)]
    assert errors[1] < 0.7 * errors[0]
    rest = fed_back.rest
    assert isinstance(rest, Blocks) and not rest.unpacked()[:, COLUMNS].any()


def test_a_block_has_the_scale_that_loses_least(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = RANDOM.lognormal(0, 1, NUM_IN).astype(np.float32)
    some, others = (RANDOM.standard_normal((4000, NUM_IN), np.float32) * sizes for _ in range(2))

    def error() -> float:
        matrix = rounded_with_feedback(WEIGHTS, 4, COLUMNS, seen(some))
        assert not matrix.unpacked()[5].any(), "an output without weights"
        return float(np.square(others @ (matrix.unpacked() - WEIGHTS).T).mean())

    chosen = error()
    monkeypatch.setattr(error_feedback, "_SCALES", (1.0,))
    fitted = error()
    assert chosen < 0.9 * fitted


def test_what_few_rows_have_in_common_by_chance_is_not_made_up_for() -> None:
    few, others = (RANDOM.standard_normal((num_rows, NUM_IN), np.float32) for num_rows in (20, 4000))
    plain = SplitMatrix.of(WEIGHTS, COLUMNS, lambda rest: Blocks.rounded(rest, 4))
    fed_back = rounded_with_feedback(WEIGHTS, 4, COLUMNS, seen(few))
    assert product_error(fed_back, few) < product_error(plain, few)
    errors = [np.square(others @ (matrix.unpacked() - WEIGHTS).T).mean() for matrix in (plain, fed_back)]
    assert errors[1] < 1.5 * errors[0]
