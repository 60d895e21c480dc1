"""Layers that keep keys and values of the rows that they have run."""

from __future__ import annotations

import torch

from exporter.training.network import Attention, LayerStack

STEP = 128
"""Slots by which a full cache grows."""


class CachedLayers:
    """The layers of a target or a head, with a cache for ``batch`` texts."""

    def __init__(self, layers: LayerStack, batch: int = 1) -> None:
        self.layers, self.batch, self.num_slots = layers, batch, 0
        self._keys = [self._slots(0) for _ in layers.stack]
        self._values = [self._slots(0) for _ in layers.stack]

    def __len__(self) -> int:
        return self.num_slots

    def run(self, x: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Run ``x`` [batch, rows, hidden_size], whose rows take the next slots, through the layers.

        ``positions`` are [rows] or [batch, 1, rows]; ``seen`` [..., rows, slots] says which slots a row sees.
        """
        rotations = self.layers.rotations(positions)
        first, self.num_slots = self.num_slots, self.num_slots + x.shape[1]
        for number, layer in enumerate(self.layers.stack):
            keys, values = self._grown(self._keys, number), self._grown(self._values, number)

            def attend(
                attention: Attention,
                q: torch.Tensor,
                k: torch.Tensor,
                v: torch.Tensor,
                keys: torch.Tensor = keys,
                values: torch.Tensor = values,
            ) -> torch.Tensor:
                keys[:, :, first : self.num_slots], values[:, :, first : self.num_slots] = k, v
                return attention.attend(q, keys[:, :, : self.num_slots], values[:, :, : self.num_slots], seen)

            x = layer(x, rotations, attend)
        return x

    def keep_slots(self, slots: list[int]) -> None:
        """Forget all but these slots, which move together."""
        self._keys = [key[:, :, slots] for key in self._keys]
        self._values = [value[:, :, slots] for value in self._values]
        self.num_slots = len(slots)

    def keep_texts(self, texts: list[int]) -> None:
        """Forget all but these texts of the batch."""
        self._keys = [key[texts] for key in self._keys]
        self._values = [value[texts] for value in self._values]
        self.batch = len(texts)

    def _grown(self, caches: list[torch.Tensor], number: int) -> torch.Tensor:
        lacking = self.num_slots - caches[number].shape[2]
        if lacking > 0:
            caches[number] = torch.cat((caches[number], self._slots(max(lacking, STEP))), dim=2)
        return caches[number]

    def _slots(self, num_slots: int) -> torch.Tensor:
        shape = self.layers.shape
        return torch.zeros(self.batch, shape.num_kv_heads, num_slots, shape.head_dim, device=self.layers.device)
