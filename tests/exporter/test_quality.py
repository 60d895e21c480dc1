"""What is measured of texts: chunks, parts of a vocabulary and windows change nothing."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="exporting needs onnx: pip install '.[gguf]'")

from exporter import built_in, quality
from exporter.calibration import Calibration
from exporter.config import LayerShape
from exporter.matrices import FloatMatrix
from exporter.reference import NumpyLayers
from exporter.steps import TEXT_ROWS, text_steps
from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.manifest import HIDDEN

SHAPE = LayerShape(
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_frequencies=(1.0, 0.3, 0.1, 0.03),
    max_context=4096,
)
VOCAB = 50
RANDOM = np.random.default_rng(0)
EMBEDDING = RANDOM.standard_normal((VOCAB, SHAPE.hidden_size), np.float32)
WEIGHTS = {
    f"layers.0.{name}": FloatMatrix(RANDOM.normal(0, 0.2, size).astype(np.float32))
    if len(size) == 2
    else np.ones(size, np.float32)
    for name, size in SHAPE.tensor_shapes().items()
}
TEXTS = [RANDOM.integers(0, VOCAB, size).tolist() for size in (TEXT_ROWS + 40, 7, 1)]


def test_texts_begin_anew_and_may_be_cut_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows_of(texts: list[list[int]]) -> np.ndarray:
        layers = NumpyLayers(SHAPE, range(1), WEIGHTS, TEXT_ROWS + 64)
        return np.concatenate(
            [layers.run({HIDDEN: EMBEDDING[step.tokens][None]}, step)[0] for step in text_steps(texts)]
        )

    together = rows_of(TEXTS)
    np.testing.assert_array_equal(together, np.concatenate([rows_of([text]) for text in TEXTS]))
    monkeypatch.setattr("exporter.steps.TEXT_ROWS", 100)
    np.testing.assert_allclose(rows_of(TEXTS), together, atol=1e-5)


def test_what_entered_a_matrix_is_seen() -> None:
    calibration = Calibration(TEXTS, EMBEDDING, has_squares=True)
    calibration.run(SHAPE, range(1), WEIGHTS)
    seen = calibration.seen
    assert set(seen) == {name.removesuffix(".weight") for name in WEIGHTS if "proj" in name}
    query, key, gate, up = (
        seen[f"layers.0.{name}"] for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj")
    )
    assert query is key and gate is up and query is not gate
    rows = np.concatenate([EMBEDDING[text] for text in TEXTS])
    normed = rows / np.sqrt(np.square(rows).mean(axis=1, keepdims=True) + np.float32(SHAPE.rms_norm_eps))
    np.testing.assert_allclose(query.largest, np.abs(normed).max(axis=0), rtol=1e-5)
    np.testing.assert_allclose(query.squares[0], normed.T @ normed, atol=1e-2)
    first = query.largest.copy()
    calibration.run(SHAPE, range(1), WEIGHTS)
    assert not np.array_equal(calibration.seen["layers.0.self_attn.q_proj"].largest, first), "the next layer's rows"


def test_in_float64_the_order_of_sums_changes_nothing_that_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """So every processor finds the same inputs to be the largest."""

    def second_layer(dtype: type[np.floating[Any]], rows: int) -> np.ndarray:
        monkeypatch.setattr("exporter.steps.TEXT_ROWS", rows)
        calibration = Calibration(TEXTS, EMBEDDING, has_squares=False, dtype=dtype)
        for _ in range(2):
            calibration.run(SHAPE, range(1), WEIGHTS)
        return calibration.seen["layers.0.mlp.down_proj"].largest

    np.testing.assert_array_equal(second_layer(np.float64, 512), second_layer(np.float64, 100))
    assert not np.array_equal(second_layer(np.float32, 512), second_layer(np.float32, 100))


@pytest.mark.parametrize("size", [1, 7, VOCAB])
def test_scores_do_not_depend_on_parts_of_the_vocabulary(size: int) -> None:
    logits = 5 * RANDOM.standard_normal((6, VOCAB))
    following = np.array([3, 49, 0, -1, 7, -1])
    scores = quality._scores_by_parts([logits[:, start : start + size] for start in range(0, VOCAB, size)], following)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(scores.losses, [-log_probs[row, following[row]] for row in (0, 1, 2, 4)])
    np.testing.assert_array_equal(scores.likeliest, logits.argmax(axis=1))


def test_a_head_is_multiplied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_HEAD_WEIGHTS", 20 * SHAPE.hidden_size)
    parts = list(quality._products_by_parts(FloatMatrix(EMBEDDING), EMBEDDING[:3]))
    assert [part.shape for part in parts] == [(3, 20), (3, 20), (3, 10)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), EMBEDDING[:3] @ EMBEDDING.T, rtol=1e-4, atol=1e-4)


def test_built_in_texts_are_long_and_apart() -> None:
    measured, calibrated = built_in.measured_texts(), built_in.calibration_texts()
    tokenizer = Tokenizer(DEMO_BUNDLE / "tokenizer.json")
    for text in (*measured, *calibrated):
        assert len(text) / 4.7 > quality.MAX_TOKENS / 2, "with the largest vocabularies a token has fewer letters"
        assert len(tokenizer.encode(text)) > quality.MAX_TOKENS / 2
    lines = {line.strip() for text in calibrated for line in text.splitlines() if len(line.strip()) > 30}
    assert not lines & {line.strip() for text in measured for line in text.splitlines()}
