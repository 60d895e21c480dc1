"""The shapes of plain Llamas: that of the demo model, and those of heads."""

from __future__ import annotations

from exporter.config import LayerShape


def llama_shape(
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    max_context: int = 1024,
    rms_norm_eps: float = 1e-5,
    rope_theta: float = 10000.0,
) -> LayerShape:
    """The shape of a plain Llama's layers."""
    return LayerShape(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=rms_norm_eps,
        rope_frequencies=tuple(rope_theta ** (-2 * pair / head_dim) for pair in range(head_dim // 2)),
        max_context=max_context,
    )


def theta_of(shape: LayerShape) -> float:
    """The base of a plain rope whose slowest frequency is that of ``shape``."""
    rotated = [frequency for frequency in shape.rope_frequencies if frequency > 0]
    return float(f"{(rotated[0] / rotated[-1]) ** (len(rotated) / max(1, len(rotated) - 1)):.6g}")


def head_shape(target: LayerShape) -> LayerShape:
    """The shape of the one layer of a head for such a target: that of a plain Llama of the same sizes."""
    return llama_shape(
        target.hidden_size,
        target.intermediate_size,
        target.num_heads,
        target.num_kv_heads,
        target.head_dim,
        max_context=target.max_context,
        rms_norm_eps=target.rms_norm_eps,
        rope_theta=theta_of(target),
    )
