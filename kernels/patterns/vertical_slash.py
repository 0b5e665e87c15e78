"""vertical_slash: the columns and diagonals that the last queries look at (MInference; MMInference section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns.base import HeadPattern, Looked, Selection, View, require_at_least, require_coverage
from mm_sglang.kernels.plan import BUCKET


@dataclass(frozen=True, kw_only=True)
class VerticalSlash(HeadPattern):
    """Top columns and top diagonals of the attention of the chunk's last queries.

    Query heads that share a KV head share their columns (the mean of their masses chooses), so that one reordering of
    that KV head's keys serves them all; diagonals are each head's own, and are chosen in buckets of BUCKET
    neighbours, because a tile brings the neighbours anyway.

    Args:
        columns: key columns kept at most, the first `sink` among them. Default: 1000.
        slashes: diagonals kept at most, the nearest `local` among them. Default: 4096.
        coverage: share of the sampled attention mass at which columns, and likewise slashes, stop short of their
            count; none: the counts alone decide. Default: none.
        sink: first positions that are always kept. Default: 30.
        local: nearest distances that are always kept, at least 1. Default: 100.
        last_q: queries of the estimate. Default: 64.
    """

    kind: ClassVar[str] = "vertical_slash"
    budgets: ClassVar[tuple[str, ...]] = ("columns", "slashes")
    columns: int = 1000
    slashes: int = 4096
    coverage: float | None = None
    sink: int = 30
    local: int = 100
    last_q: int = 64

    def __post_init__(self) -> None:
        require_at_least(self, 0, "sink")
        require_at_least(self, 1, "columns", "slashes", "local", "last_q")
        require_coverage(self, self.coverage)

    def looks_at(self, layout: TokenLayout, queries: int) -> Looked:
        return ((None, self.last_q),)

    def select(self, view: View) -> Selection:
        columns, diagonals = view.mass(self.last_q)
        kept = view.ops.top_budget(columns, self.columns, self.coverage, self.sink, view.allowed)
        bands = view.ops.top_buckets(diagonals, -(-self.slashes // BUCKET), self.coverage, -(-self.local // BUCKET))
        return Selection(columns=kept, columns_most=min(max(self.columns, self.sink), view.key_count), bands=bands)
