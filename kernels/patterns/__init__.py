"""The pattern vocabulary: name -> recipe class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mm_sglang.kernels.patterns.a_shape import AShape
from mm_sglang.kernels.patterns.base import Chunk, HeadPattern, Selection
from mm_sglang.kernels.patterns.dense import Dense
from mm_sglang.kernels.patterns.grid import Grid
from mm_sglang.kernels.patterns.vertical_slash import VerticalSlash

PATTERNS: dict[str, type[HeadPattern]] = {c.kind: c for c in (Dense, AShape, VerticalSlash, Grid)}


def head_pattern(recipe: Mapping[str, Any]) -> HeadPattern:
    """HeadPattern from a mapping `{pattern: name, budget: value, ...}`, as YAML and JSON hold it.

    Raises:
        ValueError: unknown pattern, a key the pattern does not have, or a value it refuses.
    """
    if not isinstance(recipe, Mapping) or "pattern" not in recipe:
        raise ValueError(f"head pattern {recipe!r}: needs a mapping with the key 'pattern'")
    values = dict(recipe)
    kind = values.pop("pattern")
    if kind not in PATTERNS:
        raise ValueError(f"pattern={kind!r}: needs one of {tuple(PATTERNS)}")
    known = tuple(f.name for f in fields(PATTERNS[kind]))
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(f"pattern {kind}: unknown key {unknown[0]!r}: needs one of {known}")
    return PATTERNS[kind](**values)


__all__ = ["PATTERNS", "AShape", "Chunk", "Dense", "Grid", "HeadPattern", "Selection", "VerticalSlash", "head_pattern"]
