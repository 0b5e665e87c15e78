"""column_blocks: the columns that the last queries look at, and of the other keys each query tile's best blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns.base import HeadPattern, Looked, Selection, View, require_at_least
from mm_sglang.kernels.plan import PARTS, TILE, Blocks


@dataclass(frozen=True, kw_only=True)
class ColumnBlocks(HeadPattern):
    """What a question will look up, kept for every query, and what each query tile's mean looks at.

    Blocks serve the mean query of a tile and lose what few of its queries need; columns of the last queries
    (MInference) serve all alike. Columns are shared by the query heads of a KV head, as in vertical_slash, and moved to
    the front; blocks are chosen, as in block_topk by clusters, from what they leave.

    Args:
        columns: key columns kept at most, the first `sink` among them. Default: 1000.
        blocks: key tiles of the rest kept a query tile at most, local ones among them. Default: 32.
        sink: first positions that are always kept. Default: 30.
        local: nearest positions of the rest that are always kept, in tokens, at least 1. Default: 256.
        last_q: queries of the columns' estimate. Default: 64.
    """

    kind: ClassVar[str] = "column_blocks"
    budgets: ClassVar[tuple[str, ...]] = ("columns", "blocks")
    columns: int = 1000
    blocks: int = 32
    sink: int = 30
    local: int = 256
    last_q: int = 64

    def __post_init__(self) -> None:
        require_at_least(self, 0, "sink")
        require_at_least(self, 1, "columns", "blocks", "local", "last_q")

    def looks_at(self, layout: TokenLayout, queries: int) -> Looked:
        return ((None, self.last_q),)

    def select(self, view: View) -> Selection:
        mass, _ = view.mass(self.last_q)
        kept = view.ops.top_budget(mass, self.columns, None, self.sink, view.allowed)
        pooled_q = view.ops.pool(view.q, view.q_order, None, view.heads, PARTS, False, view.prefix, view.queries)

        def blocks(clusters: torch.Tensor, weight: torch.Tensor) -> Blocks:
            return Blocks(
                q=pooled_q, k=clusters, scale=view.scale, keep=self.blocks, coverage=None, sink=0,
                local=-(-self.local // TILE), parts=PARTS, weight=weight,
            )  # fmt: skip

        return Selection(columns=kept, columns_most=min(max(self.columns, self.sink), view.key_count), rest=blocks)
