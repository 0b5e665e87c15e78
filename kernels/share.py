"""Several ranks make and run one plan together: the protocol, shares of an estimate, and some query tiles of a group.

Legend: R, g, S, T, Mq as in kernels/plan.py; n tiles that are picked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch

from mm_sglang.kernels.plan import TILE, HeadGroup, Segment


class Team(Protocol):
    """Ranks that compute something in parts; all of them call `gather` in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, part: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Starts to gather equal parts [n, ...]; what is returned waits for [size * n, ...] in the order of ranks."""


def part_of(team: Team | None, total: int) -> tuple[int, int]:
    """(first, number) of the pieces out of `total` that this rank computes; the last ranks' may lie past the end."""
    if team is None:
        return 0, total
    number = -(-total // team.size)
    return team.rank * number, number


def gathered(team: Team | None, part: torch.Tensor) -> torch.Tensor:
    """Everybody's parts of `part_of`, those past the end last."""
    return part if team is None else team.gather(part)()


class Share(Protocol):
    """One rank's share of a chunk; every rank ends with the same whole plan, and runs some of its tiles.

    Masses over all keys are estimated in parts of the keys, of bounds that don't depend on the number of ranks, and
    gathered; what follows from them is cheaper to repeat than to send.
    """

    @property
    def team(self) -> Team: ...

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
