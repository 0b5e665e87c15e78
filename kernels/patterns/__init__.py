"""The pattern vocabulary: name -> recipe class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mm_sglang.kernels.patterns.a_shape import AShape
from mm_sglang.kernels.patterns.auto import Auto
from mm_sglang.kernels.patterns.base import HeadPattern, Selection, View
from mm_sglang.kernels.patterns.block_topk import BlockTopK
from mm_sglang.kernels.patterns.boundary import NAMES, Boundary
from mm_sglang.kernels.patterns.column_blocks import ColumnBlocks
from mm_sglang.kernels.patterns.dense import Dense, TextTail
from mm_sglang.kernels.patterns.grid import Grid
from mm_sglang.kernels.patterns.vertical_slash import VerticalSlash

PATTERNS: dict[str, type[HeadPattern]] = {
    c.kind: c for c in (Dense, AShape, VerticalSlash, Grid, BlockTopK, ColumnBlocks, Auto)
}


def head_pattern(recipe: Mapping[str, Any]) -> HeadPattern:
    """HeadPattern from a mapping, as YAML and JSON hold it.

    `{pattern: name, budget: value, ...}`; with `boundary: k | q | 2d` the same recipe holds for each class (or pair)
    on its own; `{boundary: q, parts: {text: {...}, vision: {...}}}` names one for each.

    Raises:
        ValueError: unknown pattern, a key the pattern does not have, or a value it refuses.
    """
    if not isinstance(recipe, Mapping) or not {"pattern", "parts"} & set(recipe):
        raise ValueError(f"head pattern {recipe!r}: needs a mapping with the key 'pattern', or 'boundary' and 'parts'")
    values = dict(recipe)
    boundary = values.pop("boundary", "none")
    residual = values.pop("residual", False)
    if not isinstance(residual, bool):
        raise ValueError(f"residual={residual!r}: needs true or false")
    if boundary != "none" and boundary not in NAMES:
        raise ValueError(f"boundary={boundary!r}: needs one of {('none', *NAMES)}")
    if "parts" in values:
        if boundary == "none" or set(values) != {"parts"} or not isinstance(values["parts"], Mapping):
            raise ValueError(
                f"head pattern {recipe!r}: 'parts' needs a mapping, 'boundary' beside it, and nothing else"
            )
        parts = tuple((str(name), head_pattern(part)) for name, part in values["parts"].items())
        return Boundary(boundary=boundary, recipes=parts, residual=residual)
    kind = values.pop("pattern")
    if kind not in PATTERNS:
        raise ValueError(f"pattern={kind!r}: needs one of {tuple(PATTERNS)}")
    known = tuple(f.name for f in fields(PATTERNS[kind]))
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(f"pattern {kind}: unknown key {unknown[0]!r}: needs one of {known}")
    if boundary == "none":
        return PATTERNS[kind](**values, residual=residual)
    made = PATTERNS[kind](**values)
    return Boundary(boundary=boundary, recipes=tuple((name, made) for name in NAMES[boundary]), residual=residual)


__all__ = [
    "PATTERNS", "AShape", "Auto", "BlockTopK", "Boundary", "ColumnBlocks", "Dense", "Grid", "HeadPattern", "Selection",
    "TextTail", "VerticalSlash", "View", "head_pattern",
]  # fmt: skip
