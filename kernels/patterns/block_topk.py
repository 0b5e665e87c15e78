"""block_topk: for every tile of queries the key tiles of best pooled score (MInference, FlexPrefill, XAttention)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mm_sglang.kernels import classes
from mm_sglang.kernels.patterns.base import HeadPattern, Selection, View, require_at_least, require_coverage
from mm_sglang.kernels.plan import PARTS, TILE, Blocks

SCORES = ("pooled", "clusters", "antidiagonal")
STRIDE = 16  # rows of a part, by antidiagonals


@dataclass(frozen=True, kw_only=True)
class BlockTopK(HeadPattern):
    """The `blocks` key tiles (of TILE keys) whose means, or antidiagonal sums, best match the query tile's.

    Args:
        blocks: key tiles kept a query tile at most, sink and local ones among them. Default: 64.
        coverage: share of the tile scores' softmax at which it stops short of the count; none: the count alone
            decides. Default: none.
        least: a tile is left out if its share of that softmax is under `least` / `blocks`, so that query tiles and
            heads that need few leave room for more `blocks` at the same cost; 0: none is. Default: 0.
        sink: first positions that are always kept, in tokens. Default: 128.
        local: nearest positions that are always kept, in tokens, at least 1. Default: 256.
        score: "pooled" (mean query times mean key), "clusters" (the means of 32 neighbouring queries times those of
            four groups of like keys, 16 times the products) or "antidiagonal" (XAttention with stride 16, 1024 times
            the products). Default: "pooled".
    """

    kind: ClassVar[str] = "block_topk"
    budgets: ClassVar[tuple[str, ...]] = ("blocks",)
    blocks: int = 64
    coverage: float | None = None
    least: float = 0.0
    sink: int = 128
    local: int = 256
    score: str = "pooled"

    def __post_init__(self) -> None:
        require_at_least(self, 0, "sink")
        require_at_least(self, 1, "blocks", "local")
        require_coverage(self, self.coverage)
        if not isinstance(self.least, int | float) or isinstance(self.least, bool) or not 0 <= self.least <= 1:
            raise ValueError(f"block_topk: least={self.least!r}: needs a number from 0 to 1")
        if self.score not in SCORES:
            raise ValueError(f"block_topk: score={self.score!r}: needs one of {SCORES}")

    def select(self, view: View) -> Selection:
        parts = {"pooled": 1, "clusters": PARTS, "antidiagonal": TILE}[self.score]
        k_order, weight, scale = None, None, view.scale
        if view.key_class is not None:
            k_order = classes.order(view.layout, view.key_class, 0, view.keys).expand(len(view.kv_head), -1)
        queries = view.ops.pool(view.q, view.q_order, None, view.heads, parts, False, view.prefix, view.queries)
        if self.score == "clusters":
            keys, weight = view.ops.clusters(view.k, k_order, view.slots, view.kv_head, view.keys)
        else:
            kv_heads = tuple((h,) for h in view.kv_head)
            keys = view.ops.pool(view.k, k_order, view.slots, kv_heads, parts, True, 0, view.keys)
        if self.score == "antidiagonal":
            parts, scale = TILE // STRIDE, view.scale / STRIDE
        return Selection(
            blocks=Blocks(
                q=queries, k=keys, scale=scale, keep=self.blocks, coverage=self.coverage, sink=-(-self.sink // TILE),
                local=-(-self.local // TILE), parts=parts, weight=weight, least=self.least / self.blocks,
            )
        )  # fmt: skip
