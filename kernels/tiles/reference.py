"""From kept columns, bands and blocks to tile lists. Names and shapes as in kernels/plan.py."""

from __future__ import annotations

import torch

from mm_sglang.kernels.plan import BUCKET, PAD, TILE, HeadGroup, TileLists
from mm_sglang.kernels.select.blocks_reference import best_blocks


def limits(
    start: torch.Tensor, rank: torch.Tensor | None, q_order: torch.Tensor | None, prefix: int, queries: int
) -> torch.Tensor:
    """int32 [R, S, Mq * T], see HeadGroup.limits.

    Args:
        start: int32 [R, S + 1].
        rank: int32 [R, S, Nk + 1], or None: slot n holds position n.
        q_order: int32 [R, Mq * T] or None: queries [prefix, prefix + queries).
    """
    if q_order is None:
        at = torch.arange(-(-queries // TILE) * TILE, device=start.device)
        q_order = torch.where(at < queries, at + prefix, PAD).expand(len(start), -1)
    real = q_order != PAD
    seen = torch.where(real, q_order, 0).long() + 1  # keys at positions below this may be seen
    low, high = start[:, :-1, None].long(), start[:, 1:, None].long()
    if rank is None:
        out = torch.maximum(torch.minimum(seen[:, None], high), low)
    else:
        out = low + rank.long().gather(2, seen[:, None].expand(-1, rank.shape[1], -1))
    return torch.where(real[:, None], out, -1).int()


def tile_lists(group: HeadGroup, first: int, last: int) -> TileLists:
    """Tiles of query tiles [first, last): full where all rows see all of it, partial where some see some."""
    g, device = len(group.heads[0]), group.limits.device
    keys, R, S = group.keys, len(group.kv_head), len(group.segments)
    lim = group.limits.view(R, S, -1, TILE)[:, :, first:last].long()
    low = torch.where(lim < 0, PAD, lim).amin(3)  # [R, S, M]
    high = lim.amax(3)
    q_pos = group.q_positions().view(R, -1, TILE)[:, first:last].long()
    q_low = q_pos.amin(2)
    q_high = torch.where(q_pos == PAD, -1, q_pos).amax(2)
    number = torch.arange(group.key_tiles, device=device)
    wanted = torch.zeros(R * g, last - first, group.key_tiles, dtype=torch.bool, device=device)
    full = torch.zeros_like(wanted)
    k_pos = group.k_positions()
    for s, segment in enumerate(group.segments):
        begin, end = group.start[:, s, None, None].long(), group.start[:, s + 1, None, None].long()
        inside = (number * TILE >= begin) & (number * TILE < end)  # [R, 1, Mk]
        reached = inside & (number * TILE < high[:, s, :, None])
        whole = inside & ((number + 1) * TILE <= low[:, s, :, None])
        chosen = inside.repeat_interleave(g, 0).expand(-1, last - first, -1)
        if segment.bands is not None:
            chosen = torch.zeros_like(chosen)
            for head in range(R * g):
                r = head // g
                for bucket in segment.bands.index[head, : segment.bands.count[head]].tolist():
                    near, far = q_low[r] - bucket * BUCKET - BUCKET + 1, q_high[r] - bucket * BUCKET  # key positions
                    low_slot, high_slot = (
                        _slot(group, s, r, x.clamp(0, keys)) for x in (near, far + 1)
                    )  # slots [low_slot, high_slot) hold the segment's keys in [near, far]
                    chosen[head] |= (
                        (number >= low_slot[:, None] // TILE)
                        & (number <= (high_slot[:, None] - 1) // TILE)
                        & (high_slot > low_slot)[:, None]
                    )
        if segment.blocks is not None:
            best = best_blocks(segment.blocks, first, last, reached_tiles(group, s, first, last))
            at = group.start[:, s].long() // TILE  # the segment's first tile
            place = number - at.repeat_interleave(g)[:, None]
            ok = (place >= 0) & (place < best.shape[2])
            chosen = (
                best.gather(2, place.clamp(0, best.shape[2] - 1)[:, None].expand(-1, last - first, -1)) & ok[:, None]
            )
        wanted |= chosen & reached.repeat_interleave(g, 0)
        full |= whole.repeat_interleave(g, 0)
    del k_pos
    dummy = torch.tensor([h < 0 for row in group.heads for h in row], device=device)
    wanted &= ~dummy[:, None, None]
    full_count, full_index = _compact(wanted & full)
    partial_count, partial_index = _compact(wanted & ~full)
    return TileLists(
        first=first, full_count=full_count, full_index=full_index,
        partial_count=partial_count, partial_index=partial_index,
    )  # fmt: skip


def reached_tiles(group: HeadGroup, s: int, first: int, last: int) -> torch.Tensor:
    """int32 [R, M]: how many of segment s's tiles hold a key that some row of each query tile may see."""
    high = group.limits.view(len(group.kv_head), len(group.segments), -1, TILE)[:, s, first:last].amax(2)
    return ((high - group.start[:, s, None] + TILE - 1) // TILE).clamp(min=0)


def _slot(group: HeadGroup, s: int, r: int, position: torch.Tensor) -> torch.Tensor:
    """First slot of segment s whose key is at `position` or later, int64 [M]."""
    if group.rank is not None:
        return group.start[r, s].long() + group.rank[r, s][position].long()
    return position.clamp(min=int(group.start[r, s]), max=int(group.start[r, s + 1]))


def _compact(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bool [G, M, Mk] as counts int32 [G, M] and ascending lists int32 [G, M, W], W the longest one's."""
    count = chosen.sum(2, dtype=torch.int32)
    width = max(int(count.max()), 1)
    slot = torch.where(chosen, torch.cumsum(chosen, 2) - 1, width)  # what is not chosen goes to a slot that is cut off
    index = torch.zeros(*chosen.shape[:2], width + 1, dtype=torch.int32, device=chosen.device)
    number = torch.arange(chosen.shape[2], dtype=torch.int32, device=chosen.device)
    return count, index.scatter_(2, slot, number.expand_as(slot))[..., :width]
