"""A head to begin with: one whose rows are near the target's before the first gradient, by least squares.

Whatever writes to the head's row by a matrix is solved in turn, each for what those before it leave: ``fc``, the
attention's output, the feed-forward's output. What these read (queries, keys, values, gates) stays as it was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from exporter.training.batches import Batch
from exporter.training.draft_loss import draft_rows, learned_rows
from exporter.training.network import Drafting

RIDGE = 1e-3
"""Of each input's mean square, added to it: inputs that hardly differ share what they explain."""


Exchange = Callable[[torch.Tensor], None]


@torch.no_grad()
def fit_rows(drafting: Drafting, batches: Sequence[tuple[Batch, torch.Tensor]], exchange: Exchange) -> None:
    """Fit the head to what is to be learned of ``batches``, with their features [texts, longest, hidden_size].

    Several workers may have batches of their own: ``exchange`` replaces a tensor by its sum over all of them.
    """
    (layer,) = drafting.head.stack
    writing = [drafting.head.fc, layer.self_attn.o_proj, layer.mlp.down_proj]
    for linear in writing:
        for parameter in linear.parameters():
            parameter.zero_()
    for linear in writing:
        _fit(linear, drafting, batches, exchange)


def _fit(
    linear: nn.Linear, drafting: Drafting, batches: Sequence[tuple[Batch, torch.Tensor]], exchange: Exchange
) -> None:
    """Set the weights of ``linear``, which are zero, to those that bring the head's rows nearest to the target's."""
    has_bias = linear.bias is not None
    size = linear.in_features + has_bias
    squares, products = linear.weight.new_zeros(size, size), linear.weight.new_zeros(size, linear.out_features)
    with _caught_inputs(linear) as caught:
        for batch, features in batches:
            (rows,) = draft_rows(drafting, batch.tokens.to(features.device), features, 1)
            counted = learned_rows(drafting, batch).to(features.device)
            missing, inputs = (features[:, 1:] - rows)[counted], caught.pop()[counted]
            if has_bias:
                inputs = nn.functional.pad(inputs, (0, 1), value=1.0)
            squares += inputs.T @ inputs
            products += inputs.T @ missing
    exchange(squares)
    exchange(products)
    solved = ridge_regression(squares, products).T
    linear.weight.copy_(solved[:, : linear.in_features])
    if has_bias:
        linear.bias.copy_(solved[:, -1])


def ridge_regression(squares: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """The weights [inputs, outputs], from sums of x x^T [inputs, inputs] and of x y^T [inputs, outputs] over rows."""
    scale = squares.diagonal().clamp(min=1e-12).rsqrt()
    even = squares * scale * scale[:, None]
    even.diagonal().add_(RIDGE)
    solved: torch.Tensor = torch.linalg.solve(even, products * scale[:, None]) * scale[:, None]
    return solved


@contextmanager
def _caught_inputs(linear: nn.Linear) -> Iterator[list[torch.Tensor]]:
    """What enters ``linear``, call by call."""
    caught: list[torch.Tensor] = []
    hook = linear.register_forward_pre_hook(lambda module, entering: caught.append(entering[0]))
    try:
        yield caught
    finally:
        hook.remove()
