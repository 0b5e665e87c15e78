"""auto: no search beforehand; each head takes the family that holds most of its attention in this very prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns.base import HeadPattern, Selection, View


@dataclass(frozen=True, kw_only=True)
class Auto(HeadPattern):
    """Stands for a recipe that `kernels.choosing.choose` finds online, for models that nobody has searched.

    The knob is the cost and not the recall: it makes prefill time predictable and equal for all heads, and a mark for
    recall is there already, the guard, which raises this density for the heads that stay under it.

    Args:
        density: share of dense attention's tiles that the chosen recipe may compute. Default: 0.1.
    """

    kind: ClassVar[str] = "auto"
    density: float = 0.1

    def __post_init__(self) -> None:
        value = self.density
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
            raise ValueError(f"auto: density={value!r}: needs a share between 0 and 1")

    def scaled(self, factor: float) -> Self:
        return replace(self, density=min(0.99, self.density * factor))

    def looks_at(self, layout: TokenLayout) -> None:
        return None  # a choice samples tiles all over the chunk

    def select(self, view: View) -> Selection:
        raise ValueError("auto: has to be chosen before it is planned: needs kernels.choosing.choose")
