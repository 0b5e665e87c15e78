"""A few tiles of a chunk's queries under any recipe: what they cost and what they attend, by the plan itself.

Legend: R, g, G, S, T, Mq as in kernels/plan.py; n sampled tiles, H query heads, Nq queries.
"""

from __future__ import annotations

import torch

from mm_sglang.kernels import classes
from mm_sglang.kernels.engines import Engine
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns.base import HeadPattern
from mm_sglang.kernels.plan import TILE, HeadGroup, Plan, device_ints, evenly, head_numbers
from mm_sglang.kernels.prefill import make_plan
from mm_sglang.kernels.share import some_tiles

TILES = 8  # 1024 rows, under 1% of a chunk of 128K tokens


class Sample:
    """TILES tiles of a chunk, evenly spread up to its last, and the two questions asked of a recipe; see `choose`."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, scale: float, engine: Engine,
        slots: torch.Tensor | None, out: torch.Tensor,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.layout, self.scale, self.engine = q, k, v, layout, scale, engine
        self.slots, self.out, self.prefix = slots, out, layout.length - len(q)
        self.buffer = torch.empty(q.shape[1], len(q), device=q.device)
        number = -(-len(q) // TILE)
        self.tiles = evenly(number, TILES)  # the last one holds the question
        rows = tuple(r for t in self.tiles for r in range(t * TILE, min((t + 1) * TILE, len(q))))
        self.rows = device_ints(rows, q.device).long()
        # Middles of equal parts: a cost that is the same for all rows, or grows with their keys, is the mean of these.
        self.middles = evenly(number, 2 * TILES)[::2]
        whole = Plan(prefix=self.prefix, queries=len(q), heads=q.shape[1], groups=())
        self.causal = whole.causal_tiles  # of each head

    def plan(self, pattern: HeadPattern) -> Plan:
        """The recipe's plan of the whole chunk for all heads."""
        return make_plan(
            self.q, self.k, layout=self.layout, patterns=[pattern] * self.q.shape[1], scale=self.scale,
            ops=self.engine.ops(), slots=self.slots,
        )  # fmt: skip

    def cost(self, plan: Plan) -> torch.Tensor:
        """fp32 [H] on the device: share of dense tiles that each head computes."""
        total = torch.zeros(plan.heads, device=self.q.device)
        for group in plan.groups:
            lists = sampled(group, self.middles).lists()
            mean = (lists.full_count + lists.partial_count).float().mean(1) * group.query_tiles  # [G]
            heads = head_numbers(group.heads, self.q.device)
            total.index_add_(0, heads.clamp(min=0).long(), torch.where(heads < 0, 0.0, mean))
        return total / self.causal

    def tail_cost(self, most: int) -> float:
        """Share of dense tiles that a text tail of `most` queries computes, of each head, beside its recipe's."""
        queries = classes.tail(self.layout, len(self.q), most)
        return -(-queries // TILE) * -(-self.layout.length // TILE) / self.causal

    def lse(self, plan: Plan) -> torch.Tensor:
        """fp32 [H, rows] of the sampled queries under a plan; later groups overwrite earlier ones' rows, as in it."""
        for group in plan.groups:
            part = sampled(group, self.tiles)
            self.engine.attend(self.q, self.k, self.v, self.slots, part, self.scale, self.out, self.buffer)
        return self.buffer[:, self.rows]


def sampled(group: HeadGroup, tiles: tuple[int, ...]) -> HeadGroup:
    """The group for those of its query tiles that hold queries of the chunk's tiles `tiles`; nothing is planned again.

    A group that gathers its queries has those of one tile of the chunk in two of its own at most.
    """
    at, count = device_ints(tiles, group.limits.device).long(), len(group.kv_head)
    if group.q_order is None:
        at = at.expand(count, -1)
    else:
        first = (group.prefix + at * TILE).int().expand(count, -1).contiguous()
        begin = torch.searchsorted(group.q_order.contiguous(), first) // TILE
        at = torch.cat([begin, begin + 1], 1).clamp(max=group.query_tiles - 1)
    return some_tiles(group, at)
