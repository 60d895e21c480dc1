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

RIDGES = (1e-2, 1e-3, 1e-4, 0.1, 1.0, 10.0)
"""Of each input's mean square, added to it. That one is taken which does best on texts that the others leave out; the
first where there are none."""
EVERY = 8
"""One text in so many is left out for that."""

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
    regression = Regression(linear.in_features + has_bias, linear.out_features, linear.weight.device)
    with _caught_inputs(linear) as caught:
        for batch, features in batches:
            (rows,) = draft_rows(drafting, batch.tokens.to(features.device), features, 1)
            is_left_out = torch.tensor(batch.numbers) % EVERY == 0
            counted, inputs, missing = learned_rows(drafting, batch), caught.pop(), features[:, 1:] - rows
            if has_bias:
                inputs = nn.functional.pad(inputs, (0, 1), value=1.0)
            for left_out in (False, True):
                chosen = (counted & (is_left_out == left_out)[:, None]).to(features.device)
                regression.add(inputs[chosen], missing[chosen], left_out)
    exchange(regression.sums)
    solved = regression.solve().T
    linear.weight.copy_(solved[:, : linear.in_features])
    if has_bias:
        linear.bias.copy_(solved[:, -1])


class Regression:
    """The weights [inputs, outputs] that bring inputs nearest to outputs.

    ``sums`` has those over rows of x^T (x, y): of the rows that it is fitted to, and of those left out.
    """

    def __init__(self, num_inputs: int, num_outputs: int, device: torch.device) -> None:
        self.num_inputs = num_inputs
        self.sums = torch.zeros(2, num_inputs, num_inputs + num_outputs, device=device)

    def add(self, inputs: torch.Tensor, outputs: torch.Tensor, is_left_out: bool) -> None:
        """Rows of both."""
        self.sums[int(is_left_out)] += inputs.T @ torch.cat((inputs, outputs), dim=-1)

    def solve(self) -> torch.Tensor:
        fitted, left_out = self.sums
        best = min(RIDGES, key=lambda ridge: self._distance(self._solved(fitted, ridge), left_out))
        return self._solved(fitted + left_out, best)

    def _solved(self, sums: torch.Tensor, ridge: float) -> torch.Tensor:
        squares, products = sums[:, : self.num_inputs], sums[:, self.num_inputs :]
        scale = squares.diagonal().clamp(min=1e-12).rsqrt()[:, None]
        even = squares * scale * scale.T
        even.diagonal().add_(ridge)
        solved: torch.Tensor = torch.linalg.solve(even, products * scale) * scale
        return solved

    def _distance(self, weights: torch.Tensor, sums: torch.Tensor) -> float:
        """The sum of squared distances over the rows of ``sums``, less what no weights change."""
        squares, products = sums[:, : self.num_inputs], sums[:, self.num_inputs :]
        return float(((squares @ weights - 2 * products) * weights).sum())


@contextmanager
def _caught_inputs(linear: nn.Linear) -> Iterator[list[torch.Tensor]]:
    """What enters ``linear``, call by call."""
    caught: list[torch.Tensor] = []
    hook = linear.register_forward_pre_hook(lambda module, entering: caught.append(entering[0]))
    try:
        yield caught
    finally:
        hook.remove()
