"""Part of a plan: some query tiles of a group, and the protocol by which several ranks run one plan together.

Legend: R, g, S, T, Mq as in kernels/plan.py; n tiles that are picked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from mm_sglang.kernels.plan import TILE, HeadGroup, Segment


class Share(Protocol):
    """One rank's share of a chunk's plan; every rank makes the whole plan, from the same keys and estimates."""

    def begin(self, group: HeadGroup) -> HeadGroup | None:
        """The tiles of a group that this rank runs, None for none; values are there once it returns."""

    def end(self, group: HeadGroup, out: torch.Tensor) -> None:
        """After a group ran: rows that others computed for this rank, into out [Nq, H, D]."""


def some_tiles(group: HeadGroup, at: torch.Tensor) -> HeadGroup:
    """The group for its query tiles `at` (int64 [R, n], by order) only; nothing is planned again.

    Tiles keep their rows, so what an engine computes for one does not depend on which others are there.
    """
    count, g = len(group.kv_head), len(group.heads[0])
    order = group.q_positions().reshape(count, -1, TILE).gather(1, at[..., None].expand(-1, -1, TILE))
    limits = group.limits.view(count, len(group.segments), -1, TILE)
    limits = limits.gather(2, at[:, None, :, None].expand(-1, len(group.segments), -1, TILE))

    def cut(segment: Segment) -> Segment:
        blocks = segment.blocks
        if blocks is None:
            return segment
        rows = at.repeat_interleave(g, 0)[..., None].expand(-1, -1, blocks.q.shape[2])
        return replace(segment, blocks=replace(blocks, q=blocks.q.gather(1, rows).contiguous()))

    return replace(
        group, q_order=order.flatten(1), limits=limits.flatten(2).contiguous(),
        segments=tuple(cut(s) for s in group.segments),
    )  # fmt: skip
