"""auto: no search beforehand; each head takes the family that holds most of its attention in this very prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns.base import HeadPattern, Looked, Selection, View
from mm_sglang.kernels.plan import TILE


@dataclass(frozen=True, kw_only=True)
class Auto(HeadPattern):
    """Stands for a recipe that `kernels.choosing.choose` finds online, for models that nobody has searched.

    The knob is the cost and not the recall: it makes prefill time predictable and equal for all heads, and a mark for
    recall is there already, the guard, which raises this density for the heads that stay under it.

    Args:
        density: share of dense attention's tiles that the chosen recipe may compute. Default: 0.1.
        keys: the most keys that a chunk's query attends in the mean, which makes the share smaller in long prompts;
            None: the share alone counts. Default: None.
    """

    kind: ClassVar[str] = "auto"
    density: float = 0.1
    keys: int | None = None

    def __post_init__(self) -> None:
        value = self.density
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
            raise ValueError(f"auto: density={value!r}: needs a share between 0 and 1")
        keys = self.keys
        if keys is not None and (not isinstance(keys, int) or isinstance(keys, bool) or keys < TILE):
            raise ValueError(f"auto: keys={keys!r}: needs a number of keys from {TILE}, one tile, or nothing")

    def share(self, prefix: int, keys: int) -> float:
        """Of dense attention's tiles, for queries [prefix, keys), which see (prefix + keys) / 2 keys in the mean."""
        return self.density if self.keys is None else min(self.density, self.keys / ((prefix + keys) / 2))

    def scaled(self, factor: float) -> Self:
        keys = None if self.keys is None else max(TILE, round(self.keys * factor))
        return replace(self, density=min(0.99, self.density * factor), keys=keys)

    def looks_at(self, layout: TokenLayout, queries: int) -> Looked:
        return ((None, None),)  # a choice samples tiles all over the chunk

    def select(self, view: View) -> Selection:
        raise ValueError("auto: has to be chosen before it is planned: needs kernels.choosing.choose")
