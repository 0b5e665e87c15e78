"""block_topk: for every tile of queries the key tiles of best pooled score (MInference, FlexPrefill, XAttention)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mm_sglang.kernels import classes
from mm_sglang.kernels.patterns.base import HeadPattern, Selection, View, require_at_least, require_coverage
from mm_sglang.kernels.plan import PARTS, TILE, Blocks

SCORES = {"pooled": 1, "quarters": PARTS, "antidiagonal": 16}  # rows that a tile is pooled to


@dataclass(frozen=True, kw_only=True)
class BlockTopK(HeadPattern):
    """The `blocks` key tiles (of TILE keys) whose means, or antidiagonal sums, best match the query tile's.

    Args:
        blocks: key tiles kept a query tile at most, sink and local ones among them. Default: 64.
        coverage: share of the tile scores' softmax at which it stops short of the count; none: the count alone
            decides. Default: none.
        sink: first positions that are always kept, in tokens. Default: 128.
        local: nearest positions that are always kept, in tokens, at least 1. Default: 256.
        score: "pooled" (mean query times mean key), "quarters" (log-sum-exp over the means of 32 neighbouring queries
            and keys, 16 times the products) or "antidiagonal" (XAttention with stride 16). Default: "pooled".
    """

    kind: ClassVar[str] = "block_topk"
    budgets: ClassVar[tuple[str, ...]] = ("blocks",)
    blocks: int = 64
    coverage: float | None = None
    sink: int = 128
    local: int = 256
    score: str = "pooled"

    def __post_init__(self) -> None:
        require_at_least(self, 0, "sink")
        require_at_least(self, 1, "blocks", "local")
        require_coverage(self, self.coverage)
        if self.score not in SCORES:
            raise ValueError(f"block_topk: score={self.score!r}: needs one of {tuple(SCORES)}")

    def select(self, view: View) -> Selection:
        stride, runs = SCORES[self.score], self.score == "quarters"
        k_order = None
        if view.key_class is not None:
            k_order = classes.order(view.layout, view.key_class, 0, view.keys).expand(len(view.kv_head), -1)
        pooled_q = view.ops.pool(view.q, view.q_order, None, view.heads, stride, False, view.prefix, view.queries, runs)
        pooled_k = view.ops.pool(
            view.k, k_order, view.slots, tuple((h,) for h in view.kv_head), stride, True, 0, view.keys, runs
        )
        return Selection(
            blocks=Blocks(
                q=pooled_q, k=pooled_k, scale=view.scale if runs else view.scale / stride, keep=self.blocks,
                coverage=self.coverage, sink=-(-self.sink // TILE), local=-(-self.local // TILE),
                parts=stride if runs else 1,
            )
        )  # fmt: skip
