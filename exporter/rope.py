"""The rotary embedding that a ``config.json`` describes: frequencies by position, and what scales them.

A kind that is not known, or a parameter of one that is not, is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.fields import positive_int, positive_number
from flowspec_edge.errors import CheckpointError

FULL, SLIDING = "full_attention", "sliding_attention"
"""The types of layers, as configs name them: layers that see every row before theirs, and those with a window."""

_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_PARAMETERS = {
    "default": set[str](),
    "linear": {"factor", "original_max_position_embeddings"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    },
    "longrope": {"factor", "long_factor", "short_factor", "attention_factor", "original_max_position_embeddings"},
}
"""Of each kind of rope that is read. Others are refused."""
_OLD_NAMES = {"su": "longrope", "none": "default"}
_DEFAULT_THETA = 10000.0


@dataclass(frozen=True)
class Rope:
    """A rotary embedding.

    Attributes:
        frequencies: radians per position of each pair of a head's values that is rotated, in float32.
        scale: what rotated values are multiplied by, queries and keys alike.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class RopeFields:
    """What a config says of the rope of one type of layers: ``rope_scaling`` and ``rope_theta``, or either as
    ``rope_parameters`` has it.

    ``max_positions`` is the config's ``max_position_embeddings``.
    """

    path: Path
    values: Mapping[str, Any]
    max_positions: int

    def __post_init__(self) -> None:
        if self.kind not in _PARAMETERS:
            raise CheckpointError(
                f"{self.path}: rope type {self.kind!r} is not supported; supported: {', '.join(_PARAMETERS)}"
            )
        for name, value in self.values.items():
            if value is not None and name not in _COMMON | _PARAMETERS[self.kind]:
                raise CheckpointError(
                    f"{self.path}: rope_scaling has {name} = {value!r:.80}, which rope type {self.kind!r} is not known "
                    "to have"
                )

    @property
    def kind(self) -> Any:
        kind = self.values.get("rope_type", self.values.get("type")) or "default"
        if kind == "yarn" and self.values.get("long_factor") is not None:  # as the first Phi-3 models said it
            return "longrope"
        return _OLD_NAMES.get(kind, kind) if isinstance(kind, str) else kind

    @property
    def longest(self) -> int:
        """The most positions that the rope is made for."""
        if self.kind == "yarn" and self.values.get("original_max_position_embeddings") is not None:
            return max(self.max_positions, int(self._number("factor") * self.trained))
        return self.max_positions

    @property
    def trained(self) -> int:
        """The positions of the model's first training, before it was stretched."""
        return positive_int(self.path, self.values, "original_max_position_embeddings", self.max_positions)

    def rope(self, num_rotated: int, max_context: int) -> Rope:
        """The rope of heads of which ``num_rotated`` values are rotated, for texts of ``max_context`` tokens at most.

        Sources: Su et al., "RoFormer"; linear, Chen et al., arXiv 2306.15595; llama3, Llama 3.1's model code; yarn,
        Peng et al., arXiv 2309.00071; longrope, Ding et al., arXiv 2402.13753. Frequencies are float32, as transformers
        computes them.

        Raises:
            CheckpointError: a parameter is missing or makes no sense.
        """
        theta = positive_number(self.path, self.values, "rope_theta", _DEFAULT_THETA)
        exponents = np.arange(0, num_rotated, 2, dtype=np.float32) / np.float32(num_rotated)
        periods = (theta ** exponents.astype(np.float64)).astype(np.float32)
        scale = 1.0
        match self.kind:
            case "linear":
                frequencies = np.float32(1) / periods / np.float32(self._number("factor"))
            case "llama3":
                frequencies = self._llama3(np.float32(1) / periods)
            case "yarn":
                frequencies, scale = self._yarn(periods, num_rotated, theta)
            case "longrope":
                frequencies, scale = self._longrope(periods, max_context)
            case _:  # dynamic scaling begins behind max_position_embeddings, where no context reaches
                frequencies = np.float32(1) / periods
        return Rope(tuple(frequencies.tolist()), float(np.float32(scale)))

    def _llama3(self, frequencies: np.ndarray) -> np.ndarray:
        """Divide slow waves by ``factor``, leave fast ones, and blend those in between by their wavelength."""
        factor, low, high = (self._number(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        trained = positive_int(self.path, self.values, "original_max_position_embeddings")
        if high <= low:
            raise CheckpointError(f"{self.path}: high_freq_factor {high} is not above low_freq_factor {low}")
        wavelengths = np.float32(2 * math.pi) / frequencies
        share = np.clip((np.float32(trained) / wavelengths - np.float32(low)) / np.float32(high - low), 0, 1)
        blended = (1 - share) * frequencies / np.float32(factor) + share * frequencies
        return np.where(share >= 1, frequencies, blended)

    def _yarn(self, periods: np.ndarray, num_rotated: int, theta: float) -> tuple[np.ndarray, float]:
        """Divide by ``factor`` what turns less than ``beta_slow`` times in the trained context, leave what turns more
        than ``beta_fast`` times, and go from one to the other by the number of the pair.
        """
        factor = self._number("factor")

        def pair_that_turns(times: float) -> float:
            return num_rotated * math.log(self.trained / (times * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair_that_turns(self._number("beta_fast", 32.0)), pair_that_turns(self._number("beta_slow", 1.0))
        if self.values.get("truncate") is not False:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, num_rotated - 1)
        ramp = (np.arange(num_rotated // 2, dtype=np.float32) - np.float32(low)) / np.float32((high - low) or 0.001)
        kept = 1 - np.clip(ramp, 0, 1)
        stretched = np.float32(1) / (np.float32(factor) * periods)
        return stretched * (1 - kept) + np.float32(1) / periods * kept, self._yarn_scale(factor)

    def _yarn_scale(self, factor: float) -> float:
        if self.values.get("attention_factor") is not None:
            return self._number("attention_factor")

        def scale_by(weight: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

        if self.values.get("mscale") and self.values.get("mscale_all_dim"):
            return scale_by(self._number("mscale")) / scale_by(self._number("mscale_all_dim"))
        return scale_by(1.0)

    def _longrope(self, periods: np.ndarray, max_context: int) -> tuple[np.ndarray, float]:
        """A divisor for each frequency: ``short_factor`` where texts end within the trained context, else
        ``long_factor``. Keys in the cache stay as they are, so all texts of a bundle have the same.
        """
        name = self._divisors_for(max_context)
        divisors = self.values.get(name)
        if not isinstance(divisors, list) or not all(
            isinstance(value, int | float) and value > 0 for value in divisors
        ):
            raise CheckpointError(f"{self.path}: {name} is {divisors!r:.80}, expected a list of positive numbers")
        if len(divisors) != len(periods):
            raise CheckpointError(f"{self.path}: {name} has {len(divisors)} numbers, expected {len(periods)}")
        if self.values.get("attention_factor") is not None:
            scale = self._number("attention_factor")
        else:
            has_trained = self.values.get("original_max_position_embeddings") is not None
            factor = self.max_positions / self.trained if has_trained else self._number("factor")
            scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(self.trained))
        return np.float32(1) / (np.array(divisors, np.float32) * periods), scale

    def remarks(self, max_context: int) -> Iterator[str]:
        """What an export for such texts should say of the rope."""
        if self.kind == "longrope":
            yield (
                f"longrope: {self._divisors_for(max_context)} for texts of up to {max_context} tokens; the model was "
                f"trained with {self.trained}"
            )
        if self.kind == "dynamic":
            yield f"dynamic rope: not scaled, as texts end within {self.max_positions} tokens"

    def _divisors_for(self, max_context: int) -> str:
        return "long_factor" if max_context > self.trained else "short_factor"

    def _number(self, name: str, default: float | None = None) -> float:
        return positive_number(self.path, self.values, name, default)


def read_rope_fields(path: Path, config: Mapping[str, Any], max_positions: int) -> dict[str, RopeFields]:
    """What a config says of the rope of each type of layers.

    Raises:
        CheckpointError: fields of a kind that is not known, or of layers that are not.
    """
    shared = {name: config[name] for name in ("rope_theta", "partial_rotary_factor") if config.get(name) is not None}
    trained = config.get("original_max_position_embeddings")  # of Phi-3, which has it beside rope_scaling
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"{path}: rope_scaling is {given!r}, expected an object")
    by_type = {FULL: given, SLIDING: given}
    if given and all(isinstance(values, dict) for values in given.values()):  # one for each type of layers
        if unknown := set(given) - {FULL, SLIDING}:
            raise CheckpointError(f"{path}: rope_parameters are given for {', '.join(sorted(unknown))}, not supported")
        by_type = {
            FULL: given[FULL if FULL in given else SLIDING],
            SLIDING: given[SLIDING if SLIDING in given else FULL],
        }
    elif config.get("rope_local_base_freq") is not None:  # of Gemma 3, whose windows are not stretched
        by_type[SLIDING] = {"rope_theta": config["rope_local_base_freq"]}
    fields = {}
    for layer_type, values in by_type.items():
        merged = {**shared, **values}
        if trained is not None and RopeFields(path, merged, max_positions).kind == "longrope":
            merged.setdefault("original_max_position_embeddings", trained)
        fields[layer_type] = RopeFields(path, merged, max_positions)
    return fields
