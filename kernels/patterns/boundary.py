"""Boundaries between text and vision (MMInference section 3.3): recipes by query class, key class, or both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from mm_sglang.kernels import classes
from mm_sglang.kernels.classes import CLASSES
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns.auto import Auto
from mm_sglang.kernels.patterns.base import HeadPattern, Looked
from mm_sglang.kernels.patterns.grid import Grid

NAMES = {
    "k": CLASSES,
    "q": CLASSES,
    "2d": tuple(f"{query}->{key}" for query in CLASSES for key in CLASSES),
}


@dataclass(frozen=True, kw_only=True)
class Boundary(HeadPattern):
    """Text and vision each have a recipe and an index of their own.

    `k`: by the key's class, one index for all queries. `q`: by the query's class, estimated from the last queries of
    that class, over all keys. `2d`: by both. Queries of the rarer class are gathered; keys are laid out by class; one
    softmax runs over the union, so nothing is merged and nothing counts twice.

    Args:
        boundary: "k", "q" or "2d".
        recipes: (name, recipe) for every name of NAMES[boundary]; "2d" names are query->key.
    """

    kind: ClassVar[str] = "boundary"
    boundary: str
    recipes: tuple[tuple[str, HeadPattern], ...]

    def __post_init__(self) -> None:
        if self.boundary not in NAMES:
            raise ValueError(f"boundary={self.boundary!r}: needs one of {('none', *NAMES)}")
        names = tuple(name for name, _ in self.recipes)
        if sorted(names) != sorted(NAMES[self.boundary]):
            raise ValueError(f"boundary {self.boundary}: parts {names}: needs each of {NAMES[self.boundary]} once")
        for name, recipe in self.recipes:
            if isinstance(recipe, Boundary):
                raise ValueError(f"boundary {self.boundary}: part {name}: needs a pattern without a boundary")
            if isinstance(recipe, Auto):
                raise ValueError(
                    f"boundary {self.boundary}: part {name}: auto: needs no boundary, it chooses one itself"
                )
            if recipe.residual:
                raise ValueError(f"boundary {self.boundary}: part {name}: residual=True: needs it beside 'boundary'")
            if self.boundary != "q" and isinstance(recipe, Grid) and recipe.horizontal:
                raise ValueError(
                    f"boundary {self.boundary}: part {name}: grid with horizontal=True: needs false, because a row "
                    "that attends every key crosses the key classes"
                )

    def scaled(self, factor: float) -> Boundary:
        return replace(self, recipes=tuple((name, recipe.scaled(factor)) for name, recipe in self.recipes))

    def looks_at(self, layout: TokenLayout, queries: int) -> Looked:
        if self.boundary == "k":
            return tuple(own for _, recipe in self.recipes for own in recipe.looks_at(layout, queries))
        looked: list[tuple[str | None, int | None]] = []
        present = classes.commonest_first(layout, layout.length - queries)
        for turn, query_class in enumerate(present):
            parts = [recipe.looks_at(layout, queries) for _, recipe in self.parts(query_class)]
            looked += [(query_class, n) for own in parts for name, n in own if name in (None, query_class)]
            if turn:  # the rarer class's rows are gathered
                looked.append((query_class, None))
        return tuple(looked)

    @property
    def query_classes(self) -> tuple[str | None, ...]:
        return (None,) if self.boundary == "k" else CLASSES

    def parts(self, query_class: str | None) -> Iterable[tuple[str | None, HeadPattern]]:
        recipes = dict(self.recipes)
        if self.boundary == "q":
            assert query_class is not None
            return ((None, recipes[query_class]),)
        prefix = "" if query_class is None else f"{query_class}->"
        return tuple((key, recipes[prefix + key]) for key in CLASSES)

    def to_dict(self) -> dict[str, Any]:
        return {
            "boundary": self.boundary,
            "residual": self.residual,
            "parts": {name: recipe.to_dict() for name, recipe in self.recipes},
        }
