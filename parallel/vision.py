"""Which rank encodes which frames of a batch's images and videos, and how many at a time. Pure functions.

A vision tower looks at one frame at a time, so any frames can be any rank's. Each gets a run of neighbours: what the
ranks made, one after another, is then in the batch's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Patches of a frame at which attention costs as much as the rest, about: it is quadratic in them. Qwen2.5-VL attends
# whole frames in 4 of 32 layers only, Qwen3-VL in all; a video's frames are equal, so nothing hangs on it there.
QUADRATIC = 16384


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Frames [first, last) of item number `item`."""

    item: int
    first: int
    last: int


def frame_shares(grids: Sequence[Sequence[int]], size: int) -> tuple[tuple[Frames, ...], ...]:
    """Frames of each of `size` ranks, in order, balanced by cost to within a frame; a rank may have none.

    Args:
        grids: (frames, rows, columns) of each item, in patches.

    Raises:
        ValueError: no ranks, or an item without frames or patches.
    """
    if size < 1:
        raise ValueError(f"size={size}: needs at least one rank")
    for grid in grids:
        if len(grid) != 3 or min(grid) < 1:
            raise ValueError(f"grid {tuple(grid)}: needs frames, rows and columns, at least one each")
    costs = [h * w * (QUADRATIC + h * w) for _, h, w in grids]
    total = sum(cost * grid[0] for cost, grid in zip(costs, grids, strict=True))
    shares: list[list[Frames]] = [[] for _ in range(size)]
    before = 0
    for item, (cost, grid) in enumerate(zip(costs, grids, strict=True)):
        first = 0
        for rank in range(size):
            # frame f is this rank's if its middle, before + (f + 1/2) * cost, is below the rank's end
            end = -(-(2 * total * (rank + 1) - (2 * before + cost) * size) // (2 * cost * size))
            last = grid[0] if rank == size - 1 else min(max(end, first), grid[0])
            if last > first:
                shares[rank].append(Frames(item=item, first=first, last=last))
            first = last
        before += cost * grid[0]
    return tuple(tuple(share) for share in shares)


def patches(grids: Sequence[Sequence[int]], share: Sequence[Frames]) -> int:
    """Patches of a rank's frames."""
    return sum((f.last - f.first) * grids[f.item][1] * grids[f.item][2] for f in share)


def own_grids(grids: Sequence[Sequence[int]], share: Sequence[Frames]) -> list[list[int]]:
    """Grids [t, h, w] of these frames, as items of their own."""
    return [[f.last - f.first, *grids[f.item][1:]] for f in share]


def slices(grids: Sequence[Sequence[int]], share: Sequence[Frames], most: int) -> tuple[tuple[Frames, ...], ...]:
    """A rank's frames in pieces, in order: each of at most `most` patches, or of one frame that has more."""
    pieces: list[list[Frames]] = []
    room = 0
    for frames in share:
        size, first = grids[frames.item][1] * grids[frames.item][2], frames.first
        while first < frames.last:
            if room < size:
                pieces.append([])
                room = max(most, size)
            last = min(first + room // size, frames.last)
            pieces[-1].append(Frames(item=frames.item, first=first, last=last))
            room -= (last - first) * size
            first = last
    return tuple(tuple(piece) for piece in pieces)
