"""The least work of each stage, for the roofline: operations done and bytes that have to move.

A lower bound: every input read once, every output written once; where a stage computes nothing, an element moved or
compared counts as one operation. A point far under the roof has left something to gain, one above it an error here.
"""

from __future__ import annotations

import torch

from mm_sglang.kernels.patterns.grid import SAMPLED_KEYS, Grid
from mm_sglang.kernels.plan import TILE, HeadGroup, Plan


def stage_work(plan: Plan, q: torch.Tensor, k: torch.Tensor, tiles: int) -> dict[str, tuple[float, float]]:
    """Stage -> (operations, bytes).

    Args:
        q: [Nq, H, D]; k: [Nk, Hkv, D]; tiles: computed by all heads.
    """
    size, dim, keys = k.element_size(), k.shape[2], len(k)
    once = size * (2 * q.numel() + 2 * k.numel())
    work = {"attend": (4.0 * TILE * TILE * dim * tiles, float(once))}
    for group in plan.groups:
        orders, heads = len(group.heads), len(group.members)
        if _scores_blocks(group):
            moved = (len(q) * heads + keys * orders) * dim
            _add(work, "estimate", moved, size * moved)
            pairs = group.query_tiles * group.key_tiles / 2
            _add(
                work,
                "plan",
                2.0 * dim * pairs * heads,
                size * (group.query_tiles * heads + group.key_tiles * orders) * dim,
            )
        elif not group.everything:
            last = getattr(group.pattern, "last_q", 64)
            looked = min(keys, SAMPLED_KEYS) if isinstance(group.pattern, Grid) else keys
            _add(work, "estimate", 2.0 * last * looked * dim * heads, size * looked * dim * orders)
            _add(work, "select", looked * (orders + heads), 4 * looked * orders + 4 * (looked // 64) * heads)
        if group.k_order is not None:
            moved = 2 * group.key_tiles * TILE * dim * orders
            _add(work, "permute", moved, 2 * size * moved)
        if group.q_order is not None:
            moved = group.query_tiles * TILE * dim * heads
            _add(work, "permute", moved, 2 * size * moved)
            _add(work, "merge", moved, 2 * size * moved)
    _add(work, "plan", tiles, 4 * tiles)
    return work


def _scores_blocks(group: HeadGroup) -> bool:
    return any(segment.blocks is not None for segment in group.segments)


def _add(work: dict[str, tuple[float, float]], stage: str, operations: float, moved: float) -> None:
    before = work.get(stage, (0.0, 0.0))
    work[stage] = before[0] + operations, before[1] + moved
